"""What the benchmarks of what is learned share: subjects and their pictures, trainers of them, and what is drawn."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from benchmarks.common import DEVICE, PROMPTS
from dreambooth_sm import sampling
from dreambooth_sm.data.assemble import encode_training_set
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.fidelity import Fidelity
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.latents import latent_channels
from dreambooth_sm.methods import Trainable
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.toybox import SIDE
from dreambooth_sm.training.loop import Trainer
from dreambooth_sm.training.schedule import Schedule
from toybox.examine import DRAWING_GUIDANCE, DRAWING_STEPS
from toybox.paint import paint
from toybox.toys import HELD_OUT, scenes_of

TRAINING_PICTURES = 5
# Class pictures to train on are nearer to what the base knows of the class with little guidance.
CLASS_GUIDANCE = 1.5
# One a background of the toybox, in its order.
PLACES = ("in the meadow", "on the beach", "in the snow", "on the street", "in a room", "on a table", "at night")


@dataclass(frozen=True)
class Case:
    """A subject and a seed, with what every variant trains on, as pictures and as files."""

    subject: str
    seed: int
    training: list[Image.Image]
    pictures: tuple[Path, ...]
    class_pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Drawn:
    """What a model draws: the subject in all places, and the class."""

    subject: list[Image.Image]
    of_class: list[Image.Image]


def make_case(subject: str, seed: int, class_pictures: tuple[Path, ...], work: Path) -> Case:
    training = [paint(scene) for scene in scenes_of(HELD_OUT[subject], TRAINING_PICTURES, seed)]
    return Case(subject, seed, training, save_pictures(training, work / f"{subject}-{seed}"), class_pictures)


def save_pictures(pictures: Sequence[Image.Image], directory: Path) -> tuple[Path, ...]:
    directory.mkdir(parents=True)
    paths = tuple(directory / f"{number:03d}.png" for number in range(len(pictures)))
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


def prompts(a_place: int) -> list[str]:
    """The subject in every place; place after place, so that the first ones make a row of a grid."""
    return [f"{PROMPTS['instance_prompt']} {place}" for _ in range(a_place) for place in PLACES]


def seeds_of_class(seed: int, count: int) -> list[int]:
    """Those of class pictures that are judged."""
    return [10**6 * (seed + 1) + number for number in range(count)]


def seeds_to_train_on(seed: int, count: int) -> list[int]:
    """Those of class pictures that are trained on."""
    return [10**8 * (seed + 1) + number for number in range(count)]


def train_on(case: Case, trainable: Trainable, h: Hyperparameters, plan: Plan, steps: int) -> Trainer:
    """A trainer of a case; the same data, order and noise for all of a case."""
    subject = Subject(
        pictures=case.pictures,
        prompt=str(h.instance_prompt),
        class_prompt=h.class_prompt,
        class_directory=case.class_pictures[0].parent,
        class_pictures=case.class_pictures if h.prior_preservation and h.prior == "images" else (),
    )
    data = encode_training_set(trainable.model, (subject,), h, plan, device=DEVICE, seed=case.seed)
    return Trainer(
        trainable,
        data,
        plan,
        h,
        Schedule(steps, 0, h.learning_rate),
        device=DEVICE,
        identity={"seed": case.seed},
        report=Reporter(stream=sys.stderr),
    )


@torch.no_grad()
def draw_together(
    model: PretrainedModel,
    plan: Plan,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance: float = DRAWING_GUIDANCE,
    steps: int = DRAWING_STEPS,
) -> list[Image.Image]:
    """Draws a picture a prompt, all in one batch, as jobs draw: with the text encoders' reading of all words that the
    model knows."""
    encoding = model.with_parts({part: sampling.drawing_part(model, plan, part) for part in model.text_parts})
    different = ["", *dict.fromkeys(prompts)]
    asked_for = [*[0] * len(prompts), *map(different.index, prompts)]  # the empty prompt's rows first
    conditions = embed(model.family, encoding, different, max_tokens=None).of(torch.tensor(asked_for, device=DEVICE))
    pipeline, family = sampling.make_sampler(model, plan, embedded={}).pipeline, model.family
    pipeline.vae.disable_slicing()
    denoiser = getattr(pipeline, family.facts.denoiser)
    scheduler = family.sampler(pipeline, steps, (SIDE, SIDE), DEVICE)
    side = SIDE // pipeline.vae_scale_factor
    shape = (latent_channels(pipeline.vae), side, side)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latents = torch.stack(noise).to(DEVICE) * getattr(scheduler, "init_noise_sigma", 1.0)
    for time in scheduler.timesteps:
        both = torch.cat([latents, latents]).to(denoiser.dtype)
        without, asked = family.predict(denoiser, both, time, conditions).float().chunk(2)
        latents = scheduler.step(family.guide(asked, without, guidance), time, latents, return_dict=False)[0]
    return sampling.decode(pipeline, latents)


def figures(found: Fidelity) -> dict[str, float]:
    return {name: round(value, 3) for name, value in dataclasses.asdict(found).items() if value is not None}
