"""Pictures from a pipeline: class images, and pictures for people to look at."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.families import Conditioning, family_of
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.stored.model import Pipeline, parts_of

# DPM++ 2M (Lu et al. 2022) needs about half the steps of PNDM for the same picture.
STEPS = 25
GUIDANCE = 7.5
# Side of the tiles, in pixels, that pictures are decoded in where they don't fit as a whole.
_TILE = 256
# Noise levels (sigma, from above to below) at which guidance is worth its second forward pass: at higher ones it takes
# variety away, at lower ones it changes nothing (Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval").
GUIDED_SIGMAS = (5.42, 0.28)


def sampling_pipeline(base: PretrainedModel, plan: Plan) -> Pipeline:
    """The base model ready to draw on the plan's device: a copy in half precision on a GPU, else itself."""
    pipeline = base.pipeline()
    if plan.device == "cpu" or plan.precision == "fp32":
        return pipeline.to(plan.device)
    for name in parts_of(pipeline):
        # Not in channels_last: without a backward pass it is the slower format (measured on an H200).
        dtype = base.vae_dtype if name == "vae" else torch.float16
        setattr(pipeline, name, _copy(getattr(pipeline, name), plan.device, dtype))
    pipeline.vae.enable_slicing()  # pictures are decoded one by one: the VAE's activations are the largest
    return pipeline


def draw(
    pipeline: Pipeline,
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
    pipeline: Pipeline,
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
def decode(pipeline: Pipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Scaled latents ``(pictures, 4, h, w)`` as pictures; in tiles where the device has no memory for more."""
    vae = pipeline.vae
    scaled = family_of(pipeline).denormalise(vae.config, latents.to(vae.dtype))
    pixels = None
    with contextlib.suppress(torch.OutOfMemoryError):
        pixels = vae.decode(scaled).sample
    if pixels is None:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = _TILE, _TILE // pipeline.vae_scale_factor
        torch.cuda.empty_cache()
        pixels = vae.decode(scaled).sample
    return pipeline.image_processor.postprocess(pixels.float())


@torch.no_grad()
def _denoise(
    pipeline: Pipeline,
    prompt: str,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    guided: tuple[float, float],
) -> torch.Tensor:
    family, device = family_of(pipeline), pipeline.device
    denoiser = getattr(pipeline, family.facts.denoiser)
    scheduler = family.sampler(pipeline)
    scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)
    conditions = _conditions(pipeline, prompt, size, guided=guidance > 1)
    numbers = torch.arange(len(conditions), device=device)
    together, alone = (conditions.of(rows.repeat_interleave(len(seeds))) for rows in (numbers, numbers[-1:]))
    width, height = (side // pipeline.vae_scale_factor for side in size)
    shape = (pipeline.vae.config.latent_channels, height, width)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(device) * scheduler.init_noise_sigma
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        used = together if guided[1] < sigma <= guided[0] else alone
        count = len(used) // len(seeds)
        model_input = torch.cat([latents] * count).to(denoiser.dtype)
        outputs = family.predict(denoiser, model_input, timestep, used).float().chunk(count)
        output = outputs[0] if count == 1 else outputs[0] + guidance * (outputs[1] - outputs[0])
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def _conditions(pipeline: Pipeline, prompt: str, size: tuple[int, int], *, guided: bool) -> Conditioning:
    """The prompt's conditioning, in the last row; with guidance, the empty prompt's in the row before it."""
    family = family_of(pipeline)
    conditions = embed(family, pipeline, ["", prompt] if guided else [prompt], max_tokens=None)
    told = family.extras(size, (0, 0), size).items()  # a whole picture
    numbers = {name: torch.tensor([row] * len(conditions), dtype=torch.float32) for name, row in told}
    return conditions.beside({name: value.to(pipeline.device) for name, value in numbers.items()})


def _copy(module: torch.nn.Module, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of a type on a device, made without a second copy in fp32 on the way."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        value = parameter.detach().to(device, dtype)
        memo[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to(device, dtype if buffer.is_floating_point() else None)
    return copy.deepcopy(module, memo)
