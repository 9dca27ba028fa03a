"""Pictures from a pipeline: class images, and pictures for people to look at."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image

from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.families import Conditioning, Family, family_of
from dreambooth_sm.latents import latent_channels, pixels_of
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.ladder import BaseWeights
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.stored.kept_in_fp32 import cast
from dreambooth_sm.stored.model import Pipeline
from dreambooth_sm.training.placement import speed_up_drawing
from dreambooth_sm.training.quantised import is_quantised, quantise_layers

# Side of the tiles, in pixels, that pictures are decoded in where they don't fit as a whole.
_TILE = 256


@dataclass(frozen=True)
class Sampler:
    """A pipeline that is ready to draw.

    Attributes:
        embedded: prompts as the text encoders saw them before they were let go of: all that can be drawn. Empty where
            the pipeline still has them.
    """

    pipeline: Pipeline
    embedded: Mapping[str, Conditioning] = field(default_factory=dict)


def make_sampler(
    base: PretrainedModel,
    plan: Plan,
    prompts: Iterable[str] | None = None,
    guidance: float | None = None,
    embedded: Mapping[str, Conditioning] | None = None,
) -> Sampler:
    """The base model ready to draw on the plan's device, in half precision on a GPU.

    Args:
        prompts: that it will draw: the text encoders are let go of before the other parts are read. None keeps them.
        guidance: that it will draw these with; None for the family's.
        embedded: prompts of another sampler of the same text encoders, in place of ``prompts``.
    """
    guidance = base.family.facts.drawing.guidance if guidance is None else guidance
    parts = base.family.facts.parts
    if embedded is None and prompts is not None:
        embedded = embed_prompts(base, plan, prompts, guidance)
    if embedded is not None:
        parts = tuple(part for part in parts if part not in base.text_parts)
    pipeline = base.with_parts({part: drawing_part(base, plan, part) for part in parts}).pipeline()
    if _in_half(plan):
        pipeline.vae.enable_slicing()  # pictures are decoded one by one: the VAE's activations are the largest
    return Sampler(pipeline, embedded or {})


def embed_prompts(
    base: PretrainedModel, plan: Plan, prompts: Iterable[str], guidance: float
) -> dict[str, Conditioning]:
    """Prompts as a sampler of the base model keeps them; its text encoders are on the device only meanwhile."""
    encoding = base.with_parts({part: drawing_part(base, plan, part) for part in base.text_parts})
    return {prompt: _embed(encoding, prompt, guided=_asks_twice(base.family, guidance)) for prompt in prompts}


def _asks_twice(family: Family, guidance: float) -> bool:
    """Whether the denoiser is asked about the empty prompt as well."""
    return guidance > 1 and family.facts.drawing.told is None


def drawing_part(base: PretrainedModel, plan: Plan, part: str) -> Any:
    """A module of the base model on the plan's device, in the precision that is drawn in; in fewer bits where the plan
    keeps it so."""
    kind, dtype = drawing_form(base, plan, part)
    own = getattr(base, part)
    if kind == "plain" or is_quantised(own):
        module = base.part(part, plan.device, dtype)
    else:
        shrink = partial(quantise_layers, kind=kind, dtype=dtype, device=torch.device(plan.device))
        module = base.copy_of(part, "cpu", None, shrink)
        cast(module, plan.device, dtype)
    if module is not own:  # which may be in training, where the plan decides
        speed_up_drawing(module)
    return module


def drawing_form(base: PretrainedModel, plan: Plan, part: str) -> tuple[BaseWeights, torch.dtype]:
    """What :func:`drawing_part` keeps the weights of a module in, and the precision that it computes in."""
    half = base.vae_dtype if part == "vae" else base.half
    return _kept_in(base, plan, part), half if _in_half(plan) else torch.float32


def _kept_in(base: PretrainedModel, plan: Plan, part: str) -> BaseWeights:
    """What the weights of a module are kept in."""
    facts = base.family.facts
    if part == facts.denoiser:
        return plan.base_weights
    if part not in base.text_parts or part in facts.plain_text:
        return "plain"
    if plan.train_text_encoder:
        return plan.base_weights
    return plan.text_weights


def _in_half(plan: Plan) -> bool:
    return plan.device != "cpu" and plan.precision != "fp32"


def draw(
    model: Pipeline | Sampler,
    prompt: str,
    seeds: list[int],
    *,
    resolution: int,
    batch_size: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
) -> Iterator[list[Image.Image]]:
    """Draws one picture a seed; a picture depends on its own seed alone, not on the batch it is drawn in.

    Args:
        resolution: side of the pictures in pixels.
        batch_size: pictures drawn at a time; halved where the device has no memory for so many.
        steps, guidance: None for the family's.

    Yields:
        the pictures of each batch, in the order of ``seeds``.
    """
    size = (resolution, resolution)
    pipeline = model.pipeline if isinstance(model, Sampler) else model
    for latents in draw_latents(model, prompt, seeds, size=size, batch_size=batch_size, steps=steps, guidance=guidance):
        yield decode(pipeline, latents)


def draw_latents(
    model: Pipeline | Sampler,
    prompt: str,
    seeds: Sequence[int],
    *,
    size: tuple[int, int],
    batch_size: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    guided: tuple[float, float] = (float("inf"), 0.0),
) -> Iterator[torch.Tensor]:
    """Draws as :func:`draw` does, without decoding.

    Args:
        size: width and height of the pictures in pixels.
        guided: classifier-free guidance acts where the noise level is at most the first and above the second.

    Yields:
        the scaled latents of each batch, float32 ``(pictures, 4, height / 8, width / 8)`` on the pipeline's device.
    """
    sampler = model if isinstance(model, Sampler) else Sampler(model)
    usual = family_of(sampler.pipeline).facts.drawing
    steps, guidance = usual.steps if steps is None else steps, usual.guidance if guidance is None else guidance
    done = 0
    while done < len(seeds):
        # Batches of one size, as far as that goes: each size costs a warm-up.
        left = len(seeds) - done
        batch = seeds[done : done + math.ceil(left / math.ceil(left / batch_size))]
        try:
            latents = _denoise(sampler, prompt, batch, size, steps, guidance, guided)
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
    family = family_of(pipeline)
    scaled = family.denormalise(family.scale(vae), latents.to(vae.dtype))
    pixels = None
    with contextlib.suppress(torch.OutOfMemoryError):
        pixels = pixels_of(vae, scaled)
    if pixels is None:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = _TILE, _TILE // pipeline.vae_scale_factor
        torch.cuda.empty_cache()
        pixels = pixels_of(vae, scaled)
    # Rounded as the processor does it, but on the device: a quarter of the bytes leave it.
    levels = pipeline.image_processor.postprocess(pixels.float(), output_type="pt").mul(255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


@torch.no_grad()
def _denoise(
    sampler: Sampler,
    prompt: str,
    seeds: Sequence[int],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    guided: tuple[float, float],
) -> torch.Tensor:
    pipeline = sampler.pipeline
    family = family_of(pipeline)
    denoiser = getattr(pipeline, family.facts.denoiser)
    device = denoiser.device
    scheduler = family.sampler(pipeline, steps, size, device)
    conditions = _conditions(sampler, prompt, size, guidance)
    numbers = torch.arange(len(conditions), device=device)
    together, alone = (conditions.of(rows.repeat_interleave(len(seeds))) for rows in (numbers, numbers[-1:]))
    width, height = (side // pipeline.vae_scale_factor for side in size)
    shape = (latent_channels(pipeline.vae), height, width)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        used = together if guided[1] < sigma <= guided[0] else alone
        count = len(used) // len(seeds)
        model_input = torch.cat([latents] * count).to(denoiser.dtype)
        outputs = family.predict(denoiser, model_input, timestep, used).float().chunk(count)
        output = outputs[0] if count == 1 else family.guide(outputs[1], outputs[0], guidance)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def _conditions(sampler: Sampler, prompt: str, size: tuple[int, int], guidance: float) -> Conditioning:
    """The prompt's conditioning, in the last row; with classifier-free guidance, the empty prompt's in the row before
    it."""
    family = family_of(sampler.pipeline)
    guided = _asks_twice(family, guidance)
    conditions = sampler.embedded.get(prompt) or _embed(sampler.pipeline, prompt, guided=guided)
    device = next(iter(conditions.text.values())).device
    told = dict(family.extras(size, (0, 0), size))  # a whole picture
    if name := family.facts.drawing.told:
        told[name] = [guidance]
    numbers = {
        name: torch.tensor([row] * len(conditions), dtype=torch.float32, device=device) for name, row in told.items()
    }
    return conditions.beside(numbers)


def _embed(model: Any, prompt: str, *, guided: bool) -> Conditioning:
    family = model.family if isinstance(model, PretrainedModel) else family_of(model)
    return embed(family, model, ["", prompt] if guided else [prompt], max_tokens=None)
