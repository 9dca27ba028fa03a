"""What transformers do that are told the time by modulation (Peebles & Xie 2022, "Scalable Diffusion Models with
Transformers"): norms without weights whose result is scaled and shifted, and sums whose second number has a gate.

Each is one pass over the activations, and keeps its input alone. Scales, shifts and gates get no gradients: adapters
train none of what they are made by.

The ``reference_`` functions are the definition, in plain torch; `modulation_triton` is the same as kernels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.training.kernels import kernels_for

# By device.
_kernels = partial(kernels_for, "modulation_triton")


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes ``(1 + scale) * (x - mean(x)) / deviation(x) + shift``, rounded once.

    Args:
        x: ``(rows, words, width)``.
        scale, shift: ``(rows, width)``.
        eps: added to the variance.

    Returns:
        That, and x, for what is added to it later: the gradients of both meet in one pass.
    """
    result: tuple[Tensor, Tensor] = _ModulatedNorm.apply(x.contiguous(), scale.contiguous(), shift.contiguous(), eps)
    return result


def gated_sum(x: Tensor, gate: Tensor, added: Tensor) -> Tensor:
    """Computes ``x + gate * added``, rounded once.

    Args:
        x, added: ``(rows, words, width)``.
        gate: ``(rows, width)``.
    """
    result: Tensor = _GatedSum.apply(x.contiguous(), gate.contiguous(), added.contiguous())
    return result


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        kernels = _kernels(x.device)
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return (kernels.modulated if kernels else reference_modulated)(x, scale, shift, eps), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        for_result, for_x = (grad if grad is None else grad.contiguous() for grad in grads)
        if for_result is not None:
            kernels = _kernels(x.device)
            compute = kernels.modulated_grad if kernels else reference_modulated_grad
            for_x = compute(for_result, for_x, x, scale, ctx.eps)
        return for_x, None, None, None


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, added: Tensor) -> Tensor:
        kernels = _kernels(x.device)
        ctx.save_for_backward(gate)
        return (kernels.gated_sum if kernels else reference_gated_sum)(x, gate, added)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate,) = ctx.saved_tensors
        for_added = None
        if ctx.needs_input_grad[2]:
            kernels = _kernels(gate.device)
            compute = kernels.gated_sum if kernels else reference_gated_sum
            for_added = compute(None, gate, grads[0].contiguous())
        return grads[0], None, for_added


def reference_modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    y, _ = normalised(x, eps)
    return (y * (1 + _wide(scale)[:, None]) + _wide(shift)[:, None]).to(x.dtype)


def reference_modulated_grad(grad: Tensor, for_x: Tensor | None, x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The gradient of x, from that of the result and, where there is one, that of what x was given back as."""
    result = input_grad(_wide(grad) * (1 + _wide(scale)[:, None]), x, eps)
    return (result if for_x is None else result + _wide(for_x)).to(x.dtype)


def reference_gated_sum(x: Tensor | None, gate: Tensor, added: Tensor) -> Tensor:
    result = _wide(gate)[:, None] * _wide(added)
    return (result if x is None else _wide(x) + result).to(added.dtype)


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(x - mean(x)) / deviation(x)`` of the last dimension, at least in float32, and 1 / deviation."""
    centred = _wide(x) - _wide(x).mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * deviation, deviation


def input_grad(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """The gradient of x, from that of what it was normalised to."""
    y, deviation = normalised(x, eps)
    along = (grad * y).mean(-1, keepdim=True)
    return (grad - grad.mean(-1, keepdim=True) - y * along) * deviation


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
