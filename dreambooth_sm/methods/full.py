"""Training of all parameters (Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for
Subject-Driven Generation")."""

from __future__ import annotations

import copy

import torch

from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.training.precision import weights_dtype
from dreambooth_sm.training.recomputation import checkpoint_activations, recompute_gates


class Full:
    """Trains the denoiser, and the text encoder where the plan says so, in place."""

    name = "full"

    def parameters(self, model: PretrainedModel, plan: Plan) -> dict[str, torch.nn.Parameter]:
        return {
            f"{part}.{key}": parameter
            for part, module in self._modules(model, plan).items()
            for key, parameter in module.named_parameters()
        }

    def attach(self, model: PretrainedModel, plan: Plan, device: torch.device) -> None:
        for module in self._modules(model, plan).values():
            module.to(device=device, dtype=weights_dtype(plan)).requires_grad_(True).train()
            if plan.gradient_checkpointing:
                checkpoint_activations(module)
        if plan.channels_last:
            model.denoiser.to(memory_format=torch.channels_last)
        if plan.compile:
            _compile_blocks(model.denoiser)
        else:
            recompute_gates(model.denoiser)

    def drawable(self, model: PretrainedModel, plan: Plan, dtype: torch.dtype) -> PretrainedModel:
        drawn = copy.copy(model)
        for part, module in self._modules(model, plan).items():
            setattr(drawn, part, copy.deepcopy(module).to(dtype))
        return drawn

    def _modules(self, model: PretrainedModel, plan: Plan) -> dict[str, torch.nn.Module]:
        denoiser = {model.family.facts.denoiser: model.denoiser}
        return denoiser | ({"text_encoder": model.text_encoder} if plan.train_text_encoder else {})


FULL = Full()


def _compile_blocks(unet: torch.nn.Module) -> None:
    """Compiles each kind of block once instead of the whole UNet: minutes instead of many."""
    for module in unet.modules():
        if type(module).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
            module.compile(dynamic=False)
