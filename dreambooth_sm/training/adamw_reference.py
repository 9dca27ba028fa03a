"""What :class:`~dreambooth_sm.training.adamw_blockwise.BlockwiseAdamW` computes, in plain torch: the definition that
its kernels are compared with, and what CPUs and cards without Triton run."""

from __future__ import annotations

import torch
from torch import Tensor

from dreambooth_sm.training.moments import BlockFormat, DeviceScalars, Moments

# Scales below these carry no information: the root of such a second moment is far below any sensible eps.
SMALLEST_SCALE_M = 1e-30
SMALLEST_SCALE_V = 1e-28
# Blocks that are treated at a time, so that temporaries stay small.
REFERENCE_CHUNK = 4096
MASK32 = 0xFFFFFFFF


def hash32(x: Tensor) -> Tensor:
    """A bijective mix of 32-bit integers held in int64 tensors (two multiply-xorshift rounds)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & MASK32
    return x ^ (x >> 15)


def split_bfloat16(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as its nearest bfloat16 and the int16 rest that makes it exact again."""
    bits = x.view(torch.int32)
    low = ((bits + 0x8000) & 0xFFFF) - 0x8000
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_bfloat16(high: Tensor, low: Tensor) -> Tensor:
    """The float32 tensor that `split_bfloat16` took apart, bit for bit."""
    return high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low).view(torch.float32)


