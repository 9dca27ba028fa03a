"""Makes the toybox's flow pipeline: ``python -m toybox.train_flow OUT``.

Some 20 minutes on one large GPU, in one command or in several: what ``OUT/base`` or ``--start`` holds already is taken
from there, and the denoiser goes on learning, from other pictures with another ``--seed``. On a CPU the same code runs
with small batches: to try it, not to get a model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.quiet import quiet_libraries

# isort: split
from diffusers import AutoencoderKL, ZImagePipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_model
from transformers import Qwen2Tokenizer, Qwen3Model

from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.z_image import FAMILY
from dreambooth_sm.objectives import FlowMatching
from dreambooth_sm.stored.directory import read_directory, write_directory
from dreambooth_sm.stored.locate import INDEX
from dreambooth_sm.stored.model import StoredModel
from dreambooth_sm.toybox.judge import load_judge
from toybox import toys
from toybox.amounts import Amounts
from toybox.examine import DRAWING_GUIDANCE, examine_pipeline, psnr
from toybox.flow_networks import CAPTION_LENGTH, make_flow_vae, make_pipeline, make_tokenizer
from toybox.optimise import Outcome, random_rows, train_for
from toybox.photos import paint_photos
from toybox.timetable import Timetable
from toybox.vae import encode_latents, train_vae

# What each stage gets of the time that is left, relative to those after it.
FLOW_SHARES = {"painting": 0.06, "vae": 0.34, "denoiser": 0.56, "evaluation": 0.04}
# Of what is learned from nothing, and of what learns on.
_RATE, _RATE_AGAIN = 1.5e-3, 1e-3
_CAPTION_DROPOUT = 0.1
# Of what the VAE learns by: four times as many latents share the divergence as the other toybox has.
_DIVERGENCE_WEIGHT, _HALVED_WEIGHT = 5e-4, 0.25
# Of Stable Diffusion's pipeline; beside the one that the toybox is examined with.
_OTHER_GUIDANCES = (2.0, 4.5)


@dataclass(frozen=True)
class FlowSettings(Amounts):
    """Those of the flow pipeline."""

    pictures: int = 100_000
    denoiser_batch: int = 256


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m toybox.train_flow", description=__doc__)
    parser.add_argument("out", type=Path, help="where base/, sheets of pictures and figures.json go")
    parser.add_argument("--start", type=Path, help="an OUT of an earlier command; left out, OUT itself")
    FlowSettings.add_to(parser)
    options = parser.parse_args(arguments)
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_all(options.out, FlowSettings.of(options, device), device, options.start)


def make_all(out: Path, settings: FlowSettings, device: torch.device, start: Path | None = None) -> dict[str, Any]:
    """Paints, trains and measures; every stage's result is written as soon as it is there.

    Args:
        start: holds the ``base/`` that training goes on with; None: ``out``.

    Returns:
        the figures, which are printed and written too.
    """
    timetable = Timetable(60 * settings.minutes, FLOW_SHARES)
    base, earlier = out / "base", (start or out) / "base"
    base.mkdir(parents=True, exist_ok=True)
    count, seconds = settings.held_out + settings.pictures, timetable.seconds_for("painting")
    photos = paint_photos(count, f"{settings.seed}", seconds=2 * seconds).to(device)
    held_out, training = photos.part(slice(settings.held_out)), photos.part(slice(settings.held_out, None))
    figures: dict[str, Any] = {"pictures": len(training), "device": str(device)}
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        if not (earlier / "vae").is_dir():
            figures["vae"] = _make_vae(base / "vae", training.pixels, timetable, settings.vae_batch).figures()
        elif earlier != base:
            shutil.copytree(earlier / "vae", base / "vae", dirs_exist_ok=True)
        vae = _read_vae(base / "vae").to(device).requires_grad_(False)
        figures["psnr_db"] = round(psnr(vae, held_out.pixels), 2)
        print(f"vae psnr_db={figures['psnr_db']}", flush=True)

        latents = encode_latents(vae, training.pixels)
        again = (earlier / INDEX).is_file()
        pipeline = read_directory(earlier).load() if again else make_pipeline(vae, _make_tokenizer(settings.seed))
        pipeline.to(device)
        rate, batch = _RATE_AGAIN if again else _RATE, settings.denoiser_batch
        figures["denoiser"] = train_denoiser(pipeline, latents, training.captions, timetable, batch, rate).figures()
        write_directory(StoredModel.of("toybox-flow", pipeline), base)

    pipeline = ZImagePipeline.from_pretrained(base, dtype=torch.float32).to(device)
    judge = load_judge().to(device)
    for guidance in (DRAWING_GUIDANCE, *_OTHER_GUIDANCES):
        sheet = out if guidance == DRAWING_GUIDANCE else out / f"guidance-{guidance}"
        sheet.mkdir(exist_ok=True)
        read = examine_pipeline(pipeline, judge, settings.drawn, settings.seed, sheet, guidance)
        figures[f"read at guidance {guidance}"] = read
        print(f"drawn guidance={guidance} {read['drawn']}", flush=True)
    figures["base_mb"] = round(sum(file.stat().st_size for file in base.rglob("*") if file.is_file()) / 1e6, 2)
    line = json.dumps(figures)
    (out / "figures.json").write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)
    return figures


def _make_vae(target: Path, pixels: Tensor, timetable: Timetable, batch: int) -> Outcome:
    """Trains a VAE and writes it, in half precision."""
    vae, seconds = make_flow_vae().to(pixels.device), timetable.seconds_for("vae")
    outcome = train_vae(vae, pixels, seconds, batch, divergence_weight=_DIVERGENCE_WEIGHT, halved_weight=_HALVED_WEIGHT)
    vae.half().save_pretrained(target)
    return outcome


def _read_vae(directory: Path) -> AutoencoderKL:
    """In fp32; its configuration does not name the directory, as diffusers' would."""
    vae = make_flow_vae()
    load_model(vae, directory / SAFETENSORS_WEIGHTS_NAME)
    return vae


