"""GroupNorm (Wu & He 2018, "Group Normalization"), and SiLU behind it, of images in channels_last.

torch's GroupNorm makes a contiguous copy of such an image on CUDA and answers in that layout, and the convolution
behind it copies back; so does the backward pass. Here images stay as they are. The norm's output before SiLU is not
kept: the backward pass computes it again, from the input and the groups' statistics.

`reference_forward` and `reference_backward` are the definition, in plain torch; `group_norm_triton` is the same as
kernels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.training.kernels import kernels_for

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# The kernels count elements in 32 bits, some beyond the last one.
_MOST_ELEMENTS = 2**31 - 2**20
# By device.
_kernels = partial(kernels_for, "group_norm_triton")


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Computes ``silu(group_norm(x + shift + offset))``, or the norm alone.

    Statistics and sums are fp32, and the result is rounded once. The kernels serve where `serves` says so, torch
    elsewhere.

    Args:
        x: ``(n, channels, h, w)``, of any layout.
        groups: a divisor of the channels.
        weight, bias: ``(channels,)``.
        eps: added to the variance.
        silu: whether SiLU follows.
        shift, offset: ``(n, channels)`` and ``(channels,)``, added before the norm; both or neither.

    Returns:
        ``(n, channels, h, w)``, in channels_last where x is.
    """
    if serves(x, groups, weight, bias):
        shift = shift if shift is None else shift.contiguous()
        result: Tensor = GroupNormFunction.apply(x, weight, bias, shift, offset, groups, eps, silu)
        return result
    if shift is not None and offset is not None:
        x = x + offset[:, None, None] + shift[:, :, None, None]
    result = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(result) if silu else result


def serves(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernels compute the norm of an image: in channels_last on CUDA (compute capability 7.5 or higher),
    with weights of its type or float32, where nothing is autocast."""
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


class GroupNormFunction(torch.autograd.Function):
    """`group_norm` of images in channels_last: by the kernels on CUDA and in Triton's interpreter, by the reference
    elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        offset: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        kernels = _kernels(x.device)
        compute = kernels.forward if kernels else reference_forward
        y, mean, rstd = compute(x, weight, bias, shift, offset, groups, eps, silu)
        ctx.save_for_backward(x, mean, rstd, weight, bias, shift, offset)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, shift, offset = ctx.saved_tensors
        kernels = _kernels(x.device)
        compute = kernels.backward if kernels else reference_backward
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        _, of_weight, of_bias, of_shift, of_offset = ctx.needs_input_grad[:5]
        for_x, for_weight, for_bias, added = compute(
            grad, x, mean, rstd, weight, bias, shift, offset, ctx.silu, of_weight or of_bias, of_shift or of_offset
        )
        for_shift = added.to(shift.dtype) if added is not None and of_shift else None
        for_offset = added.sum(0).to(offset.dtype) if added is not None and of_offset else None
        return for_x, for_weight, for_bias, for_shift, for_offset, None, None, None


def reference_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    offset: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes y, and the groups' means and reciprocal deviations.

    Returns:
        ``(n, channels, h, w)`` as x; ``(n, groups)``, twice, float32, or float64 as x.
    """
    shifted = _shifted(x, shift, offset)
    grouped = shifted.reshape(len(x), groups, -1)
    mean = grouped.mean(-1)
    rstd = (grouped.var(-1, correction=0) + eps).rsqrt()
    y = (shifted - _spread(mean, x)) * _spread(rstd, x) * _by_channel(weight) + _by_channel(bias)
    return _as_image(F.silu(y) if silu else y, x), mean, rstd


def reference_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    offset: Tensor | None,
    silu: bool,
    of_affine: bool,
    of_added: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients of the input, of weight and bias, and of what was added to each channel of each image.

    Args:
        grad: of y, ``(n, channels, h, w)`` in channels_last.
        x, weight, bias, shift, offset, silu: as in the forward pass.
        mean, rstd: from it.
        of_affine: whether the weight's and the bias's are asked for.
        of_added: whether the last, ``(n, channels)`` and not of a smaller type than float32, is.
    """
    grad = _wide(grad)
    normalised = (_shifted(x, shift, offset) - _spread(mean, x)) * _spread(rstd, x)
    if silu:
        u = normalised * _by_channel(weight) + _by_channel(bias)
        sigmoid = u.sigmoid()
        grad = grad * sigmoid * (1 + u * (1 - sigmoid))
    weight_grad = bias_grad = None
    if of_affine:
        weight_grad = (grad * normalised).sum((0, 2, 3)).to(weight.dtype)
        bias_grad = grad.sum((0, 2, 3)).to(bias.dtype)
    grad = grad * _by_channel(weight)
    grad_mean, product_mean = (
        _spread(values.reshape(*mean.shape, -1).mean(-1), x) for values in (grad, grad * normalised)
    )
    exact = (grad - grad_mean - normalised * product_mean) * _spread(rstd, x)
    return _as_image(exact, x), weight_grad, bias_grad, exact.sum((2, 3)) if of_added else None


def _shifted(x: Tensor, shift: Tensor | None, offset: Tensor | None) -> Tensor:
    if shift is None or offset is None:
        return _wide(x)
    return _wide(x) + (_wide(shift) + _wide(offset))[:, :, None, None]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_channel(values: Tensor) -> Tensor:
    return _wide(values)[:, None, None]


def _spread(of_groups: Tensor, x: Tensor) -> Tensor:
    """Values of groups, ``(n, groups)``, for each channel: ``(n, channels, 1, 1)``."""
    return of_groups.repeat_interleave(x.shape[1] // of_groups.shape[1], dim=1)[:, :, None, None]


def _as_image(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype, memory_format=torch.channels_last)
