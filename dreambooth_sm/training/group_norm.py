"""GroupNorm (Wu & He 2018, "Group Normalization"), and SiLU behind it, of images in channels_last.

torch's GroupNorm makes a contiguous copy of such an image on CUDA and answers in that layout, and the convolution
behind it copies back; so does the backward pass. Here images stay as they are. The norm's output before SiLU is not
kept: the backward pass computes it again, from the input and the groups' statistics.

`reference_forward` and `reference_backward` are the definition, in plain torch; `group_norm_triton` is the same as
kernels.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernels count elements in 32 bits, some beyond the last one.
_MOST_ELEMENTS = 2**31 - 2**20


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, silu: bool = False
) -> Tensor:
    """Computes ``silu(group_norm(x))``, or the norm alone.

    Statistics are fp32, and the result is rounded once. The kernels serve images in channels_last on CUDA (compute
    capability 7.5 or higher), where nothing is autocast; torch serves all else.

    Args:
        x: ``(n, channels, h, w)``, of any layout.
        groups: a divisor of the channels.
        weight, bias: ``(channels,)``; the kernels take those of x's type, or float32.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        ``(n, channels, h, w)``, in channels_last where x is.
    """
    if _kernels_serve(x, groups, weight, bias):
        result: Tensor = GroupNormFunction.apply(x, weight, bias, groups, eps, silu)
        return result
    result = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(result) if silu else result


class GroupNormFunction(torch.autograd.Function):
    """`group_norm` of images in channels_last: by the kernels on CUDA and in Triton's interpreter, by the reference
    elsewhere. Weight and bias need gradients both or neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        kernels = _kernels(x.device)
        compute = kernels.forward if kernels else reference_forward
        y, mean, rstd = compute(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        kernels = _kernels(x.device)
        compute = kernels.backward if kernels else reference_backward
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        of_affine = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        result = compute(grad, x, mean, rstd, weight, bias, ctx.silu, ctx.needs_input_grad[0], of_affine)
        return (*result, None, None, None)


def reference_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes y, and the groups' means and reciprocal deviations.

    Returns:
        ``(n, channels, h, w)`` as x; ``(n, groups)``, twice, float32, or float64 as x.
    """
    grouped = _wide(x).reshape(len(x), groups, -1)
    mean = grouped.mean(-1)
    rstd = (grouped.var(-1, correction=0) + eps).rsqrt()
    y = _normalised(x, mean, rstd) * _by_channel(weight) + _by_channel(bias)
    return _as_image(F.silu(y) if silu else y, x), mean, rstd


def reference_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    of_input: bool,
    of_affine: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of the input, the weight and the bias; those that are asked for.

    Args:
        grad: of y, ``(n, channels, h, w)`` in channels_last.
        x, weight, bias, silu: as in the forward pass.
        mean, rstd: from it.
        of_input: whether the input's is asked for.
        of_affine: whether the weight's and the bias's are.
    """
    grad, normalised = _wide(grad), _normalised(x, mean, rstd)
    if silu:
        u = normalised * _by_channel(weight) + _by_channel(bias)
        sigmoid = u.sigmoid()
        grad = grad * sigmoid * (1 + u * (1 - sigmoid))
    input_grad = weight_grad = bias_grad = None
    if of_affine:
        weight_grad = (grad * normalised).sum((0, 2, 3)).to(weight.dtype)
        bias_grad = grad.sum((0, 2, 3)).to(bias.dtype)
    if of_input:
        grad = grad * _by_channel(weight)
        grad_mean, product_mean = (
            _spread(values.reshape(*mean.shape, -1).mean(-1), x) for values in (grad, grad * normalised)
        )
        input_grad = _as_image((grad - grad_mean - normalised * product_mean) * _spread(rstd, x), x)
    return input_grad, weight_grad, bias_grad


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_channel(values: Tensor) -> Tensor:
    return _wide(values)[:, None, None]


def _spread(of_groups: Tensor, x: Tensor) -> Tensor:
    """Values of groups, ``(n, groups)``, for each channel: ``(n, channels, 1, 1)``."""
    return of_groups.repeat_interleave(x.shape[1] // of_groups.shape[1], dim=1)[:, :, None, None]


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (_wide(x) - _spread(mean, x)) * _spread(rstd, x)


def _as_image(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype, memory_format=torch.channels_last)


def _kernels_serve(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> bool:
    if not x.is_cuda or torch.is_autocast_enabled("cuda"):  # autocast norms in fp32
        return False
    kernels = _kernels(x.device)
    return (
        kernels is not None
        and x.dtype in _TYPES
        and {weight.dtype, bias.dtype} <= {x.dtype, torch.float32}
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] // groups <= kernels.WIDEST_GROUP
        and 0 < x.numel() < _MOST_ELEMENTS
    )


@cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The module of Triton kernels, or None where they don't run."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
        return None
    try:
        from dreambooth_sm.training import group_norm_triton as kernels
        from dreambooth_sm.training.adamw_blockwise_triton import INTERPRETED
    except ImportError:
        return None
    return kernels if device.type == "cuda" or INTERPRETED else None
