"""The libraries' classes that pipelines are made of.

Importing them takes longer than all else that a job imports. So functions import this module, and modules do not: an
error of the input that is found before a model is opened does not wait for it.
"""

from __future__ import annotations

from dreambooth_sm.importing import importing

with importing():
    import diffusers
    from accelerate import init_empty_weights
    from diffusers import (
        AutoencoderKL,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        SchedulerMixin,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedModel,
        Qwen2Tokenizer,
        Qwen3Model,
    )

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
    "FlowMatchEulerDiscreteScheduler",
    "PreTrainedModel",
    "Qwen2Tokenizer",
    "Qwen3Model",
    "SchedulerMixin",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    "ZImagePipeline",
    "ZImageTransformer2DModel",
    "diffusers",
    "init_empty_weights",
]
