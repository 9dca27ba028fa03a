"""Triton kernels of `modulation`: a program for each word, of its width."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def normalised(x, inside, eps, width):
    """A word's numbers, less their mean, divided by their deviation; and 1 / deviation."""
    centred = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * deviation, deviation


@triton.jit
def input_grad(grad, x, inside, eps, width):
    """The gradient of a word, from that of what it was normalised to."""
    y, deviation = normalised(x, inside, eps, width)
    along = tl.sum(grad * y, 0) / width
    return (grad - tl.sum(grad, 0) / width - y * along) * deviation


@triton.jit
def _of_row(ptr, column, inside, words, width):
    """What a row has of this column."""
    row = tl.program_id(0) // words
    return tl.load(ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["words"])
def _modulated(x_ptr, y_ptr, scale_ptr, shift_ptr, eps, words, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    first = tl.program_id(0).to(tl.int64) * width
    x = tl.load(x_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    y, _ = normalised(x, inside, eps, width)
    y *= 1.0 + _of_row(scale_ptr, column, inside, words, width)
    y += _of_row(shift_ptr, column, inside, words, width)
    tl.store(y_ptr + first + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["words"])
def _modulated_grad(
    grad_ptr,
    for_x_ptr,
    x_ptr,
    result_ptr,
    scale_ptr,
    eps,
    words,
    width,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < width
    first = tl.program_id(0).to(tl.int64) * width
    x = tl.load(x_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    grad *= 1.0 + _of_row(scale_ptr, column, inside, words, width)
    result = input_grad(grad, x, inside, eps, width)
    if ADDED:
        result += tl.load(for_x_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result_ptr + first + column, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["words"])
def _gated_sum(x_ptr, y_ptr, gate_ptr, added_ptr, words, width, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    first = tl.program_id(0).to(tl.int64) * width
    y = tl.load(added_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    y *= _of_row(gate_ptr, column, inside, words, width)
    if ADDED:
        y += tl.load(x_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + first + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Does what `modulation.reference_modulated` does."""
    rows, words, width = x.shape
    y = torch.empty_like(x)
    _modulated[(rows * words,)](x, y, scale, shift, eps, words, width, BLOCK=triton.next_power_of_2(width), num_warps=8)
    return y


def modulated_grad(grad: Tensor, for_x: Tensor | None, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Does what `modulation.reference_modulated_grad` does."""
    rows, words, width = x.shape
    result = torch.empty_like(x)
    # What is not there is not read.
    _modulated_grad[(rows * words,)](
        grad, x if for_x is None else for_x, x, result, scale, eps, words, width,
        ADDED=for_x is not None, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return result


def gated_sum(x: Tensor | None, gate: Tensor, added: Tensor) -> Tensor:
    """Does what `modulation.reference_gated_sum` does."""
    rows, words, width = added.shape
    y = torch.empty_like(added)
    _gated_sum[(rows * words,)](
        added if x is None else x, y, gate, added, words, width,
        ADDED=x is not None, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return y
