"""Pictures from a pipeline: class images, and pictures for people to look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

# DPM++ 2M (Lu et al. 2022) needs about half the steps of PNDM for the same picture.
STEPS = 25
GUIDANCE = 7.5


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
        batch_size: pictures drawn at a time.

    Yields:
        the pictures of each batch, in the order of ``seeds``.
    """
    scheduler = pipeline.scheduler
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )
    pipeline.set_progress_bar_config(disable=True)
    try:
        for first in range(0, len(seeds), batch_size):
            batch = seeds[first : first + batch_size]
            output: Any = pipeline(
                [prompt] * len(batch),
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in batch],
            )
            yield output.images
    finally:
        pipeline.scheduler = scheduler
