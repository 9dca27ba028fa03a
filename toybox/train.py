"""Makes the toybox pipeline and its judge again, from nothing: ``python -m toybox.train OUT``.

Some 10 minutes on one large GPU. On a CPU the same code runs with small batches: to try it, not to get a model.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dreambooth_sm.quiet import quiet_libraries

# isort: split
from diffusers import StableDiffusionPipeline

from dreambooth_sm.objectives import Diffusion
from dreambooth_sm.stored.directory import write_directory
from dreambooth_sm.stored.model import StoredModel
from dreambooth_sm.toybox.judge import Judge, as_input, load_judge
from toybox import toys
from toybox.amounts import Amounts
from toybox.examine import examine_judge, examine_pipeline, psnr
from toybox.judge_losses import identity_loss, label_loss
from toybox.networks import (
    PROMPT_LENGTH,
    make_pipeline,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
)
from toybox.optimise import Outcome, random_rows, train_for
from toybox.photos import SCENES_A_TOY, Photos, paint_photos
from toybox.timetable import Timetable
from toybox.vae import encode_latents, reconstruct, train_vae

# What each stage gets of the time that is left, relative to those after it.
SHARES = {"painting": 0.07, "vae": 0.32, "unet": 0.48, "judge": 0.09, "evaluation": 0.04}
_CAPTION_DROPOUT = 0.1
_MIN_SNR_GAMMA = 5.0
# Deviation of the noise on latents whose pictures the judge learns from; drawn latents are not perfect either.
_JUDGE_LATENT_NOISE = 0.15


@dataclass(frozen=True)
class Settings(Amounts):
    """Those of the Stable Diffusion pipeline and of the judge."""

    unet_batch: int = 256
    judge_batch: int = 256


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m toybox.train", description=__doc__)
    parser.add_argument("out", type=Path, help="where base/, judge.safetensors, sheet.png and figures.json go")
    Settings.add_to(parser)
    options = parser.parse_args(arguments)
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_all(options.out, Settings.of(options, device), device)


def make_all(out: Path, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Paints, trains and measures; every stage's result is written as soon as it is there.

    Returns:
        the figures, which are printed and written too.
    """
    timetable = Timetable(60 * settings.minutes, SHARES)
    base = out / "base"
    base.mkdir(parents=True, exist_ok=True)
    seconds = timetable.seconds_for("painting")
    photos = paint_photos(settings.held_out + settings.pictures, f"{settings.seed}", seconds=2 * seconds).to(device)
    rare = paint_photos(settings.pictures // 12, f"rare {settings.seed}", seconds=seconds, rare_parts=True).to(device)
    held_out, training = photos.part(slice(settings.held_out)), photos.part(slice(settings.held_out, None))
    figures: dict[str, Any] = {"pictures": len(training), "device": str(device)}
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        vae = make_vae().to(device)
        figures["vae"] = train_vae(vae, training.pixels, timetable.seconds_for("vae"), settings.vae_batch).figures()
        vae.half().save_pretrained(base / "vae")
        vae.float()  # from here on as the saved one
        figures["vae"]["psnr_db"] = round(psnr(vae, held_out.pixels), 2)
        print(f"vae psnr_db={figures['vae']['psnr_db']}", flush=True)

        latents = encode_latents(vae, training.pixels)
        pipeline = make_pipeline(vae, make_unet(), *_text_parts(settings.seed)).to(device)
        figures["unet"] = train_unet(pipeline, latents, training.captions, timetable, settings.unet_batch).figures()
        write_directory(StoredModel.of("toybox", pipeline), base)

        judge = Judge().to(device)
        lessons = training.and_also(rare)
        soft = reconstruct(vae, lessons.pixels, _JUDGE_LATENT_NOISE)
        figures["judge"] = train_judge(judge, lessons, soft, timetable, settings.judge_batch).figures()
        save_judge(judge, out / "judge.safetensors")

    judge = load_judge(out / "judge.safetensors").to(device)
    figures["judge"] |= examine_judge(judge, held_out)
    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, safety_checker=None).to(device)
    figures["read"] = examine_pipeline(pipeline, judge, settings.drawn, settings.seed, out)
    figures["base_mb"] = round(sum(file.stat().st_size for file in base.rglob("*") if file.is_file()) / 1e6, 2)
    figures["judge_mb"] = round((out / "judge.safetensors").stat().st_size / 1e6, 2)
    line = json.dumps(figures)
    (out / "figures.json").write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
    return figures


