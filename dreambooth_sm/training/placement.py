"""Modules on the device that they are trained on, as the plan says."""

from __future__ import annotations

from typing import Any

import torch

from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.stored.kept_in_fp32 import cast
from dreambooth_sm.training.attention import leave_out_rescaling
from dreambooth_sm.training.channels_last import keep_channels_last
from dreambooth_sm.training.kernels import obstacle
from dreambooth_sm.training.layer_norm import norm_in_one_pass
from dreambooth_sm.training.precision import compute_dtype, weights_dtype
from dreambooth_sm.training.recomputation import checkpoint_activations, recompute_gates, repeated_blocks


def place(module: Any, plan: Plan, device: torch.device, *, trained: bool) -> None:
    """Puts a denoiser or text encoder on the device; again, with a smaller plan, after it ran out of memory.

    Args:
        trained: whether its own parameters are; the frozen ones of others need no more than the precision that is
            computed in.
    """
    cast(module, device, weights_dtype(plan) if trained else frozen_dtype(plan))
    module.requires_grad_(trained).train()
    if plan.gradient_checkpointing:
        checkpoint_activations(module)


def frozen_dtype(plan: Plan) -> torch.dtype:
    """The type of what is not trained."""
    # On the CPU pictures are drawn with the modules themselves.
    return weights_dtype(plan) if plan.device == "cpu" else compute_dtype(plan)


def speed_up(denoiser: Any, plan: Plan) -> None:
    """Sets the memory format and the kernels of a denoiser that is on its device."""
    if plan.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if plan.compile:
        _compile_blocks(denoiser)
        return
    _save_passes(denoiser)
    if plan.channels_last and plan.device == "cuda":
        keep_channels_last(denoiser)


def speed_up_drawing(module: Any) -> None:
    """Sets the memory format and the kernels of a module that draws, on its device, and is not trained."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    # Without the kernels channels_last is the slower format of a forward pass (measured on an H200).
    if (
        isinstance(module, AutoencoderKL | UNet2DConditionModel)
        and module.device.type == "cuda"
        and not obstacle(module.device)
    ):
        module.to(memory_format=torch.channels_last)
        keep_channels_last(module)
        _save_passes(module)


def _save_passes(module: torch.nn.Module) -> None:
    """Passes over activations that a denoiser's transformers need not make, or keep the results of."""
    recompute_gates(module)
    norm_in_one_pass(module)
    leave_out_rescaling(module)


def _compile_blocks(denoiser: torch.nn.Module) -> None:
    """Compiles each kind of block once instead of the whole denoiser: minutes instead of many."""
    resnets = [module for module in denoiser.modules() if type(module).__name__ == "ResnetBlock2D"]
    for module in (*repeated_blocks(denoiser), *resnets):
        module.compile(dynamic=False)
