"""Recomputation, in the backward pass, of what is not kept.

:func:`recompute_gates` is for every plan: the gated activations of the feed-forward layers are cheap to compute, and
keeping them takes 180 MB at 512 pixels and two samples.

:func:`checkpoint_activations` is gradient checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
Cost"), in larger units than diffusers' own. diffusers checkpoints each residual block and each transformer block by
itself: what lies between them stays in memory (norms, projections, and the up blocks' concatenations with the skip
connections), about 300 MB at 512 pixels and two samples. Here the unit is a residual block with its attention, the
concatenation included: only tensors that the UNet keeps for its skip connections anyway are stored, and as much is
recomputed. Where many transformer blocks follow on a residual block, each of them is a unit of its own: together, their
activations would be the peak.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dreambooth_sm.training.geglu import gate

# Transformer blocks that are recomputed together with the residual block before them, at most.
_BLOCKS_OF_A_UNIT = 2


def recompute_gates(unet: torch.nn.Module) -> None:
    """Makes the UNet's GEGLU layers keep only their input."""
    from diffusers.models.activations import GEGLU

    def forward(layer: GEGLU, hidden_states: Tensor) -> Tensor:
        return gate(layer.proj(hidden_states))

    for module in unet.modules():
        if type(module) is GEGLU:
            module.forward = functools.partial(forward, module)


def checkpoint_activations(module: Any) -> None:
    """Makes a denoiser or text encoder recompute its activations in the backward pass: transformers block by block.

    Random states are not kept: there is no dropout, and CUDA graphs bar them.
    """
    if hasattr(module, "gradient_checkpointing_enable"):  # of transformers
        module.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        return
    if hasattr(
        module, "enable_gradient_checkpointing"
    ):  # of diffusers: transformers, and kinds of blocks not known here
        module.enable_gradient_checkpointing(recomputed)
    if not hasattr(module, "up_blocks"):
        module.gradient_checkpointing = True  # the family's predict may read it
        return
    for block in (*module.down_blocks, *module.up_blocks):
        forward = _FORWARDS.get(type(block).__name__)
        if forward is not None:
            block.forward = functools.partial(forward, block)


def repeated_blocks(module: Any) -> list[Any]:
    """The blocks that a module of diffusers is made of, as it names their classes."""
    names = getattr(module, "_repeated_blocks", None) or ()
    return [block for block in module.modules() if type(block).__name__ in names]


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Calls a function, whose activations are recomputed in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _unit(resnet: Any, attention: Any, hidden: Tensor, skip: Tensor | None, temb: Tensor, prompts: Tensor) -> Tensor:
    if skip is not None:
        hidden = torch.cat([hidden, skip], dim=1)
    hidden = resnet(hidden, temb)
    if attention is None:
        return hidden
    return attention(hidden, encoder_hidden_states=prompts, return_dict=False)[0]


def _recomputed_unit(
    resnet: Any, attention: Any, hidden: Tensor, skip: Tensor | None, temb: Tensor, prompts: Tensor
) -> Tensor:
    if attention is None or len(attention.transformer_blocks) <= _BLOCKS_OF_A_UNIT:
        if attention is not None:
            attention.gradient_checkpointing = False  # the unit around it is
        result: Tensor = recomputed(_unit, resnet, attention, hidden, skip, temb, prompts)
        return result
    hidden = recomputed(_unit, resnet, None, hidden, skip, temb, prompts)
    result = attention(hidden, encoder_hidden_states=prompts, return_dict=False)[0]  # checkpoints each of its blocks
    return result


def _attentions(block: Any) -> list[Any]:
    return list(getattr(block, "attentions", None) or [None] * len(block.resnets))


def _down(
    block: Any, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Any = None, **_: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Computes what a (CrossAttn)DownBlock2D does."""
    outputs: list[Tensor] = []
    for resnet, attention in zip(block.resnets, _attentions(block), strict=True):
        hidden_states = _recomputed_unit(resnet, attention, hidden_states, None, temb, encoder_hidden_states)
        outputs.append(hidden_states)
    for downsampler in block.downsamplers or ():
        hidden_states = downsampler(hidden_states)
        outputs.append(hidden_states)
    return hidden_states, tuple(outputs)


def _up(
    block: Any,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor,
    encoder_hidden_states: Any = None,
    upsample_size: int | None = None,
    **_: Any,
) -> Tensor:
    """Computes what a (CrossAttn)UpBlock2D does."""
    skips = reversed(res_hidden_states_tuple)
    for resnet, attention, skip in zip(block.resnets, _attentions(block), skips, strict=True):
        hidden_states = _recomputed_unit(resnet, attention, hidden_states, skip, temb, encoder_hidden_states)
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states, upsample_size)
    return hidden_states


_FORWARDS: dict[str, Callable[..., Any]] = {
    "DownBlock2D": _down,
    "CrossAttnDownBlock2D": _down,
    "UpBlock2D": _up,
    "CrossAttnUpBlock2D": _up,
}
