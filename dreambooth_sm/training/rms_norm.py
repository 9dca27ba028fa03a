"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization") with what transformers compute beside it, and
SwiGLU (Shazeer 2020), each in one pass over its input.

Operation by operation, a block's norms, modulations, rotations and gates take longer than its matrix products, and
each keeps what it was given. Here each keeps its input alone, which the backward pass normalises again. Weights,
factors and angles get no gradients: adapters train none of them.

The ``reference_`` functions are the definition, in plain torch; `rms_norm_triton` is the same as kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.training.kernels import kernels_for

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# By device.
_kernels = partial(kernels_for, "rms_norm_triton")


def scaled_norm(
    x: Tensor, weight: Tensor, eps: float, factor: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """Computes ``added + factor * weight * x / rms(x)``, rounded once.

    Args:
        x: ``(rows, words, width)``.
        weight: ``(width,)``.
        eps: added to the mean square.
        factor: ``(rows, width)``; None: 1.
        added: as x; None: 0.

    Returns:
        As x.
    """
    result: Tensor = _ScaledNorm.apply(x.contiguous(), weight, eps, factor, added)
    return result


def turned_norm(x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> Tensor:
    """Normalises each head, and turns its pairs of neighbours as rotary embeddings do (Su et al. 2021, "RoFormer").

    Args:
        x: ``(rows, words, heads, width)``.
        weight: ``(width,)``.
        eps: added to the mean square.
        turns: by what pairs are multiplied, complex ``(rows, words, width / 2)``.

    Returns:
        As x.
    """
    return turned_norms([(x, weight)], eps, turns)


def turned_norms(parts: Sequence[tuple[Tensor, Tensor]], eps: float, turns: Tensor) -> Tensor:
    """As `turned_norm`, of sequences with weights of their own, which are put one behind the other.

    Args:
        parts: x and weight of each sequence.
        eps: added to the mean square.
        turns: of all words of all sequences.

    Returns:
        ``(rows, words of all, heads, width)``.
    """
    flat = [tensor for x, weight in parts for tensor in (x.contiguous(), weight)]
    result: Tensor = _TurnedNorms.apply(eps, numbers_of(turns), *flat)
    return result


def numbers_of(turns: Tensor) -> Tensor:
    """Complex numbers ``(rows, words, pairs)`` as `turn` takes them, ``(rows, words, pairs, 2)``."""
    numbers = torch.view_as_real(turns)
    return numbers if numbers[0].is_contiguous() else numbers.contiguous()


def swiglu(gate: Tensor, hidden: Tensor) -> Tensor:
    """``silu(gate) * hidden`` of two tensors of one shape."""
    result: Tensor = _SwiGLU.apply(gate.contiguous(), hidden.contiguous())
    return result


def swiglu_of_halves(projected: Tensor) -> Tensor:
    """`swiglu` of the halves of ``(rows, words, 2 * width)``, the gate first."""
    result: Tensor = _SwiGLUOfHalves.apply(projected.contiguous())
    return result


def norms_serve(x: Tensor, *frozen: Tensor) -> bool:
    """Whether the kernels compute the norms of a block: on CUDA (compute capability 7.5 or higher), where nothing is
    autocast, and none of ``frozen`` gets gradients."""
    return (
        x.is_cuda
        and x.dtype in _TYPES
        and not torch.is_autocast_enabled("cuda")
        and not any(each.requires_grad for each in frozen)
        and _kernels(x.device) is not None
    )


class _ScaledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, factor: Tensor | None, added: Tensor | None) -> Tensor:
        kernels = _kernels(x.device)
        ctx.save_for_backward(x, weight, factor)
        ctx.eps = eps
        factor = factor if factor is None else factor.contiguous()
        added = added if added is None else added.contiguous()
        return (kernels.scaled if kernels else reference_scaled)(x, weight, eps, factor, added)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        kernels = _kernels(x.device)
        compute = kernels.scaled_grad if kernels else reference_scaled_grad
        for_x = compute(grads[0].contiguous(), x, weight, ctx.eps, factor)
        return for_x, None, None, None, grads[0] if ctx.needs_input_grad[4] else None


class _TurnedNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, turns: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(turns, *parts)
        ctx.eps = eps
        xs = parts[::2]
        words = [x.shape[1] for x in xs]
        result = xs[0].new_empty(len(xs[0]), sum(words), *xs[0].shape[2:])
        by_part = zip(xs, parts[1::2], turns.split(words, 1), result.split(words, 1), strict=True)
        for x, weight, own, of_part in by_part:
            turn(x, weight, eps, own, of_part)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        turns, *parts = ctx.saved_tensors
        xs = parts[::2]
        words = [x.shape[1] for x in xs]
        by_part = zip(xs, parts[1::2], turns.split(words, 1), grads[0].split(words, 1), strict=True)
        results: list[Tensor | None] = [None, None]
        for x, weight, own, grad in by_part:
            for_x = torch.empty_like(x)
            turn_grad(grad, x, weight, ctx.eps, own, for_x)
            results += [for_x, None]
        return tuple(results)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(gate, hidden)
        result = torch.empty_like(gate)
        gated(gate, hidden, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, hidden = ctx.saved_tensors
        for_gate, for_hidden = torch.empty_like(gate), torch.empty_like(hidden)
        gated_grad(grads[0], gate, hidden, for_gate, for_hidden)
        return for_gate, for_hidden


class _SwiGLUOfHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        gate, hidden = projected.chunk(2, dim=-1)
        result = gate.new_empty(gate.shape)
        gated(gate, hidden, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        result = torch.empty_like(projected)
        gated_grad(grads[0], *projected.chunk(2, dim=-1), *result.chunk(2, dim=-1))
        return result


def turn(x: Tensor, weight: Tensor, eps: float, turns: Tensor, result: Tensor) -> None:
    """What `turned_norm` computes, put into ``result``.

    Args:
        x, result: ``(rows, words, heads, width)``, the heads of a word side by side.
        weight: ``(width,)``.
        eps: added to the mean square.
        turns: ``(rows, words, width / 2, 2)``.
    """
    kernels = _kernels(x.device)
    (kernels.turned if kernels else reference_turned)(x, weight, eps, turns, result)


def turn_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, turns: Tensor, result: Tensor) -> None:
    """Puts the gradient of `turn`'s x into ``result``, which may be x."""
    kernels = _kernels(x.device)
    grad = grad if grad[0, 0].is_contiguous() else grad.contiguous()
    (kernels.turned_grad if kernels else reference_turned_grad)(grad, x, weight, eps, turns, result)


def gated(gate: Tensor, hidden: Tensor, result: Tensor) -> None:
    """Puts ``silu(gate) * hidden`` into ``result``, each ``(rows, words, width)``, evenly far from word to word."""
    kernels = _kernels(gate.device)
    (kernels.gated if kernels else reference_gated)(gate, hidden, result)


def gated_grad(grad: Tensor, gate: Tensor, hidden: Tensor, for_gate: Tensor, for_hidden: Tensor) -> None:
    """Puts the gradients of `gated`'s gate and hidden into the last two, which may be these."""
    kernels = _kernels(gate.device)
    flat = grad.flatten(0, -2)
    even = (flat if flat.stride(-1) == 1 else flat.contiguous()).view(grad.shape)
    (kernels.gated_grad if kernels else reference_gated_grad)(even, gate, hidden, for_gate, for_hidden)


def reference_scaled(x: Tensor, weight: Tensor, eps: float, factor: Tensor | None, added: Tensor | None) -> Tensor:
    result = _normalised(x, eps) * _factor(weight, factor)
    return (result if added is None else result + _wide(added)).to(x.dtype)


def reference_scaled_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, factor: Tensor | None) -> Tensor:
    return _norm_grad(_wide(grad) * _factor(weight, factor), x, eps)


def reference_turned(x: Tensor, weight: Tensor, eps: float, turns: Tensor, result: Tensor) -> None:
    result.copy_(_turned(_normalised(x, eps) * _wide(weight), turns))


def reference_turned_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, turns: Tensor, result: Tensor) -> None:
    back = turns * turns.new_tensor([1.0, -1.0])
    result.copy_(_norm_grad(_turned(_wide(grad), back) * _wide(weight), x, eps))


