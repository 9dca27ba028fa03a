"""Triton kernels of `BlockwiseAdamW`: one pass over weight, gradient and quantised moments.

Block for block they compute what `adamw_reference.reference_update` computes in plain torch: the formats, the
order of the arithmetic and the random numbers are explained there, comments here are about speed.

The update moves 10 bytes a parameter (16-bit weight, stochastic rounding) or 14 (with a residual) and costs some
75 instructions an element, so on a fast card arithmetic weighs as much as memory. Hence: a warp owns a block, so
that maxima need no shared memory and scales are scalars; conversions by adding a large constant (a float add is
several times as fast as a conversion instruction); square roots without denormal handling; reciprocals instead
of divisions; and maxima taken on integer bits, which finds NaN and infinity at no extra cost.
"""

# ruff: noqa: N803, N806
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from dreambooth_sm.training.moments import BlockFormat, DeviceScalars, Moments

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# What one program (one warp) updates, block after block. More amortises the loads of the step's numbers, but leaves
# the many parameters of a few hundred thousand elements too few programs to hide memory latency; measured on an H200.
ELEMENTS_PER_PROGRAM = 256


@triton.jit
def _approx(instruction: tl.constexpr, x):
    return tl.inline_asm_elementwise(
        instruction + ".approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sqrt(x, FAST: tl.constexpr):
    return _approx("sqrt", x) if FAST else tl.sqrt(x)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    return _approx("rcp", x) if FAST else 1.0 / x


@triton.jit
def _log2(x, FAST: tl.constexpr):
    return _approx("lg2", x) if FAST else tl.log2(x)


@triton.jit
def _exp2(x, FAST: tl.constexpr):
    return _approx("ex2", x) if FAST else tl.exp2(x)


@triton.jit
def _power(x, POWER: tl.constexpr):
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
def _load_codes(ptr, block, FORMAT: tl.constexpr, SIGNED: tl.constexpr):
    """The integer codes of a block, as float32."""
    if FORMAT.bits == 16:
        code = tl.load(ptr + block * FORMAT.size + tl.arange(0, FORMAT.size)).to(tl.uint16, bitcast=True).to(tl.uint32)
    elif FORMAT.bits == 8:
        code = tl.load(ptr + block * FORMAT.size + tl.arange(0, FORMAT.size)).to(tl.uint8, bitcast=True).to(tl.uint32)
    else:
        pair = tl.load(ptr + block * (FORMAT.size // 2) + tl.arange(0, FORMAT.size // 2)).to(tl.uint32)
        code = tl.interleave(pair & 15, pair >> 4)
    # 0x4B000000 is 2^23, where the last mantissa bit is worth 1; flipping the sign bit makes the code unsigned.
    if SIGNED:
        half: tl.constexpr = 1 << (FORMAT.bits - 1)
        return (code ^ (0x4B000000 + half)).to(tl.float32, bitcast=True) - (8388608.0 + half)
    else:
        return (code ^ 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _store_codes(ptr, block, code, FORMAT: tl.constexpr):
    """Round float32 codes to nearest and store them.

    Adding 1.5 * 2^23 rounds and leaves the integer in the low mantissa bits, in two's complement.
    """
    bits = (code + 12582912.0).to(tl.uint32, bitcast=True)
    if FORMAT.bits == 16:
        halfword = bits.to(tl.uint16).to(ptr.dtype.element_ty, bitcast=True)
        tl.store(ptr + block * FORMAT.size + tl.arange(0, FORMAT.size), halfword)
    elif FORMAT.bits == 8:
        byte = bits.to(tl.uint8).to(ptr.dtype.element_ty, bitcast=True)
        tl.store(ptr + block * FORMAT.size + tl.arange(0, FORMAT.size), byte)
    else:
        even, odd = tl.split(bits.reshape([FORMAT.size // 2, 2]))
        byte = ((even & 15) | ((odd & 15) << 4)).to(tl.uint8)
        tl.store(ptr + block * (FORMAT.size // 2) + tl.arange(0, FORMAT.size // 2), byte)


@triton.jit
def _encode(x, sqrt_x, scale, random16, CODE: tl.constexpr, FAST: tl.constexpr):
    """Codes, not yet rounded to nearest, of the magnitudes `x` in a block whose largest is `scale`."""
    factor = CODE.levels**CODE.power * _reciprocal(scale, FAST)
    if CODE.power == 2:
        root = _sqrt(x * factor, FAST)
    elif CODE.power == 4:
        root = _sqrt(sqrt_x * _sqrt(factor, FAST), FAST)
    else:
        third: tl.constexpr = 1.0 / 3.0
        root = _exp2(_log2(x, FAST) * third + _log2(factor, FAST) * third, FAST)
    if CODE.stochastic:
        # Rounds down; a hair more than a half keeps the largest root below the last code despite its error.
        below = tl.maximum((root - 0.5002 + 12582912.0) - 12582912.0, CODE.smallest * 1.0)
        if CODE.levels > 255:  # not so with this many
            below = tl.minimum(below, CODE.levels - 1.0)
        # (below + 1)^power - below^power, in units of the random number's step.
        step: tl.constexpr = 1.0 / 65536.0
        if CODE.power == 2:
            gap = below * (2 * step) + step
        elif CODE.power == 3:
            gap = (below * (3 * step) + 3 * step) * below + step
        else:
            gap = ((below * (4 * step) + 6 * step) * below + 4 * step) * below + step
        uniform = (random16 ^ 0x4B000000).to(tl.float32, bitcast=True) - 8388607.5
        root = tl.where(uniform * gap + _power(below, CODE.power) < x * factor, below + 1.0, below)
    elif CODE.smallest > 0:
        root = tl.maximum(root, CODE.smallest * 1.0)
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
    first,
    last,
    n,
    index,
    group,
    scalars_ptr,
    control_ptr,
    flag_ptr,
    RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    FAST: tl.constexpr,
):
    """Update the blocks `first` to `last` of a parameter of `n` elements; all pointers are at its first element."""
    M_CODE: tl.constexpr = FORMAT.m
    V_CODE: tl.constexpr = FORMAT.v
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

    for block in range(first, last):
        offsets = block * FORMAT.size + tl.arange(0, FORMAT.size)
        inside = offsets < n
        p_raw = tl.load(p_ptr + offsets, mask=inside, other=0.0)
        g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        m_code = _load_codes(m_ptr, block, FORMAT, True)
        v_code = _load_codes(v_ptr, block, FORMAT, False)
        m_kept = tl.load(ms_ptr + block) * (1.0 / M_CODE.levels**M_CODE.power) * beta1
        v_kept = tl.load(vs_ptr + block) * (1.0 / V_CODE.levels**V_CODE.power) * beta2
        if RESIDUAL:
            low = tl.load(r_ptr + offsets).to(tl.int32).to(tl.uint32, bitcast=True)

        m_root = m_code * tl.abs(m_code) if M_CODE.power % 2 == 0 else _power(m_code, M_CODE.power)
        m = m_root * m_kept + m_gain * g
        v = _power(v_code, V_CODE.power) * v_kept + (v_gain * g) * g
        sqrt_v = _sqrt(v, FAST)
        direction = m * _reciprocal(sqrt_v * inv_sqrt_correction + eps, FAST)

        # Neither is negative, so bits sort like values, with infinity and NaN above all finite ones.
        m_size = tl.abs(m)
        m_top = tl.max(m_size.to(tl.uint32, bitcast=True), axis=0)
        v_top = tl.max(v.to(tl.uint32, bitcast=True), axis=0)
        finite = v_top < 0x7F800000
        if finite & (skip == 0.0):
            # Neighbours share a hash and read it from opposite ends.
            random = _hash((offsets >> 1).to(tl.uint32) ^ key)
            random = tl.where(offsets & 1 == 0, random, (random << 16) | (random >> 16))
            if p_ptr.dtype.element_ty == tl.float32:
                tl.store(p_ptr + offsets, p_raw - step_size * (direction + decay * p_raw), mask=inside)
            elif p_ptr.dtype.element_ty == tl.bfloat16:
                if RESIDUAL:
                    high = p_raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
                    p = (high + low).to(tl.float32, bitcast=True)
                    p = p - step_size * (direction + decay * p)
                    bits = p.to(tl.uint32, bitcast=True)
                    # The low halfword, read as signed, is the distance to the nearest bfloat16.
                    tl.store(r_ptr + offsets, bits.to(tl.uint16).to(tl.int16, bitcast=True))
                    bits += 0x8000
                else:
                    p = p_raw.to(tl.float32)
                    p = p - step_size * (direction + decay * p)
                    bits = p.to(tl.uint32, bitcast=True) + (random >> 16)
                high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
                tl.store(p_ptr + offsets, high, mask=inside)
            else:
                # Times 2^-112, the bits of a float32 shifted right by 13 are a float16's, subnormals included.
                shrink: tl.constexpr = 2.0**-112
                if RESIDUAL:
                    old = p_raw.to(tl.uint16, bitcast=True).to(tl.uint32)
                    bits = (((old & 0x7FFF) << 13) + low) | ((old & 0x8000) << 16)
                    p = bits.to(tl.float32, bitcast=True) * (1.0 / shrink)
                    p = p - step_size * (direction + decay * p)
                    bits = (p * shrink).to(tl.uint32, bitcast=True)
                    # The low 13 bits, read as signed, are the distance to the nearest float16.
                    rest = (bits << 19).to(tl.int32, bitcast=True) >> 19
                    tl.store(r_ptr + offsets, rest.to(tl.int16))
                    bits += 0x1000
                else:
                    p = p_raw.to(tl.float32)
                    p = p - step_size * (direction + decay * p)
                    bits = (p * shrink).to(tl.uint32, bitcast=True) + (random >> 19)
                half = tl.minimum((bits & 0x7FFFFFFF) >> 13, 0x7C00) | ((bits >> 16) & 0x8000)
                tl.store(p_ptr + offsets, half.to(tl.uint16).to(tl.float16, bitcast=True), mask=inside)

            m_scale = tl.maximum(m_top.to(tl.float32, bitcast=True), 1e-30)
            v_scale = tl.maximum(v_top.to(tl.float32, bitcast=True), 1e-28)
            # The weight took the high half of the random bits, a moment takes the low half.
            random = random & 0xFFFF
            code = _encode(m_size, m_size, m_scale, random, M_CODE, FAST)
            sign = m.to(tl.uint32, bitcast=True) & 0x80000000
            code = (code.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            _store_codes(m_ptr, block, code, FORMAT)
            code = _encode(v, sqrt_v, v_scale, random, V_CODE, FAST)
            _store_codes(v_ptr, block, code, FORMAT)
            tl.store(ms_ptr + block, m_scale)
            tl.store(vs_ptr + block, v_scale)
        if v_top >= 0x7F800000:
            tl.store(flag_ptr, 1.0)


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
    RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    FAST: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A parameter a launch; a program updates BLOCKS of its blocks."""
    first = tl.program_id(0) * BLOCKS
    last = tl.minimum(first + BLOCKS, tl.cdiv(n, FORMAT.size))
    _update(
        p_ptr, r_ptr, g_ptr, m_ptr, v_ptr, ms_ptr, vs_ptr, first, last, n, index, group, scalars_ptr, control_ptr,
        flag_ptr, RESIDUAL, FORMAT, FAST,
    )  # fmt: skip


@triton.jit
def _update_many(
    table_ptr,
    r_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    ms_ptr,
    vs_ptr,
    scalars_ptr,
    control_ptr,
    flag_ptr,
    P_TYPE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FORMAT: tl.constexpr,
    FAST: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Many parameters a launch; the table says of which parameter a program updates which blocks."""
    row_ptr = table_ptr + tl.program_id(0) * 6
    p_ptr = tl.load(row_ptr).to(tl.pointer_type(P_TYPE))
    n = tl.load(row_ptr + 1).to(tl.int32)
    start = tl.load(row_ptr + 2)
    group = tl.load(row_ptr + 3)
    index = tl.load(row_ptr + 4)
    first = tl.load(row_ptr + 5).to(tl.int32)
    last = tl.minimum(first + BLOCKS, tl.cdiv(n, FORMAT.size))
    _update(
        p_ptr, r_ptr + start * FORMAT.size, g_ptr + start * FORMAT.size, m_ptr + start * FORMAT.codes,
        v_ptr + start * FORMAT.codes, ms_ptr + start, vs_ptr + start, first, last, n, index, group, scalars_ptr,
        control_ptr, flag_ptr, RESIDUAL, FORMAT, FAST,
    )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _blocks_per_program(fmt: BlockFormat) -> int:
    return max(1, ELEMENTS_PER_PROGRAM // fmt.size)


@cache
def _constants(fmt: BlockFormat, residual: bool, blocks: int) -> dict[str, Any]:
    return {"RESIDUAL": residual, "FORMAT": fmt, "FAST": not INTERPRETED, "BLOCKS": blocks, "num_warps": 1}


def update(
    param: torch.Tensor,
    grad: torch.Tensor,
    moments: Moments,
    scalars: DeviceScalars,
    *,
    index: int,
    group: int,
    fmt: BlockFormat,
) -> None:
    """Like `adamw_reference.reference_update`, but `param` and `grad` may have any shape and one dense layout."""
    programs = triton.cdiv(len(moments.m_scale), _blocks_per_program(fmt))
    _update_one[(programs,)](
        param,
        param if moments.residual is None else moments.residual,
        grad,
        moments.m,
        moments.v,
        moments.m_scale,
        moments.v_scale,
        param.numel(),
        index,
        group,
        scalars.hyper,
        scalars.control,
        scalars.nonfinite,
        **_constants(fmt, moments.residual is not None, _blocks_per_program(fmt)),
    )


def bundle_table(
    params: Iterable[tuple[int, int, int, int, int]], fmt: BlockFormat, device: torch.device
) -> torch.Tensor:
    """Makes the table that `update_bundle` reads: a row a program.

    Args:
        params: of each parameter its address, number of elements, first block in the bundle's moments, parameter
            group and index.
    """
    step = _blocks_per_program(fmt)
    rows = [(*param, first) for param in params for first in range(0, fmt.blocks(param[1]), step)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def update_bundle(
    table: torch.Tensor,
    dtype: torch.dtype,
    grads: torch.Tensor,
    moments: Moments,
    scalars: DeviceScalars,
    *,
    fmt: BlockFormat,
) -> None:
    """Update all parameters of a table in one launch.

    Args:
        table: from `bundle_table`.
        dtype: of the parameters.
        grads: (blocks * size,), in the order of `moments`.
        moments: of all parameters of the bundle.
    """
    _update_many[(len(table),)](
        table,
        table if moments.residual is None else moments.residual,
        grads,
        moments.m,
        moments.v,
        moments.m_scale,
        moments.v_scale,
        scalars.hyper,
        scalars.control,
        scalars.nonfinite,
        P_TYPE=_TYPES[dtype],
        **_constants(fmt, moments.residual is not None, _blocks_per_program(fmt)),
    )


@triton.jit
def _average(a_ptr, p_ptr, r_ptr, weight_ptr, n, RESIDUAL: tl.constexpr, SIZE: tl.constexpr):
    """Move an average towards the weights: one pass where torch's operations would make seven."""
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = offsets < n
    p_raw = tl.load(p_ptr + offsets, mask=inside, other=0.0)
    if RESIDUAL:
        low = tl.load(r_ptr + offsets, mask=inside, other=0).to(tl.int32).to(tl.uint32, bitcast=True)
        old = p_raw.to(tl.uint16, bitcast=True).to(tl.uint32)
        if p_ptr.dtype.element_ty == tl.bfloat16:
            p = ((old << 16) + low).to(tl.float32, bitcast=True)
        else:
            bits = (((old & 0x7FFF) << 13) + low) | ((old & 0x8000) << 16)
            p = bits.to(tl.float32, bitcast=True) * 2.0**112
    else:
        p = p_raw.to(tl.float32)
    a = tl.load(a_ptr + offsets, mask=inside, other=0.0)
    tl.store(a_ptr + offsets, a + tl.load(weight_ptr) * (p - a), mask=inside)


def average(average: torch.Tensor, param: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Does what `BlockwiseAdamW.average_into` does; all tensors have the parameter's layout."""
    size = 1024
    _average[(triton.cdiv(param.numel(), size),)](
        average,
        param,
        param if residual is None else residual,
        weight,
        param.numel(),
        RESIDUAL=residual is not None,
        SIZE=size,
        num_warps=4,
    )