def _make_tokenizer(seed: int) -> Qwen2Tokenizer:
    """It knows the words of all captions that name no individual."""
    rng = random.Random(seed)
    return make_tokenizer(toys.caption(toys.random_scene(rng), rng) for _ in range(20_000))


def train_denoiser(
    pipeline: ZImagePipeline,
    latents: Tensor,
    captions: Sequence[Sequence[str]],
    timetable: Timetable,
    batch: int,
    rate: float,
) -> Outcome:
    """Trains transformer and text encoder together, as the family trains its transformer.

    Some captions are left out, for guidance without a classifier (Ho and Salimans 2022).

    Args:
        latents: as :func:`encode_latents` gives them, on the pipeline's device.
        captions: the same number for each row of ``latents``.
        rate: the highest learning rate.
    """
    transformer, text_encoder, device = pipeline.transformer, pipeline.text_encoder, latents.device
    for module in (transformer, text_encoder):
        module.requires_grad_(True)
    # What nobody uses: patches of 128 pixels need no filling up, and of the states the last but one are read.
    for unused in (transformer.x_pad_token, text_encoder.layers[-1], text_encoder.norm):
        unused.requires_grad_(False)
    numbers: dict[str, int] = {}  # many pictures share a caption
    captions_of = [[numbers.setdefault(text, len(numbers)) for text in texts] for texts in captions]
    own = torch.tensor(captions_of, device=device)
    ids, lengths = (each.to(device) for each in read_captions(pipeline.tokenizer, list(numbers)))
    empty, empty_length = (each.to(device) for each in read_captions(pipeline.tokenizer, [""]))
    print(f"captions done different={len(numbers)}", flush=True)
    objective = make_objective(pipeline).to(device)

    def loss() -> Tensor:
        rows = random_rows(len(latents), batch, device)
        mean, deviation = latents[rows].chunk(2, dim=1)
        clean = mean + deviation * torch.randn_like(mean)
        noise = torch.randn_like(clean)
        times = random_rows(objective.times, batch, device)
        texts = own[rows, random_rows(own.shape[1], batch, device)]
        left_out = torch.rand(batch, device=device) < _CAPTION_DROPOUT
        words = torch.where(left_out[:, None], empty, ids[texts])
        counts = torch.where(left_out, empty_length, lengths[texts])
        noisy = objective.noised(clean, noise, times).to(transformer.dtype)
        text = {"states": read_states(text_encoder, words), "lengths": counts}
        predicted = FAMILY.predict(transformer, noisy, objective.told(times), Conditioning(text))
        return (predicted.float() - objective.target(clean, noise, times)).square().mean()

    seconds = timetable.seconds_for("denoiser")
    return train_for(seconds, [transformer, text_encoder], loss, name="denoiser", rows=batch, rate=rate)


def make_objective(pipeline: ZImagePipeline) -> FlowMatching:
    """With times as jobs train them where nothing else is asked for."""
    schedule = pipeline.scheduler.config
    return FlowMatching.of(schedule.shift, "uniform", schedule.num_train_timesteps)


def read_captions(tokenizer: Qwen2Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of captions in the template, and how many are a caption's. What is too long counts as empty.

    Returns:
        int64 ``(texts, CAPTION_LENGTH)`` and ``(texts,)``.
    """
    before, after = _template(tokenizer)
    parts = []
    for first in range(0, len(texts), 20_000):
        filled = [f"{before}{text}{after}" for text in texts[first : first + 20_000]]
        read = tokenizer(filled, padding="max_length", max_length=CAPTION_LENGTH + 1, truncation=True)
        parts.append((torch.tensor(read["input_ids"]), torch.tensor(read["attention_mask"]).sum(1)))
    ids, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
    too_long = lengths > CAPTION_LENGTH
    if too_long.any():
        empty, empty_length = read_captions(tokenizer, [""])
        ids[too_long, :CAPTION_LENGTH], lengths[too_long] = empty, empty_length
    return ids[:, :CAPTION_LENGTH].contiguous(), lengths


def _template(tokenizer: Qwen2Tokenizer) -> tuple[str, str]:
    """What stands before and after a caption: it takes far longer to fill in for each."""
    said = [{"role": "user", "content": "caption"}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    before, _, after = str(text).partition("caption")
    return before, after


def read_states(text_encoder: Qwen3Model, ids: Tensor) -> Tensor:
    """States of the last layer but one, ``(rows, CAPTION_LENGTH, width)``: of a prompt's own tokens as the family reads
    them; each sees those before it alone, so that the others need no mask, which would wait for the device."""
    read = text_encoder(ids, attention_mask={"full_attention": None}, use_cache=False, output_hidden_states=True)
    return read.hidden_states[-2]


if __name__ == "__main__":
    main()
