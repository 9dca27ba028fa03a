"""A UNet of diffusers that keeps its images in channels_last, forward and backward.

What would change the layout: torch's GroupNorm (see `group_norm`); a residual block before its shortcut, and a
transformer before its last projection or behind it, which make contiguous copies; and concatenations with skip
connections, whose gradients are slices.

What is computed stays the same. Images in another layout, as pipelines that draw may have them, are computed in theirs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth_sm.training.group_norm import group_norm


def keep_channels_last(denoiser: Any) -> None:
    """Makes a denoiser's residual blocks, transformers and last norm keep the layout; other kinds of blocks stay."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for module in denoiser.modules():
        if type(module) is ResnetBlock2D and _is_plain(module):
            module.forward = functools.partial(_residual_block, module)
        elif type(module) is Transformer2DModel and module.is_input_continuous:
            module.norm.forward = functools.partial(_norm, module.norm)
            module._get_output_for_continuous_inputs = functools.partial(_transformer_output, module)
    if type(getattr(denoiser, "conv_norm_out", None)) is nn.GroupNorm and type(denoiser.conv_act) is nn.SiLU:
        denoiser.conv_norm_out.forward = functools.partial(_norm, denoiser.conv_norm_out, silu=True)
        denoiser.conv_act = nn.Identity()


def _is_plain(block: Any) -> bool:
    return (
        type(block.norm1) is type(block.norm2) is nn.GroupNorm
        and type(block.nonlinearity) is nn.SiLU
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.upsample is block.downsample is None
        and block.output_scale_factor == 1
    )


def _norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool = False) -> Tensor:
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)


def _residual_block(block: Any, input_tensor: Tensor, temb: Tensor) -> Tensor:
    """Computes what a ResnetBlock2D does."""
    hidden = block.conv1(_norm(block.norm1, input_tensor, silu=True))
    if block.time_emb_proj is not None:
        hidden = hidden + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    hidden = block.conv2(block.dropout(_norm(block.norm2, hidden, silu=True)))
    shortcut = input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor)
    result: Tensor = _DenseGradient.apply(shortcut + hidden)
    return result


def _transformer_output(
    model: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
) -> Tensor:
    """Computes what a Transformer2DModel does with ``(n, h * w, channels)`` behind its blocks."""
    if model.use_linear_projection:
        hidden_states = model.proj_out(hidden_states)
    image = hidden_states.reshape(batch_size, height, width, -1).permute(0, 3, 1, 2)
    image = image.contiguous(memory_format=_layout(residual))
    if not model.use_linear_projection:
        image = model.proj_out(image)
    result: Tensor = _DenseGradient.apply(image + residual)
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
