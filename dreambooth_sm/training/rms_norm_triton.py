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
def _place(words, row_step, word_step):
    """Where this program's word starts, in a tensor that is so far from row to row and from word to word."""
    place = tl.program_id(0).to(tl.int64)
    return place // words * row_step + place % words * word_step


@triton.jit
def _heads_of_word(heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of a word's numbers from its first, ``(HEADS, WIDTH)``, and which of them are there."""
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    return head * width + column, (head < heads) & (column < width)


@triton.jit
def _pairs(x, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The first and the second numbers of neighbours, each ``(HEADS, WIDTH / 2)``. They are read as they lie, and
    parted in registers: reading every other number takes many times as long."""
    return tl.split(tl.reshape(x, [HEADS, WIDTH // 2, 2]))


@triton.jit
def _turn_of_word(turns_ptr, width, WIDTH: tl.constexpr):
    """Cosines and sines of a word's pairs, each ``(1, WIDTH / 2)``."""
    column = tl.arange(0, WIDTH)[None, :]
    turn = tl.load(turns_ptr + column, mask=column < width, other=0.0)
    return _pairs(turn.to(tl.float32), 1, WIDTH)


@triton.jit(do_not_specialize=["heads", "words"])
def _turned(
    x_ptr,
    y_ptr,
    weight_ptr,
    turns_ptr,
    eps,
    words,
    heads,
    width,
    x_row,
    x_word,
    y_row,
    y_word,
    turns_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    at, inside = _heads_of_word(heads, width, HEADS, WIDTH)
    x = tl.load(x_ptr + _place(words, x_row, x_word) + at, mask=inside, other=0.0).to(tl.float32)
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    deviation = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    one, other = _pairs(x * deviation[:, None] * weight[None, :], HEADS, WIDTH)
    cosine, sine = _turn_of_word(turns_ptr + _place(words, turns_row, width), width, WIDTH)
    y = tl.interleave(one * cosine - other * sine, one * sine + other * cosine)
    tl.store(y_ptr + _place(words, y_row, y_word) + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "words"])
def _turned_grad(
    grad_ptr,
    x_ptr,
    result_ptr,
    weight_ptr,
    turns_ptr,
    eps,
    words,
    heads,
    width,
    grad_row,
    grad_word,
    x_row,
    x_word,
    result_row,
    result_word,
    turns_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    at, inside = _heads_of_word(heads, width, HEADS, WIDTH)
    x = tl.load(x_ptr + _place(words, x_row, x_word) + at, mask=inside, other=0.0).to(tl.float32)
    column = tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    deviation = (1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps))[:, None]
    normalised = x * deviation
    grad = tl.load(grad_ptr + _place(words, grad_row, grad_word) + at, mask=inside, other=0.0).to(tl.float32)
    one, other = _pairs(grad, HEADS, WIDTH)
    cosine, sine = _turn_of_word(turns_ptr + _place(words, turns_row, width), width, WIDTH)
    back = tl.interleave(one * cosine + other * sine, other * cosine - one * sine) * weight[None, :]
    along = (tl.sum(back * normalised, 1) / width)[:, None]
    result = (back - normalised * along) * deviation
    first = result_ptr + _place(words, result_row, result_word)
    tl.store(first + at, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate_ptr, hidden_ptr, y_ptr, width, gate_word, hidden_word, y_word, BLOCK: tl.constexpr):
    word = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + word * gate_word + column, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(hidden_ptr + word * hidden_word + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * hidden
    tl.store(y_ptr + word * y_word + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_grad(
    grad_ptr,
    gate_ptr,
    hidden_ptr,
    for_gate_ptr,
    for_hidden_ptr,
    width,
    grad_word,
    gate_word,
    hidden_word,
    for_gate_word,
    for_hidden_word,
    BLOCK: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + word * grad_word + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + word * gate_word + column, mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(hidden_ptr + word * hidden_word + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    for_gate = (grad * hidden * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(for_gate_ptr.dtype.element_ty)
    for_hidden = (grad * gate * sigmoid).to(for_hidden_ptr.dtype.element_ty)
    tl.store(for_gate_ptr + word * for_gate_word + column, for_gate, mask=inside)
    tl.store(for_hidden_ptr + word * for_hidden_word + column, for_hidden, mask=inside)


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


def turned(x: Tensor, weight: Tensor, eps: float, turns: Tensor, result: Tensor) -> None:
    """Does what `rms_norm.reference_turned` does."""
    rows, words, heads, width = x.shape
    _turned[(rows * words,)](
        x, result, weight, turns, eps, words, heads, width, *x.stride()[:2], *result.stride()[:2], turns.stride(0),
        HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


def turned_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, turns: Tensor, result: Tensor) -> None:
    """Does what `rms_norm.reference_turned_grad` does."""
    rows, words, heads, width = x.shape
    _turned_grad[(rows * words,)](
        grad, x, result, weight, turns, eps, words, heads, width,
        *grad.stride()[:2], *x.stride()[:2], *result.stride()[:2], turns.stride(0),
        HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


def gated(gate: Tensor, hidden: Tensor, result: Tensor) -> None:
    """Does what `rms_norm.reference_gated` does."""
    tensors = gate, hidden, result
    _gated[_grid(gate)](*tensors, gate.shape[-1], *map(_step, tensors), BLOCK=_GATED, num_warps=8)


def gated_grad(grad: Tensor, gate: Tensor, hidden: Tensor, for_gate: Tensor, for_hidden: Tensor) -> None:
    """Does what `rms_norm.reference_gated_grad` does."""
    tensors = grad, gate, hidden, for_gate, for_hidden
    _gated_grad[_grid(gate)](*tensors, gate.shape[-1], *map(_step, tensors), BLOCK=_GATED, num_warps=8)


def _grid(x: Tensor) -> tuple[int, int]:
    """A program for each word, and each block of its width."""
    return x.shape[:-1].numel(), triton.cdiv(x.shape[-1], _GATED)


def _step(x: Tensor) -> int:
    """How far words are from each other, of all rows; where rows have one word, its own stride says nothing."""
    return x.flatten(0, -2).stride(0)
