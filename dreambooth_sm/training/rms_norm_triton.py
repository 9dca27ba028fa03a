"""Triton kernels of `rms_norm`: a program for each word, of its width, or of all its heads."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program of SwiGLU.
_GATED = 2048


@triton.jit
def _factor_of(column, inside, weight_ptr, factor_ptr, words, width, SCALED: tl.constexpr):
    """The weight of each column, times the factor of this program's row."""
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        row = tl.program_id(0) // words
        weight *= tl.load(factor_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    return weight


@triton.jit(do_not_specialize=["words"])
def _scaled(
    x_ptr,
    y_ptr,
    weight_ptr,
    factor_ptr,
    added_ptr,
    eps,
    words,
    width,
    SCALED: tl.constexpr,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < width
    first = tl.program_id(0).to(tl.int64) * width
    x = tl.load(x_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    deviation = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    y = x * deviation * _factor_of(column, inside, weight_ptr, factor_ptr, words, width, SCALED)
    if ADDED:
        y += tl.load(added_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + first + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["words"])
def _scaled_grad(
    grad_ptr,
    x_ptr,
    result_ptr,
    weight_ptr,
    factor_ptr,
    eps,
    words,
    width,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < width
    first = tl.program_id(0).to(tl.int64) * width
    x = tl.load(x_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
    grad *= _factor_of(column, inside, weight_ptr, factor_ptr, words, width, SCALED)
    deviation = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    normalised = x * deviation
    result = (grad - normalised * (tl.sum(grad * normalised, 0) / width)) * deviation
    tl.store(result_ptr + first + column, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _heads_of_word(heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of this word's numbers, ``(HEADS, WIDTH)``, and which of them are there."""
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    first = tl.program_id(0).to(tl.int64) * heads * width
    return first + head * width + column, (head < heads) & (column < width)


@triton.jit
def _pairs(x, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The first and the second numbers of neighbours, each ``(HEADS, WIDTH / 2)``. They are read as they lie, and
    parted in registers: reading every other number takes many times as long."""
    return tl.split(tl.reshape(x, [HEADS, WIDTH // 2, 2]))


@triton.jit
def _turn_of_word(turns_ptr, width, WIDTH: tl.constexpr):
    """Cosines and sines of this word's pairs, each ``(1, WIDTH / 2)``."""
    column = tl.arange(0, WIDTH)[None, :]
    turn = tl.load(turns_ptr + tl.program_id(0).to(tl.int64) * width + column, mask=column < width, other=0.0)
    return _pairs(turn.to(tl.float32), 1, WIDTH)


@triton.jit(do_not_specialize=["heads"])
def _turned(x_ptr, y_ptr, weight_ptr, turns_ptr, eps, heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = _heads_of_word(heads, width, HEADS, WIDTH)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    deviation = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    one, other = _pairs(x * deviation[:, None] * weight[None, :], HEADS, WIDTH)
    cosine, sine = _turn_of_word(turns_ptr, width, WIDTH)
    y = tl.interleave(one * cosine - other * sine, one * sine + other * cosine)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads"])
def _turned_grad(
    grad_ptr, x_ptr, result_ptr, weight_ptr, turns_ptr, eps, heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    at, inside = _heads_of_word(heads, width, HEADS, WIDTH)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    deviation = (1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps))[:, None]
    normalised = x * deviation
    one, other = _pairs(tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32), HEADS, WIDTH)
    cosine, sine = _turn_of_word(turns_ptr, width, WIDTH)
    back = tl.interleave(one * cosine + other * sine, other * cosine - one * sine) * weight[None, :]
    along = (tl.sum(back * normalised, 1) / width)[:, None]
    result = (back - normalised * along) * deviation
    tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate_ptr, hidden_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (gate * tl.sigmoid(gate) * hidden).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_grad(grad_ptr, gate_ptr, hidden_ptr, of_gate_ptr, of_hidden_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = grad * hidden * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(of_gate_ptr + at, of_gate.to(of_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(of_hidden_ptr + at, (grad * gate * sigmoid).to(of_hidden_ptr.dtype.element_ty), mask=inside)


def scaled(x: Tensor, weight: Tensor, eps: float, factor: Tensor | None, added: Tensor | None) -> Tensor:
    """Does what `rms_norm.reference_scaled` does."""
    rows, words, width = x.shape
    y = torch.empty_like(x)
    # What is not there is not read.
    _scaled[(rows * words,)](
        x, y, weight, x if factor is None else factor, x if added is None else added, eps, words, width,
        SCALED=factor is not None, ADDED=added is not None, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return y


def scaled_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, factor: Tensor | None) -> Tensor:
    """Does what `rms_norm.reference_scaled_grad` does."""
    rows, words, width = x.shape
    result = torch.empty_like(x)
    _scaled_grad[(rows * words,)](
        grad, x, result, weight, x if factor is None else factor, eps, words, width,
        SCALED=factor is not None, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return result


def turned(x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> Tensor:
    """Does what `rms_norm.reference_turned` does."""
    rows, words, heads, width = x.shape
    y = torch.empty_like(x)
    _turned[(rows * words,)](
        x, y, weight, turns, eps, heads, width,
        HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return y


def turned_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> Tensor:
    """Does what `rms_norm.reference_turned_grad` does."""
    rows, words, heads, width = x.shape
    result = torch.empty_like(x)
    _turned_grad[(rows * words,)](
        grad, x, result, weight, turns, eps, heads, width,
        HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return result


def gated(gate: Tensor, hidden: Tensor) -> Tensor:
    """Does what `rms_norm.reference_gated` does."""
    y = torch.empty_like(gate)
    _gated[(triton.cdiv(gate.numel(), _GATED),)](gate, hidden, y, gate.numel(), BLOCK=_GATED, num_warps=8)
    return y


def gated_grad(grad: Tensor, gate: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Does what `rms_norm.reference_gated_grad` does."""
    of_gate, of_hidden = torch.empty_like(gate), torch.empty_like(hidden)
    _gated_grad[(triton.cdiv(gate.numel(), _GATED),)](
        grad, gate, hidden, of_gate, of_hidden, gate.numel(), BLOCK=_GATED, num_warps=8,
    )  # fmt: skip
    return of_gate, of_hidden