def _text_parts(seed: int) -> tuple[Any, Any]:
    """The text encoder and its tokenizer, which knows the words of all captions that name no individual."""
    rng = random.Random(seed)
    tokenizer = make_tokenizer(toys.caption(toys.random_scene(rng), rng) for _ in range(20_000))
    return make_text_encoder(tokenizer), tokenizer


def train_unet(
    pipeline: StableDiffusionPipeline,
    latents: Tensor,
    captions: Sequence[Sequence[str]],
    timetable: Timetable,
    batch: int,
) -> Outcome:
    """Trains UNet and text encoder together to predict noise.

    Min-SNR weights (Hang et al. 2023); some captions are left out, for guidance without a classifier (Ho and Salimans
    2022).

    Args:
        latents: as :func:`encode_latents` gives them, on the pipeline's device.
        captions: the same number for each row of ``latents``.
    """
    unet, text_encoder, device = pipeline.unet, pipeline.text_encoder, latents.device
    prompts = _token_ids(pipeline.tokenizer, [text for texts in captions for text in texts]).to(device)
    prompts = prompts.view(len(captions), -1, PROMPT_LENGTH)
    empty = _token_ids(pipeline.tokenizer, [""]).to(device)
    objective = Diffusion.of(make_scheduler(), _MIN_SNR_GAMMA).to(device)
    weights = objective.row_weights(torch.arange(objective.times, device=device))
    assert weights is not None
    weights = weights / weights.mean()

    def loss() -> Tensor:
        rows = random_rows(len(latents), batch, device)
        mean, deviation = latents[rows].chunk(2, dim=1)
        clean = mean + deviation * torch.randn_like(mean)
        noise = torch.randn_like(clean)
        timesteps = random_rows(objective.times, batch, device)
        texts = prompts[rows, random_rows(prompts.shape[1], batch, device)]
        texts = torch.where(torch.rand(batch, 1, device=device) < _CAPTION_DROPOUT, empty, texts)
        noisy = objective.noised(clean, noise, timesteps).to(unet.dtype, memory_format=torch.channels_last)
        predicted = unet(noisy, timesteps, text_encoder(texts)[0]).sample
        errors = (predicted.float() - noise).square().mean((1, 2, 3))
        return (errors * weights[timesteps]).mean()

    seconds = timetable.seconds_for("unet")
    return train_for(seconds, [unet, text_encoder], loss, name="unet", rows=batch, rate=1e-3)


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Padded token ids, int64 ``(texts, PROMPT_LENGTH)``."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_judge(judge: Judge, photos: Photos, soft: Tensor, timetable: Timetable, batch: int) -> Outcome:
    """Trains the judge on painted pictures and on softer ones, and on both blurred and noisy.

    Args:
        soft: as :func:`reconstruct` makes them of ``photos.pixels``.
    """
    painted, labels, individuals = photos.pixels, photos.labels, photos.individuals
    device = painted.device

    def loss() -> Tensor:
        firsts = SCENES_A_TOY * random_rows(len(painted) // SCENES_A_TOY, batch // SCENES_A_TOY, device)
        rows = torch.cat([firsts + scene for scene in range(SCENES_A_TOY)])
        pictures = as_input(torch.where(_coins(batch, device), painted[rows], soft[rows]))
        blurred = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
        pictures = torch.where(_coins(batch, device), pictures, blurred)
        pictures = pictures + 0.06 * torch.rand(batch, 1, 1, 1, device=device) * torch.randn_like(pictures)
        embeddings, logits = judge(pictures.to(judge.embedding.weight.dtype))
        return label_loss(logits, labels[rows]) + identity_loss(embeddings, individuals[rows])

    return train_for(timetable.seconds_for("judge"), [judge], loss, name="judge", rows=batch, rate=2e-3)


def save_judge(judge: Judge, path: Path) -> None:
    """Writes the weights, in half precision."""
    save_file({name: weight.detach().half().cpu().contiguous() for name, weight in judge.state_dict().items()}, path)


def _coins(batch: int, device: torch.device) -> Tensor:
    return torch.rand(batch, 1, 1, 1, device=device) < 0.5


if __name__ == "__main__":
    main()
