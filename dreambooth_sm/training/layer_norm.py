"""LayerNorm (Ba et al. 2016, "Layer Normalization") whose weights are not trained: its input gets a gradient alone.

torch's kernel takes 2.6 times as long as its bytes do, at the widths of UNets on an H200.

`reference_norm` and `reference_norm_grad` are the definition, in plain torch; `layer_norm_triton` is the same as
kernels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth_sm.training.kernels import kernels_for
from dreambooth_sm.training.modulation import input_grad

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Numbers that a kernel has room for.
_WIDEST = 4096
# By device.
_kernels = partial(kernels_for, "layer_norm_triton")


def norm_in_one_pass(model: nn.Module) -> None:
    """Makes LayerNorms compute by the kernels where these serve."""
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            setattr(module, "forward", partial(_norm, module))  # noqa: B010 - typed otherwise


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    if not _serves(norm, x):
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    result: Tensor = FrozenLayerNorm.apply(x.contiguous(), norm.weight, norm.bias, norm.eps)
    return result


def _serves(norm: nn.LayerNorm, x: Tensor) -> bool:
    """On CUDA (compute capability 7.5 or higher), over one dimension, where nothing is autocast or trained."""
    return (
        x.is_cuda
        and x.dtype in _TYPES
        and not torch.is_autocast_enabled("cuda")
        and len(norm.normalized_shape) == 1
        and x.shape[-1] <= _WIDEST
        and all(each is not None and not each.requires_grad for each in (norm.weight, norm.bias))
        and _kernels(x.device) is not None
    )


class FrozenLayerNorm(torch.autograd.Function):
    """Of ``(..., width)``, dense, with weight and bias ``(width,)``, to which it gives no gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        kernels = _kernels(x.device)
        return (kernels.norm if kernels else reference_norm)(x, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kernels = _kernels(x.device)
        compute = kernels.norm_grad if kernels else reference_norm_grad
        return compute(grads[0].contiguous(), x, weight, ctx.eps), None, None, None


def reference_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def reference_norm_grad(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return input_grad(grad.to(wide) * weight.to(wide), x, eps).to(x.dtype)
