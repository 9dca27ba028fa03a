"""What plan, launcher, documents and model cards know of a family of models before one is downloaded. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Footprint:
    """What memory depends on.

    Attributes:
        unet, text_encoder, vae: millions of parameters; of all text encoders together.
        activations_gb, checkpointed_gb: activations of one 512-pixel sample in 16 bits, in GB: everything kept, or
            recomputed unit by unit.
        drawn_gb: activations of one 512-pixel picture while a batch of them is drawn.
        vae_bytes: width of the VAE's values while pictures are drawn.
        trains_text_encoder: whether its text encoder can be trained beside the UNet.
    """

    unet: float
    text_encoder: float
    vae: float
    activations_gb: float
    checkpointed_gb: float
    drawn_gb: float
    vae_bytes: int = 2
    trains_text_encoder: bool = True


@dataclass(frozen=True)
class Facts:
    """One family.

    Attributes:
        name: as the hyperparameter ``base_architecture`` says it.
        title: what people call it.
        resolution: side of the pictures that it was trained on last, in pixels; what users expect where they name none.
        footprint: measured by ``benchmarks/train_step.py`` and ``benchmarks/tiers.py``.
        step_cost, class_image_cost: seconds of a step and of a class image, per pixel, relative to Stable Diffusion 1.
        tags: what the hub calls its models.
        licences: by the start of a base model's name, as the hub gives them.
        folder: of a pipeline directory, and ``tensor`` of a single file's header: those that no other family has.
        names: found in what makers call their models.
    """

    name: str
    title: str
    resolution: int
    footprint: Footprint
    step_cost: float
    class_image_cost: float
    tags: tuple[str, ...]
    licences: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    tensor: bytes | None = None
    names: re.Pattern[str] | None = None
