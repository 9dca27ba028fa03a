"""Training of all parameters (Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for
Subject-Driven Generation")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dreambooth_sm.planning.ladder import Rung

if TYPE_CHECKING:
    import torch

    from dreambooth_sm.families import ModelFootprint
    from dreambooth_sm.hyperparameters import Hyperparameters
    from dreambooth_sm.models import PretrainedModel
    from dreambooth_sm.planning.plan import Plan


class Full:
    """Trains the denoiser, and the text encoders where the plan says so, in place."""

    name = "full"
    trains = "UNet"
    title = "fine-tuned with DreamBooth"
    hub: Mapping[str, str] = MappingProxyType({"library_name": "diffusers"})
    tags: tuple[str, ...] = ()
    leaves_base = False
    trains_text_encoder = True
    encodes_prompts = False
    has_live_base = False
    # A card gets the first rung that it is large enough for and whose predicted peak fits: 40 GB cards and up `roomy`,
    # A10G and L4 `large`, T4 to 10 GB `medium`, 8 GB `small`, 6 GB `tight`, and 4 GB `tiny`.
    ladder = (
        #     name      GiB  weights      bits  keeps grads  checkpoints  text encoder  EMA
        Rung("roomy", 36, "residual", 8, True, False, True, True),
        Rung("large", 20, "residual", 8, False, False, True, True),
        Rung("medium", 0, "residual", 8, False, False, True, False),
        Rung("small", 0, "residual", 8, False, True, True, False),
        Rung("lean", 0, "residual", 8, False, True, False, False),
        Rung("tight", 0, "stochastic", 8, False, True, False, False),
        Rung("tiny", 0, "stochastic", 4, False, True, False, False),
    )

    def trained_millions(self, footprint: ModelFootprint, h: Hyperparameters, text_encoder: bool) -> float:
        return footprint.denoiser + (footprint.text_encoder if text_encoder else 0)

    def activations(self, h: Hyperparameters) -> str:
        return ""

    def attach(self, model: PretrainedModel, plan: Plan, h: Hyperparameters, seed: int) -> WholeModel:
        factor = h.text_encoder_factor if plan.train_text_encoder else 1.0
        return WholeModel(model, text_encoder=plan.train_text_encoder, text_encoder_factor=factor)

    def usage(self, pipeline: str, base: str, prompt: str, hyperparameters: Mapping[str, Any]) -> str:
        opened = "from_pretrained('.')  # this directory"
        if hyperparameters["export"] == "single_file":
            opened = f"from_single_file({hyperparameters['model_name'] + '.safetensors'!r})"
        return f"""```python
from diffusers import {pipeline}

pipeline = {pipeline}.{opened}
picture = pipeline({prompt!r}).images[0]
```"""


METHOD = Full()


class WholeModel:
    """A model whose own parameters are trained: those of the denoiser, and of the text encoders if they are trained.

    Args:
        text_encoder_factor: of the learning rate, for text encoders.
    """

    def __init__(self, model: PretrainedModel, *, text_encoder: bool, text_encoder_factor: float = 1.0) -> None:
        self.model = model
        # Keeps what its weights come from, while those of the model are trained.
        self._base = model.with_parts({})
        self._text_encoder, self._text_encoder_factor = text_encoder, text_encoder_factor
        self._parts = (model.family.facts.denoiser, *(model.text_parts if text_encoder else ()))

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{part}.{key}": parameter
            for part in self._parts
            for key, parameter in getattr(self.model, part).named_parameters()
        }

    @property
    def rates(self) -> dict[str, float]:
        parts = self.model.text_parts
        return {name: self._text_encoder_factor for name in self.parameters if name.partition(".")[0] in parts}

    def load(self) -> None:
        self.model.load(*self._parts)

    def reset(self, seed: int) -> None:
        for part in self._parts:
            weights = self._base.weights(part)
            for key, parameter in getattr(self.model, part).named_parameters():
                parameter.data = weights[key].read()

    def place(self, plan: Plan, device: torch.device) -> None:
        from dreambooth_sm.training.placement import place, speed_up

        for part in self._parts:
            place(getattr(self.model, part), plan, device, trained=True)
        speed_up(self.model.denoiser, plan)

    def drawable(self, dtype: torch.dtype) -> WholeModel:
        copies = {part: self.model.copy_of(part, "cpu", dtype) for part in self._parts}
        return WholeModel(self.model.with_parts(copies), text_encoder=self._text_encoder)

    def export(self, directory: Path, h: Hyperparameters, dtype: torch.dtype | None) -> None:
        if h.export != "single_file":
            self.model.save(directory, dtype)
        if h.export != "diffusers":
            self.model.save_single_file(
                directory / f"{h.model_name}.safetensors", dtype, resolution=h.resolution, trigger=h.instance_prompt
            )

    def exported_values(self, h: Hyperparameters) -> int:
        values = sum(p.numel() for module in self.model.modules.values() for p in module.parameters())
        return values * (2 if h.export == "both" else 1)