def reference_gated(gate: Tensor, hidden: Tensor, result: Tensor) -> None:
    result.copy_(torch.nn.functional.silu(_wide(gate)) * _wide(hidden))


def reference_gated_grad(grad: Tensor, gate: Tensor, hidden: Tensor, for_gate: Tensor, for_hidden: Tensor) -> None:
    wide, sigmoid = _wide(gate), _wide(gate).sigmoid()
    of_gate = _wide(grad) * _wide(hidden) * sigmoid * (1 + wide * (1 - sigmoid))
    for_hidden.copy_(_wide(grad) * wide * sigmoid)
    for_gate.copy_(of_gate)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _deviation(x: Tensor, eps: float) -> Tensor:
    """1 / rms of the last dimension."""
    return (_wide(x).square().mean(-1, keepdim=True) + eps).rsqrt()


def _normalised(x: Tensor, eps: float) -> Tensor:
    return _wide(x) * _deviation(x, eps)


def _norm_grad(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """The gradient of x, from that of what was normalised."""
    normalised = _normalised(x, eps)
    along = (grad * normalised).mean(-1, keepdim=True)
    return ((grad - normalised * along) * _deviation(x, eps)).to(x.dtype)


def _factor(weight: Tensor, factor: Tensor | None) -> Tensor:
    return _wide(weight) if factor is None else _wide(weight) * _wide(factor)[:, None]


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs ``(..., words, heads, width)`` times numbers ``(rows, words, width / 2, 2)``."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    numbers = torch.view_as_complex(turns.to(x.dtype).contiguous())
    return torch.view_as_real(pairs * numbers.unsqueeze(2)).flatten(-2)
