"""GEGLU (Shazeer 2020, "GLU Variants Improve Transformer"): ``hidden * gelu(gate)`` of the halves of one tensor.

It keeps nothing but its input, and takes one pass over it: torch's kernels, one for each operation, are slow with
halves, which don't lie densely.

`reference_gate` and `reference_gate_grad` are the definition, in plain torch; `geglu_triton` is the same as kernels,
which round once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.training.kernels import kernels_for

# By device.
_kernels = partial(kernels_for, "geglu_triton")


def gate(projected: Tensor) -> Tensor:
    """Computes ``hidden * gelu(gate)``, with the exact GELU.

    Args:
        projected: ``(..., 2 * width)``, the gate last.

    Returns:
        ``(..., width)``.
    """
    result: Tensor = _Gate.apply(projected)
    return result


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        projected = projected.contiguous()
        ctx.save_for_backward(projected)
        kernels = _kernels(projected.device)
        return (kernels.gate if kernels else reference_gate)(projected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        kernels = _kernels(projected.device)
        result: Tensor = (kernels.gate_grad if kernels else reference_gate_grad)(grads[0].contiguous(), projected)
        return result


def reference_gate(projected: Tensor) -> Tensor:
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def reference_gate_grad(grad: Tensor, projected: Tensor) -> Tensor:
    hidden, gate = projected.chunk(2, dim=-1)
    result = torch.empty_like(projected)
    for_hidden, for_gate = result.chunk(2, dim=-1)
    torch.mul(grad, F.gelu(gate), out=for_hidden)
    torch.ops.aten.gelu_backward.grad_input(grad * hidden, gate, grad_input=for_gate)
    return result