def split_float16(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as its nearest float16 and an int16 rest: exact from 2^-14 on, to 2^-38 below."""
    bits = _float16_bits(x)
    low = ((bits + 0x1000) & 0x1FFF) - 0x1000
    return _to_float16(bits + 0x1000), low.to(torch.int16)


def join_float16(high: Tensor, low: Tensor) -> Tensor:
    """The float32 tensor that `split_float16` took apart."""
    magnitude = (high.view(torch.int16) & 0x7FFF).to(torch.int32).bitwise_left_shift_(13).add_(low)
    return magnitude.view(torch.float32).mul_(2.0**112).copysign_(high)


def round_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """A float32 tensor to bfloat16, up or down at random so that the expectation is `x`.

    Args:
        x: float32.
        random: int64 of the same shape, uniform 32-bit integers; the upper 16 bits are used.
    """
    return ((x.view(torch.int32) + (random >> 16).to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


def round_float16(x: Tensor, random: Tensor) -> Tensor:
    """Like `round_bfloat16`, to float16; uses the upper 13 bits."""
    return _to_float16(_float16_bits(x) + (random >> 19).to(torch.int32))


def _float16_bits(x: Tensor) -> Tensor:
    """Bits of a float with 5 exponent and 23 mantissa bits, as int32; the sign stays in bit 31.

    Times 2^-112, float32's exponents become float16's and its subnormals float16's subnormals.
    """
    return (x * 2.0**-112).view(torch.int32)


def _to_float16(bits: Tensor) -> Tensor:
    half = ((bits & 0x7FFFFFFF) >> 13).clamp(max=0x7C00) | ((bits >> 16) & 0x8000)
    return half.to(torch.int16).view(torch.float16)


def reference_update(
    param: Tensor,
    grad: Tensor,
    moments: Moments,
    scalars: DeviceScalars,
    *,
    index: int,
    group: int,
    fmt: BlockFormat,
) -> None:
    """Update one parameter in place.

    A block whose new second moment is not finite (its gradient was not, or overflowed when squared) keeps its
    weights and moments and sets `scalars.nonfinite`.

    Args:
        param: (n,) float32, bfloat16 or float16: the weights in the order they have in memory.
        grad: (n,) of any of these types, in the same order.
        moments: of this parameter; 16-bit weights without a residual are rounded stochastically.
        scalars: the step's numbers.
        index: number of the parameter, so that parameters draw different random numbers.
        group: row of `scalars.hyper`, less one.
        fmt: format of `moments`.
    """
    step_size, inv_sqrt_correction, decay, eps, beta1, beta2, gain1, gain2 = scalars.hyper[1 + group].unbind()
    g_scale, skip = scalars.control.unbind()
    m_gain = gain1 * g_scale
    v_gain = gain2 * g_scale * g_scale
    step_key = scalars.hyper[0].view(torch.int32)[0].to(torch.int64)
    key = hash32((step_key + index * 0x9E3779B9) & MASK32)
    elements = param.numel()
    for first in range(0, fmt.blocks(elements), REFERENCE_CHUNK):
        span = slice(first * fmt.size, min((first + REFERENCE_CHUNK) * fmt.size, elements))
        count = span.stop - span.start
        blocks = fmt.blocks(count)
        padding = blocks * fmt.size - count
        part = moments.part(first, first + blocks, fmt)
        old = torch.nn.functional.pad(param[span], (0, padding))
        g = torch.nn.functional.pad(grad[span].to(torch.float32), (0, padding)).view(blocks, fmt.size)

        m_kept = part.m_scale * (1.0 / fmt.m.levels**fmt.m.power) * beta1
        v_kept = part.v_scale * (1.0 / fmt.v.levels**fmt.v.power) * beta2
        m = fmt.m.decode(fmt.unpack(part.m, signed=True)) * m_kept[:, None] + m_gain * g
        v = fmt.v.decode(fmt.unpack(part.v, signed=False)) * v_kept[:, None] + (v_gain * g) * g
        direction = (m * (v.sqrt() * inv_sqrt_correction + eps).reciprocal()).flatten()
        m_top = m.abs().amax(1, keepdim=True)
        v_top = v.amax(1, keepdim=True)
        finite = torch.isfinite(v_top)
        keep = finite & (skip == 0)
        scalars.nonfinite.copy_(torch.maximum(scalars.nonfinite, (~finite).any().to(torch.float32)))

        element = torch.arange(first * fmt.size, (first + blocks) * fmt.size, device=param.device)
        # Two neighbours share a hash: one takes the upper half for the weight and the lower for the moments, the
        # other the reverse. Every rounding is fair, and weights are independent of weights.
        random = hash32((element >> 1) ^ key)
        random = torch.where(element % 2 == 0, random, ((random << 16) | (random >> 16)) & MASK32)
        if part.residual is not None:
            split, join = (
                (split_bfloat16, join_bfloat16) if param.dtype == torch.bfloat16 else (split_float16, join_float16)
            )
            full = join(old, part.residual)
            new, residual = split(full - step_size * (direction + decay * full))
            part.residual.copy_(_choose(keep, residual, part.residual, fmt.size))
        else:
            full = old.to(torch.float32)
            new = full - step_size * (direction + decay * full)
            if param.dtype == torch.bfloat16:
                new = round_bfloat16(new, random)
            elif param.dtype == torch.float16:
                new = round_float16(new, random)
        param[span] = _choose(keep, new, old, fmt.size)[:count]

        random16 = (random & 0xFFFF).view(blocks, fmt.size)
        m_scale = m_top.clamp(min=SMALLEST_SCALE_M)
        v_scale = v_top.clamp(min=SMALLEST_SCALE_V)
        m_code = torch.copysign(fmt.m.encode(m.abs(), m_scale, random16), m)
        v_code = fmt.v.encode(v, v_scale, random16)
        part.m.copy_(_choose(keep, fmt.pack(m_code, signed=True), part.m, fmt.codes))
        part.v.copy_(_choose(keep, fmt.pack(v_code, signed=False), part.v, fmt.codes))
        part.m_scale.copy_(_choose(keep, m_scale.flatten(), part.m_scale, 1))
        part.v_scale.copy_(_choose(keep, v_scale.flatten(), part.v_scale, 1))


def _choose(keep: Tensor, new: Tensor, old: Tensor, size: int) -> Tensor:
    """Rows of `size` from `new` where `keep`, (blocks, 1), is true, else from `old`."""
    if new.dtype == torch.uint16:  # CUDA's where does not know it
        return _choose(keep, new.view(torch.int16), old.view(torch.int16), size).view(torch.uint16)
    return torch.where(keep, new.view(-1, size), old.view(-1, size)).view(-1)
