"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization") with what transformers compute beside it, and
SwiGLU (Shazeer 2020), each in one pass over its input.

Operation by operation, a block's norms, modulations, rotations and gates take longer than its matrix products, and
each keeps what it was given. Here each keeps its input alone, which the backward pass normalises again. Weights,
factors and angles get no gradients: adapters train none of them.

The ``reference_`` functions are the definition, in plain torch; `rms_norm_triton` is the same as kernels.
"""

from __future__ import annotations

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
    result: Tensor = _TurnedNorm.apply(x.contiguous(), weight, eps, torch.view_as_real(turns).contiguous())
    return result


def swiglu(gate: Tensor, hidden: Tensor) -> Tensor:
    """``silu(gate) * hidden`` of two tensors of one shape."""
    result: Tensor = _SwiGLU.apply(gate.contiguous(), hidden.contiguous())
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


class _TurnedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> Tensor:
        kernels = _kernels(x.device)
        ctx.save_for_backward(x, weight, turns)
        ctx.eps = eps
        return (kernels.turned if kernels else reference_turned)(x, weight, eps, turns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turns = ctx.saved_tensors
        kernels = _kernels(x.device)
        compute = kernels.turned_grad if kernels else reference_turned_grad
        return compute(grads[0].contiguous(), x, weight, ctx.eps, turns), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, hidden: Tensor) -> Tensor:
        kernels = _kernels(gate.device)
        ctx.save_for_backward(gate, hidden)
        return (kernels.gated if kernels else reference_gated)(gate, hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, hidden = ctx.saved_tensors
        kernels = _kernels(gate.device)
        result: tuple[Tensor, Tensor] = (kernels.gated_grad if kernels else reference_gated_grad)(
            grads[0].contiguous(), gate, hidden
        )
        return result


def reference_scaled(x: Tensor, weight: Tensor, eps: float, factor: Tensor | None, added: Tensor | None) -> Tensor:
    result = _normalised(x, eps) * _factor(weight, factor)
    return (result if added is None else result + _wide(added)).to(x.dtype)


def reference_scaled_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, factor: Tensor | None) -> Tensor:
    return _norm_grad(_wide(grad) * _factor(weight, factor), x, eps)


def reference_turned(x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> Tensor:
    return _turned(_normalised(x, eps) * _wide(weight), turns).to(x.dtype)


def reference_turned_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float, turns: Tensor) -> Tensor:
    back = turns * turns.new_tensor([1.0, -1.0])
    return _norm_grad(_turned(_wide(grad), back) * _wide(weight), x, eps)


def reference_gated(gate: Tensor, hidden: Tensor) -> Tensor:
    return (torch.nn.functional.silu(_wide(gate)) * _wide(hidden)).to(gate.dtype)


def reference_gated_grad(grad: Tensor, gate: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    wide, sigmoid = _wide(gate), _wide(gate).sigmoid()
    of_gate = _wide(grad) * _wide(hidden) * sigmoid * (1 + wide * (1 - sigmoid))
    return of_gate.to(gate.dtype), (_wide(grad) * wide * sigmoid).to(hidden.dtype)


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
