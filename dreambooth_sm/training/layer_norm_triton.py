"""Triton kernels of `layer_norm`: a program for each word."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dreambooth_sm.training.modulation_triton import input_grad, normalised


@triton.jit
def _norm(x_ptr, y_ptr, weight_ptr, bias_ptr, eps, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    y, _ = normalised(tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32), inside, eps, width)
    y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_grad(grad_ptr, x_ptr, result_ptr, weight_ptr, eps, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    result = input_grad(grad, x, inside, eps, width)
    tl.store(result_ptr + place, result.to(result_ptr.dtype.element_ty), mask=inside)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Does what `layer_norm.reference_norm` does."""
    y = torch.empty_like(x)
    _norm[_words(x)](x, y, weight, bias, eps, x.shape[-1], **_sizes(x))
    return y


def norm_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Does what `layer_norm.reference_norm_grad` does."""
    result = torch.empty_like(x)
    _norm_grad[_words(x)](grad, x, result, weight, eps, x.shape[-1], **_sizes(x))
    return result


def _words(x: Tensor) -> tuple[int]:
    return (x.shape[:-1].numel(),)


def _sizes(x: Tensor) -> dict[str, Any]:
    """A thread has 8 to 16 numbers."""
    block = triton.next_power_of_2(x.shape[-1])
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}
