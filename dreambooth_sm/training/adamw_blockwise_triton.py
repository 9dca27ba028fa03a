"""Triton kernels of `BlockwiseAdamW`: one pass over weight, gradient and quantised moments.

Block for block they compute what `adamw_blockwise.reference_update` computes in plain torch: the formats, the
order of the arithmetic and the random numbers are explained there, comments here are about speed.

The update moves 10 bytes a parameter (16-bit weight, stochastic rounding) or 14 (with a residual) and costs some
80 instructions an element, so on a fast card arithmetic weighs as much as memory. Hence: conversions by adding a
large constant (a float add is four times as fast as a conversion instruction), square roots without denormal
handling, reciprocals instead of divisions, and block maxima taken on integer bits, which finds NaN and infinity
at no extra cost.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Elements a program handles, and its warps. 8 elements a thread: 16-byte accesses to 16-bit data and 8-byte
# accesses to the codes share one register layout, so nothing is reshuffled through shared memory.
TILE_ELEMENTS = 2048
NUM_WARPS = 8


@triton.jit
def _sqrt(x, FAST: tl.constexpr):  # noqa: N803
    if FAST:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt(x)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):  # noqa: N803
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _log2(x, FAST: tl.constexpr):  # noqa: N803
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def _exp2(x, FAST: tl.constexpr):  # noqa: N803
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _power(x, POWER: tl.constexpr):  # noqa: N803
    if POWER == 2:
        return x * x
    elif POWER == 3:
        return x * x * x
    else:
        square = x * x
        return square * square


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _load_codes(ptr, rows, live, BLOCK: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr):  # noqa: N803
    """Integer codes of a tile as float32."""
    if BITS == 8:
        offsets = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        code = tl.load(ptr + offsets, mask=live[:, None], other=0).to(tl.uint8, bitcast=True).to(tl.uint32)
    else:
        offsets = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        pair = tl.load(ptr + offsets, mask=live[:, None], other=0).to(tl.uint8, bitcast=True).to(tl.uint32)
        code = tl.interleave(pair & 15, pair >> 4)
    # 0x4B000000 is 2^23, whose last mantissa bit is worth 1; flipping the sign bit makes the code unsigned.
    if SIGNED:
        half: tl.constexpr = 1 << (BITS - 1)
        return (code ^ (0x4B000000 + half)).to(tl.float32, bitcast=True) - (8388608.0 + half)
    else:
        return (code ^ 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _store_codes(ptr, rows, keep, code, BLOCK: tl.constexpr, BITS: tl.constexpr):  # noqa: N803
    """Round float32 codes to nearest and store them.

    Adding 1.5 * 2^23 rounds and leaves the integer in the low mantissa bits, in two's complement.
    """
    bits = (code + 12582912.0).to(tl.uint32, bitcast=True)
    if BITS == 8:
        offsets = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        byte = bits.to(tl.uint8)
    else:
        offsets = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        even, odd = tl.split(bits.reshape([bits.shape[0], BLOCK // 2, 2]))
        byte = ((even & 15) | ((odd & 15) << 4)).to(tl.uint8)
    tl.store(ptr + offsets, byte.to(ptr.dtype.element_ty, bitcast=True), mask=keep[:, None])


@triton.jit
def _encode(
    x,
    sqrt_x,
    scale,
    random16,
    LEVELS: tl.constexpr,  # noqa: N803
    POWER: tl.constexpr,  # noqa: N803
    STOCHASTIC: tl.constexpr,  # noqa: N803
    FAST: tl.constexpr,  # noqa: N803
):
    """Codes, not yet rounded to nearest, of the magnitudes `x` in blocks whose largest is `scale`."""
    factor = LEVELS**POWER * _reciprocal(scale, FAST)
    scaled = x * factor[:, None]
    if POWER == 2:
        root = _sqrt(scaled, FAST)
    elif POWER == 4:
        root = _sqrt(sqrt_x * _sqrt(factor, FAST)[:, None], FAST)
    else:
        third: tl.constexpr = 1.0 / 3.0
        root = _exp2(_log2(x, FAST) * third + (_log2(factor, FAST) * third)[:, None], FAST)
    if STOCHASTIC:
        # Rounds down; a hair more than a half keeps the largest root, LEVELS, at LEVELS - 1 despite its error.
        below = (root - 0.5002 + 12582912.0) - 12582912.0
        ulp: tl.constexpr = 1.0 / 65536.0
        # (below + 1)^POWER - below^POWER, in units of the random number's step.
        if POWER == 2:
            gap = below * (2 * ulp) + ulp
        elif POWER == 3:
            gap = (below * (3 * ulp) + 3 * ulp) * below + ulp
        else:
            gap = ((below * (4 * ulp) + 6 * ulp) * below + 4 * ulp) * below + ulp
        uniform = (random16 ^ 0x4B000000).to(tl.float32, bitcast=True) - 8388607.5
        return tl.where(uniform * gap + _power(below, POWER) < scaled, below + 1.0, below)
    else:
        return root


@triton.jit
def _update(
    p_ptr,
    r_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    ms_ptr,
    vs_ptr,
    rows,
    n,
    index,
    scalars_ptr,
    group,
    control_ptr,
    flag_ptr,
    RESIDUAL: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    M_LEVELS: tl.constexpr,  # noqa: N803
    M_POWER: tl.constexpr,  # noqa: N803
    M_STOCHASTIC: tl.constexpr,  # noqa: N803
    V_LEVELS: tl.constexpr,  # noqa: N803
    V_POWER: tl.constexpr,  # noqa: N803
    V_STOCHASTIC: tl.constexpr,  # noqa: N803
    FAST: tl.constexpr,  # noqa: N803
):
    """Update the blocks `rows` of one parameter of `n` elements; all pointers are at its first element."""
    key = _hash(tl.load(scalars_ptr.to(tl.pointer_type(tl.uint32))) + index.to(tl.uint32) * 0x9E3779B9)
    hyper_ptr = scalars_ptr + 8 + group * 8
    step_size = tl.load(hyper_ptr)
    inv_sqrt_correction = tl.load(hyper_ptr + 1)
    decay = tl.load(hyper_ptr + 2)
    eps = tl.load(hyper_ptr + 3)
    beta1 = tl.load(hyper_ptr + 4)
    beta2 = tl.load(hyper_ptr + 5)
    g_scale = tl.load(control_ptr)
    skip = tl.load(control_ptr + 1)
    m_gain = tl.load(hyper_ptr + 6) * g_scale
    v_gain = tl.load(hyper_ptr + 7) * g_scale * g_scale

    offsets = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = offsets < n
    live = rows * BLOCK < n

    p_raw = tl.load(p_ptr + offsets, mask=inside, other=0.0)
    g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    m_code = _load_codes(m_ptr, rows, live, BLOCK, BITS, True)
    v_code = _load_codes(v_ptr, rows, live, BLOCK, BITS, False)
    m_kept = tl.load(ms_ptr + rows, mask=live, other=0.0) * (1.0 / M_LEVELS**M_POWER) * beta1
    v_kept = tl.load(vs_ptr + rows, mask=live, other=0.0) * (1.0 / V_LEVELS**V_POWER) * beta2

    if M_POWER % 2 == 0:
        m_root = m_code * tl.abs(m_code)
    else:
        m_root = _power(m_code, M_POWER)
    m = m_root * m_kept[:, None] + m_gain * g
    v = _power(v_code, V_POWER) * v_kept[:, None] + (v_gain * g) * g
    sqrt_v = _sqrt(v, FAST)
    change = step_size * m * _reciprocal(sqrt_v * inv_sqrt_correction + eps, FAST)

    # Neither is negative, so bits sort like values, with infinity and NaN above all finite ones.
    m_size = tl.abs(m)
    m_top = tl.max(m_size.to(tl.uint32, bitcast=True), axis=1)
    v_top = tl.max(v.to(tl.uint32, bitcast=True), axis=1)
    finite = v_top < 0x7F800000
    keep = live & finite & (skip == 0.0)
    tl.store(flag_ptr + tl.zeros_like(rows), 1.0, mask=live & (v_top >= 0x7F800000))

    random = _hash(offsets.to(tl.uint32) ^ key)
    inside = inside & keep[:, None]
    if p_ptr.dtype.element_ty == tl.float32:
        tl.store(p_ptr + offsets, p_raw * decay - change, mask=inside)
    elif p_ptr.dtype.element_ty == tl.bfloat16:
        if RESIDUAL:
            high = p_raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
            low = tl.load(r_ptr + offsets, mask=live[:, None], other=0).to(tl.int32).to(tl.uint32, bitcast=True)
            bits = ((high + low).to(tl.float32, bitcast=True) * decay - change).to(tl.uint32, bitcast=True)
            # The low halfword, read as signed, is the distance to the nearest bfloat16.
            tl.store(r_ptr + offsets, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=keep[:, None])
            bits += 0x8000
        else:
            bits = (p_raw.to(tl.float32) * decay - change).to(tl.uint32, bitcast=True) + (random >> 16)
        tl.store(p_ptr + offsets, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        # Times 2^-112, the bits of a float32 shifted right by 13 are those of a float16, subnormals included.
        shrink: tl.constexpr = 2.0**-112
        if RESIDUAL:
            old = p_raw.to(tl.uint16, bitcast=True).to(tl.uint32)
            low = tl.load(r_ptr + offsets, mask=live[:, None], other=0).to(tl.int32).to(tl.uint32, bitcast=True)
            bits = (((old & 0x7FFF) << 13) + low) | ((old & 0x8000) << 16)
            p = bits.to(tl.float32, bitcast=True) * (1.0 / shrink) * decay - change
            bits = (p * shrink).to(tl.uint32, bitcast=True)
            nearest = bits + 0x1000
            tl.store(r_ptr + offsets, (bits - (nearest & 0xFFFFE000)).to(tl.int16), mask=keep[:, None])
        else:
            p = p_raw.to(tl.float32) * decay - change
            nearest = (p * shrink).to(tl.uint32, bitcast=True) + (random >> 19)
        half = tl.minimum((nearest & 0x7FFFFFFF) >> 13, 0x7C00) | ((nearest >> 16) & 0x8000)
        tl.store(p_ptr + offsets, half.to(tl.uint16).to(tl.float16, bitcast=True), mask=inside)

    m_scale = tl.maximum(m_top.to(tl.float32, bitcast=True), 1e-30)
    v_scale = tl.maximum(v_top.to(tl.float32, bitcast=True), 1e-28)
    # The weight took the high bits of the random number, the moments take the low half.
    random = random & 0xFFFF
    code = _encode(m_size, _sqrt(m_size, FAST), m_scale, random, M_LEVELS, M_POWER, M_STOCHASTIC, FAST)
    sign = m.to(tl.uint32, bitcast=True) & 0x80000000
    code = (code.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    _store_codes(m_ptr, rows, keep, code, BLOCK, BITS)
    code = _encode(v, sqrt_v, v_scale, random, V_LEVELS, V_POWER, V_STOCHASTIC, FAST)
    _store_codes(v_ptr, rows, keep, tl.maximum(code, 1.0), BLOCK, BITS)
    tl.store(ms_ptr + rows, m_scale, mask=keep)
    tl.store(vs_ptr + rows, v_scale, mask=keep)


@triton.jit(do_not_specialize=["index", "group"])
def _update_one(
    p_ptr,
    r_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    ms_ptr,
    vs_ptr,
    n,
    index,
    group,
    scalars_ptr,
    control_ptr,
    flag_ptr,
    RESIDUAL: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    M_LEVELS: tl.constexpr,  # noqa: N803
    M_POWER: tl.constexpr,  # noqa: N803
    M_STOCHASTIC: tl.constexpr,  # noqa: N803
    V_LEVELS: tl.constexpr,  # noqa: N803
    V_POWER: tl.constexpr,  # noqa: N803
    V_STOCHASTIC: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    FAST: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _update(
        p_ptr, r_ptr, g_ptr, m_ptr, v_ptr, ms_ptr, vs_ptr, rows, n, index, scalars_ptr, group, control_ptr, flag_ptr,
        RESIDUAL, BITS, BLOCK, M_LEVELS, M_POWER, M_STOCHASTIC, V_LEVELS, V_POWER, V_STOCHASTIC, FAST,
    )  # fmt: skip
