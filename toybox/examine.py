"""Measures how good the parts of the toybox are."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, ZImagePipeline
from PIL import Image
from torch import Tensor

from dreambooth_sm.gallery import grid
from dreambooth_sm.toybox import SIDE
from dreambooth_sm.toybox.judge import Judge, as_input
from dreambooth_sm.toybox.labels import LABELS
from toybox import paint, toys
from toybox.networks import as_pixels
from toybox.photos import Photos

DRAWING_STEPS = 25
DRAWING_GUIDANCE = 3.0


@torch.inference_mode()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio of the VAE's reconstructions, in decibels."""
    errors = []
    for batch in pixels.split(64):
        drawn = as_pixels(vae.decode(vae.encode(as_input(batch)).latent_dist.mean).sample)
        errors.append((drawn.float() - batch).square().mean(dim=(1, 2, 3)))
    return 10 * math.log10(255**2 / torch.cat(errors).mean().item())


@torch.inference_mode()
def examine_judge(judge: Judge, photos: Photos) -> dict[str, Any]:
    """Measures what the judge gets right on pictures that it has not seen, and how far its embeddings tell toys apart.

    Returns:
        ``accuracy`` of every head; ``same_toy`` and ``other_toy``, mean similarities; ``nearest``, the share of
        pictures whose nearest one shows the same toy.
    """
    answers = [judge(as_input(batch)) for batch in photos.pixels.split(256)]
    accuracy = {}
    for number, head in enumerate(LABELS):
        asked = photos.labels[:, number] >= 0
        if asked.any():
            chosen = torch.cat([logits[head] for _, logits in answers]).argmax(1)
            accuracy[head] = round((chosen == photos.labels[:, number])[asked].float().mean().item(), 4)
    embeddings = torch.cat([embedding for embedding, _ in answers])
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    same = (photos.individuals[:, None] == photos.individuals).fill_diagonal_(False)
    other = ~same.clone().fill_diagonal_(True)
    nearest = same.gather(1, similarity.argmax(1, keepdim=True))
    return {
        "accuracy": accuracy,
        "same_toy": round(similarity[same].mean().item(), 3),
        "other_toy": round(similarity[other].mean().item(), 3),
        "nearest": round(nearest.float().mean().item(), 3),
    }


def examine_pipeline(
    pipeline: StableDiffusionPipeline | ZImagePipeline,
    judge: Judge,
    count: int,
    seed: int,
    out: Path,
    guidance: float = DRAWING_GUIDANCE,
) -> dict[str, Any]:
    """Measures what the judge reads from drawn pictures, and from painted ones of the same scenes.

    The first 64 drawn ones go to ``out/sheet.png``, their prompts to ``out/sheet.txt``.
    """
    rng = random.Random(f"drawn {seed}")
    scenes = [toys.random_scene(rng) for _ in range(count)]
    prompts = [full_caption(scene, rng) for scene in scenes]
    drawn = draw(pipeline, prompts, seed, guidance=guidance)
    grid(drawn[:64], 8).save(out / "sheet.png")
    (out / "sheet.txt").write_text("\n".join(prompts[:64]) + "\n", encoding="utf-8")
    by_kind: dict[str, list[bool]] = {}
    read = judge.read(drawn)
    for scene, answer in zip(scenes, read, strict=True):
        by_kind.setdefault(scene.toy.kind, []).append(answer["kind"] == scene.toy.kind)
    return {
        "drawn": agreement(read, scenes),
        "painted": agreement(judge.read([paint.paint(scene, SIDE) for scene in scenes]), scenes),
        "kinds": {kind: round(sum(right) / len(right), 2) for kind, right in sorted(by_kind.items())},
    }


def full_caption(scene: toys.Scene, rng: random.Random) -> str:
    """A caption that names kind, colour and background."""
    while True:
        caption = toys.caption(scene, rng)
        described = caption.partition(" with ")[0].split()
        if scene.toy.kind in described and scene.toy.colour in described and scene.background in caption.split():
            return caption


def draw(
    pipeline: StableDiffusionPipeline | ZImagePipeline,
    prompts: Sequence[str],
    seed: int,
    batch: int = 64,
    guidance: float = DRAWING_GUIDANCE,
) -> list[Image.Image]:
    """One picture a prompt, each from noise of its own.

    Args:
        guidance: of Stable Diffusion's pipeline; Z-Image's counts what is added to the prompt's own, one less.
    """
    scale = guidance - 1 if isinstance(pipeline, ZImagePipeline) else guidance
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(1000 * seed + start + number) for number in range(len(part))]
        output: Any = pipeline(
            part,
            height=SIDE,
            width=SIDE,
            num_inference_steps=DRAWING_STEPS,
            guidance_scale=scale,
            generator=generators,
        )
        pictures += output.images
    return pictures


def agreement(read: Sequence[dict[str, str]], scenes: Sequence[toys.Scene]) -> dict[str, float]:
    """The shares of pictures whose kind, colour, background, and all three, are read as the scenes have them."""
    right = [
        (
            answer["kind"] == scene.toy.kind,
            answer["colour"] == scene.toy.colour,
            answer["background"] == scene.background,
        )
        for answer, scene in zip(read, scenes, strict=True)
    ]
    columns = zip(*((*row, all(row)) for row in right), strict=True)
    return {
        name: round(sum(column) / len(column), 3)
        for name, column in zip(("kind", "colour", "background", "all"), columns, strict=True)
    }
