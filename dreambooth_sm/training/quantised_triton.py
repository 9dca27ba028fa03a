"""The values of codes in one pass, as Triton kernels; to the bit those of `quantised.dequantised` without them."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of codes that a program reads, and those that share a scale in nf4.
BYTES, SHARED = 1024, 32


@triton.jit
def _dequantise(codes_ptr, scales_ptr, levels_ptr, values_ptr, count, BYTES: tl.constexpr, SHARED: tl.constexpr):
    at = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    inside = at < count
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + at // SHARED, mask=inside, other=0.0).to(tl.float32)
    first = tl.load(levels_ptr + code // 16).to(tl.float32) * scale
    second = tl.load(levels_ptr + code % 16).to(tl.float32) * scale
    values = tl.interleave(first, second).to(values_ptr.dtype.element_ty)
    to = tl.program_id(0) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    tl.store(values_ptr + to, values, mask=to < 2 * count)


@triton.jit
def _scale(codes_ptr, scales_ptr, values_ptr, count, columns, BYTES: tl.constexpr):
    at = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    inside = at < count
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + at // columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(values_ptr + at, (code * scale).to(values_ptr.dtype.element_ty), mask=inside)


def scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """The matrix that int8 codes stand for.

    Args:
        codes: int8 ``(out, in)``, contiguous.
        scales: ``(out, 1)``, contiguous.
    """
    values = torch.empty(codes.shape, dtype=scales.dtype, device=codes.device)
    count = codes.numel()
    _scale[(triton.cdiv(count, BYTES),)](codes, scales, values, count, codes.shape[1], BYTES=BYTES)
    return values


def dequantised(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """The matrix that nf4 codes stand for.

    Args:
        codes: uint8 ``(out, in / 2)``, contiguous; two a byte, the first in the upper bits.
        scales: ``(blocks, 1)``, contiguous.
        levels: ``(16,)``, of the type of the scales.
    """
    rows, columns = codes.shape
    values = torch.empty(rows, 2 * columns, dtype=scales.dtype, device=codes.device)
    count = codes.numel()
    _dequantise[(triton.cdiv(count, BYTES),)](codes, scales, levels, values, count, BYTES=BYTES, SHARED=SHARED)
    return values
