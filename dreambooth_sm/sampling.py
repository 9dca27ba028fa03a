"""Pictures from a pipeline: class images, and pictures for people to look at."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from dreambooth_sm.models import BaseModel
from dreambooth_sm.plan import Plan

# DPM++ 2M (Lu et al. 2022) needs about half the steps of PNDM for the same picture.
STEPS = 25
GUIDANCE = 7.5


def sampling_pipeline(base: BaseModel, plan: Plan) -> StableDiffusionPipeline:
    """The base model ready to draw on the plan's device: a copy in half precision on a GPU, else itself."""
    pipeline = base.pipeline()
    if plan.device == "cpu" or plan.precision == "fp32":
        return pipeline.to(plan.device)
    for name in ("unet", "vae", "text_encoder"):
        module = copy.deepcopy(getattr(pipeline, name)).to(plan.device, torch.float16)
        if plan.channels_last and name != "text_encoder":
            module.to(memory_format=torch.channels_last)
        setattr(pipeline, name, module)
    pipeline.vae.enable_slicing()  # pictures are decoded one by one: the VAE's activations are the largest
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    seeds: list[int],
    *,
    resolution: int,
    batch_size: int = 1,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Iterator[list[Image.Image]]:
    """Draws one picture a seed; a picture depends on its own seed alone, not on the batch it is drawn in.

    Args:
        resolution: side of the pictures in pixels.
        batch_size: pictures drawn at a time; halved where the device has no memory for so many.

    Yields:
        the pictures of each batch, in the order of ``seeds``.
    """
    scheduler = pipeline.scheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )
    pipeline.set_progress_bar_config(disable=True)
    try:
        done = 0
        while done < len(seeds):
            batch = seeds[done : done + batch_size]
            try:
                output: Any = pipeline(
                    [prompt] * len(batch),
                    height=resolution,
                    width=resolution,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(seed) for seed in batch],
                )
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                batch_size = len(batch) // 2
                torch.cuda.empty_cache()
                continue
            done += len(batch)
            yield output.images
    finally:
        pipeline.scheduler = scheduler
