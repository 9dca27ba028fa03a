"""Pictures from a pipeline: class images, and pictures for people to look at."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from dreambooth_sm.models import BaseModel
from dreambooth_sm.plan import Plan

# DPM++ 2M (Lu et al. 2022) needs about half the steps of PNDM for the same picture.
STEPS = 25
GUIDANCE = 7.5
# Noise levels (sigma, from above to below) at which guidance is worth its second forward pass: at higher ones it takes
# variety away, at lower ones it changes nothing (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval").
GUIDED_SIGMAS = (5.42, 0.28)


def sampling_pipeline(base: BaseModel, plan: Plan) -> StableDiffusionPipeline:
    """The base model ready to draw on the plan's device: a copy in half precision on a GPU, else itself."""
    pipeline = base.pipeline()
    if plan.device == "cpu" or plan.precision == "fp32":
        return pipeline.to(plan.device)
    for name in ("unet", "vae", "text_encoder"):
        # Not in channels_last: without a backward pass it is the slower format (measured on an H200).
        setattr(pipeline, name, _half_copy(getattr(pipeline, name), plan.device))
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
    size = (resolution, resolution)
    for latents in draw_latents(
        pipeline, prompt, seeds, size=size, batch_size=batch_size, steps=steps, guidance=guidance
    ):
        yield decode(pipeline, latents)


def draw_latents(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    batch_size: int = 1,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    guided: tuple[float, float] = (float("inf"), 0.0),
) -> Iterator[torch.Tensor]:
    """What :func:`draw` draws, before it is decoded.

    Args:
        size: width and height of the pictures in pixels.
        guided: classifier-free guidance acts where the noise level is at most the first and above the second.

    Yields:
        the scaled latents of each batch, float32 ``(pictures, 4, height / 8, width / 8)`` on the pipeline's device.
    """
    done = 0
    while done < len(seeds):
        # Batches of one size, as far as that goes: each size costs a warm-up.
        left = len(seeds) - done
        batch = seeds[done : done + math.ceil(left / math.ceil(left / batch_size))]
        try:
            latents = _denoise(pipeline, prompt, batch, size, steps, guidance, guided)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            continue
        done += len(batch)
        yield latents


@torch.no_grad()
def decode(pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Scaled latents ``(pictures, 4, h, w)`` as pictures."""
    vae = pipeline.vae
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(pixels.float())


@torch.no_grad()
def _denoise(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    guided: tuple[float, float],
) -> torch.Tensor:
    unet, device = pipeline.unet, pipeline.device
    scheduler: Any = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )
    scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)
    positive, negative = pipeline.encode_prompt(prompt, device, 1, guidance > 1)
    conditions = [positive.expand(len(seeds), -1, -1)]
    if guidance > 1:
        conditions.insert(0, negative.expand(len(seeds), -1, -1))
    width, height = (side // pipeline.vae_scale_factor for side in size)
    shape = (unet.config.in_channels, height, width)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(device) * scheduler.init_noise_sigma
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        # The last condition is the prompt's, the one before it the empty prompt's.
        used = conditions if guided[1] < sigma <= guided[0] else conditions[-1:]
        model_input = torch.cat([latents] * len(used)).to(unet.dtype)
        outputs = unet(model_input, timestep, encoder_hidden_states=torch.cat(used)).sample.float().chunk(len(used))
        output = outputs[0] if len(used) == 1 else outputs[0] + guidance * (outputs[1] - outputs[0])
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def _half_copy(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """A copy in half precision on a device, made without a second copy in fp32 on the way."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        value = parameter.detach().to(device, torch.float16)
        memo[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to(device, torch.float16 if buffer.is_floating_point() else None)
    return copy.deepcopy(module, memo)
