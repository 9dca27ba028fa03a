"""A UNet of diffusers that keeps its images in channels_last, forward and backward.

What would change the layout: torch's GroupNorm (see `group_norm`); a residual block before its shortcut, and a
transformer before its last projection or behind it, which make contiguous copies; and concatenations with skip
connections, whose gradients are slices.

Fewer passes over images are made as well: the second norm of a residual block adds what comes before it (the first
convolution's bias and the embedding of the time step), and has its gradient without another pass; convolutions of
single pixels are matrix products, which add their bias. Convolutions that are not trained don't keep their images.

What is computed stays the same. Images in another layout, as pipelines that draw may have them, are computed in theirs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth_sm.training.group_norm import group_norm, serves
from dreambooth_sm.training.quantised import QuantisedConv2d, convolve_frozen, is_plain_convolution


def keep_channels_last(model: Any) -> None:
    """Makes residual blocks, transformers and last norms of a UNet or VAE keep the layout; other kinds of blocks stay.

    Args:
        model: what is not trained of it requires no gradients.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    for module in model.modules():
        if is_plain_convolution(module) and not module.weight.requires_grad:
            setattr(module, "forward", functools.partial(_frozen_convolution, module))  # noqa: B010 - typed otherwise
        elif type(module) is ResnetBlock2D and _is_plain(module):
            module.forward = functools.partial(_residual_block, module)
        elif type(module) is Upsample2D:
            module.forward = functools.partial(_upsample, module)
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            module.norm.forward = functools.partial(_norm, module.norm)
            module._operate_on_continuous_inputs = functools.partial(_transformer_input, module)
            module._get_output_for_continuous_inputs = functools.partial(_transformer_output, module)
        if type(getattr(module, "conv_norm_out", None)) is nn.GroupNorm and type(module.conv_act) is nn.SiLU:
            module.conv_norm_out.forward = functools.partial(_norm, module.conv_norm_out, silu=True)
            module.conv_act = nn.Identity()


def _is_plain(block: Any) -> bool:
    return (
        type(block.norm1) is type(block.norm2) is nn.GroupNorm
        and type(block.nonlinearity) is nn.SiLU
        and (block.time_embedding_norm == "default" or block.time_emb_proj is None)
        and not block.skip_time_act
        and block.upsample is block.downsample is None
        and block.output_scale_factor == 1
    )


def _norm(norm: nn.GroupNorm, x: Tensor, **more: Any) -> Tensor:
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **more)


def _residual_block(block: Any, input_tensor: Tensor, temb: Tensor) -> Tensor:
    """Computes what a ResnetBlock2D does."""
    hidden = _norm(block.norm1, input_tensor, silu=True)
    added: dict[str, Tensor] = {}
    is_told = block.time_emb_proj is not None
    if is_told:
        temb = block.time_emb_proj(block.nonlinearity(temb))
    if _is_fused(block.conv1, block.norm2, hidden):  # the norm adds the convolution's bias as well
        hidden = _without_bias(block.conv1, hidden)
        shift = temb if is_told else hidden.new_zeros(hidden.shape[:2])
        added = {"shift": shift, "offset": block.conv1.bias}
    else:
        hidden = block.conv1(hidden)
        if is_told:
            hidden = hidden + temb[:, :, None, None]
    hidden = block.conv2(block.dropout(_norm(block.norm2, hidden, silu=True, **added)))
    shortcut = input_tensor if block.conv_shortcut is None else _pointwise(block.conv_shortcut, input_tensor)
    result: Tensor = _DenseGradient.apply(shortcut + hidden)
    return result


def _is_fused(conv: Any, norm: nn.GroupNorm, image: Tensor) -> bool:
    """Whether a norm of the project's own follows on a plain convolution, and can add its bias."""
    is_plain = type(conv) in (nn.Conv2d, QuantisedConv2d) and conv.bias is not None
    return is_plain and serves(image, norm.num_groups, norm.weight, norm.bias)


def _without_bias(conv: Any, image: Tensor) -> Tensor:
    if conv.bias.requires_grad:
        result: Tensor = conv._conv_forward(image, conv.weight, None)
        return result
    return convolve_frozen(conv, image, None)


def _frozen_convolution(conv: Any, image: Tensor) -> Tensor:
    return convolve_frozen(conv, image, conv.bias)


def _pointwise(conv: Any, image: Tensor) -> Tensor:
    """A convolution of single pixels, as the matrix product that it is: which adds the bias on its way."""
    is_plain = type(conv) in (nn.Conv2d, QuantisedConv2d) and conv.kernel_size == (1, 1)
    if not is_plain or _layout(image) != torch.channels_last:
        result: Tensor = conv(image)
        return result
    pixels = image.permute(0, 2, 3, 1)
    rows = pixels.flatten(0, 2)
    whole = type(conv) is nn.Conv2d
    product = F.linear(rows, conv.weight.flatten(1), conv.bias) if whole else conv.product(rows)
    return product.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


def _transformer_input(model: Any, hidden_states: Tensor) -> tuple[Tensor, int]:
    """Computes what a Transformer2DModel does before its blocks: ``(n, h * w, channels)``, and the channels."""
    hidden_states = model.norm(hidden_states)
    if not model.use_linear_projection:
        hidden_states = _pointwise(model.proj_in, hidden_states)
    channels = hidden_states.shape[1]
    hidden_states = hidden_states.permute(0, 2, 3, 1).flatten(1, 2)
    if model.use_linear_projection:
        hidden_states = model.proj_in(hidden_states)
    return hidden_states, channels


def _transformer_output(
    model: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """Computes what a Transformer2DModel does with ``(n, h * w, channels)`` behind its blocks."""
    if model.use_linear_projection:
        hidden_states = model.proj_out(hidden_states)
    image = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
    image = image.contiguous(memory_format=_layout(residual))
    if not model.use_linear_projection:
        image = _pointwise(model.proj_out, image)
    result: Tensor = _DenseGradient.apply(image + residual)
    return result


def _upsample(layer: Any, image: Tensor, *rest: Any, **more: Any) -> Tensor:
    """Computes what an Upsample2D does. Of one picture, strides may leave the layout open, and torch chooses the other
    one."""
    if _layout(image) == torch.channels_last:
        pixels = image.permute(0, 2, 3, 1)
        image = pixels.flatten(0, 2).unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)
    result: Tensor = type(layer).forward(layer, image, *rest, **more)
    return result


def _layout(image: Tensor) -> torch.memory_format:
    dense = image.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if dense else torch.contiguous_format


class _DenseGradient(torch.autograd.Function):
    """Its input. The gradient, a slice where this was concatenated, is made dense once, not by each of its readers."""

    @staticmethod
    def forward(ctx: Any, image: Tensor) -> Tensor:
        ctx.layout = _layout(image)
        return image.view_as(image)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous(memory_format=ctx.layout)
