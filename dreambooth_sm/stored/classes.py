"""The libraries' classes that pipelines are made of.

Importing them takes longer than all else that a job imports. So functions import this module, and modules do not: an
error of the input that is found before a model is opened does not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dreambooth_sm.importing import importing

with importing():
    import diffusers
    import torch
    import transformers
    from accelerate import init_empty_weights
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        SchedulerMixin,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from diffusers.models import embeddings
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedModel,
    )

    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # of transformers 4
        from transformers.modeling_utils import no_init_weights

__all__ = [
    "AutoencoderKL",
    "CLIPImageProcessor",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "PreTrainedModel",
    "SchedulerMixin",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    "diffusers",
    "init_empty_weights",
    "named",
    "no_init_weights",
    "no_positions",
]


@contextmanager
def no_positions() -> Iterator[None]:
    """Does not compute the table of positions of a transformer whose files hold it: of Stable Diffusion 3 it takes
    seconds, and 2 GB."""
    compute = embeddings.get_2d_sincos_pos_embed

    def empty(width: int, grid: int, **_: Any) -> torch.Tensor:
        return torch.empty(grid * grid, width)

    embeddings.get_2d_sincos_pos_embed = empty
    try:
        yield
    finally:
        embeddings.get_2d_sincos_pos_embed = compute


def named(name: str) -> Any:
    """A class of diffusers or transformers; those of one family alone are imported where a job is of it."""
    with importing():
        return getattr(diffusers, name, None) or getattr(transformers, name)
