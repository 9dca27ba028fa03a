"""Triton kernels of `geglu`: a program for each word, and each block of its width."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program.
_BLOCK = 1024


@triton.jit
def _halves(projected_ptr, width, BLOCK: tl.constexpr):
    """The halves of a block, where they lie, and which of their columns there are."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * 2 * width + column
    hidden = tl.load(projected_ptr + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(projected_ptr + place + width, mask=inside, other=0.0).to(tl.float32)
    return hidden, gate, place, column, inside


@triton.jit
def _below(gate):
    """The share of a normal distribution that lies below."""
    return 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))


@triton.jit
def _gate(projected_ptr, y_ptr, width, BLOCK: tl.constexpr):
    hidden, gate, _, column, inside = _halves(projected_ptr, width, BLOCK)
    y = (hidden * gate * _below(gate)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + tl.program_id(0).to(tl.int64) * width + column, y, mask=inside)


@triton.jit
def _gate_grad(grad_ptr, projected_ptr, result_ptr, width, BLOCK: tl.constexpr):
    hidden, gate, place, column, inside = _halves(projected_ptr, width, BLOCK)
    grad = tl.load(grad_ptr + tl.program_id(0).to(tl.int64) * width + column, mask=inside, other=0.0).to(tl.float32)
    below = _below(gate)
    slope = below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(result_ptr + place, (grad * gate * below).to(result_ptr.dtype.element_ty), mask=inside)
    tl.store(result_ptr + place + width, (grad * hidden * slope).to(result_ptr.dtype.element_ty), mask=inside)


def gate(projected: Tensor) -> Tensor:
    """Does what `geglu.reference_gate` does."""
    width = projected.shape[-1] // 2
    y = projected.new_empty(*projected.shape[:-1], width)
    _gate[_grid(y)](projected, y, width, BLOCK=_BLOCK, num_warps=4)
    return y


def gate_grad(grad: Tensor, projected: Tensor) -> Tensor:
    """Does what `geglu.reference_gate_grad` does."""
    result = torch.empty_like(projected)
    _gate_grad[_grid(grad)](grad, projected, result, grad.shape[-1], BLOCK=_BLOCK, num_warps=4)
    return result


def _grid(y: Tensor) -> tuple[int, int]:
    return y.shape[:-1].numel(), triton.cdiv(y.shape[-1], _BLOCK)
