"""The libraries' classes that pipelines are made of.

Importing them takes longer than all else that a job imports. So functions import this module, and modules do not: an
error of the input that is found before a model is opened does not wait for it.
"""

from __future__ import annotations

from typing import Any

from dreambooth_sm.importing import importing

with importing():
    import diffusers
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
]


def named(name: str) -> Any:
    """A class of diffusers or transformers; those of one family alone are imported where a job is of it."""
    with importing():
        return getattr(diffusers, name, None) or getattr(transformers, name)
