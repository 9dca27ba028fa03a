"""Does DreamBooth learn its subject and keep its class? Every plan on the toybox, subjects that the base never saw.

    python -m benchmarks.fidelity [--subjects 3] [--seeds 2] [--steps 200] [--variants NAME ...] [--curve STEPS ...]
                                  [--peer path/to/train_dreambooth.py] [--out DIR]

One JSON line a run, then one a variant with means and standard deviations over subjects and seeds. Pictures are judged
by the toybox's judge; ``real`` are the subject's own pictures, ``base`` the model before training. ``reference`` is
AdamW in fp32 with prior preservation, ``no_prior`` the same without it, ``prior_output`` the same with the base model's
output instead of class images (``prior=output``), the others are plans of the ladder, and
``diffusers`` is its own script in the reference's settings; all train the UNet alone, on the same pictures. ``--curve``
measures one subject after these steps, with prior preservation and without. ``--out`` gets a grid for each subject of
the first seed: real pictures, then the subject as drawn by the base, the reference and without prior preservation, then
class pictures of the same three.

On a CPU, name few: ``--subjects 1 --seeds 1 --variants reference no_prior``, some three minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from benchmarks.common import DEVICE, PROMPTS, emit, plan_of_rung
from benchmarks.studio import (
    CLASS_GUIDANCE,
    Case,
    Drawn,
    figures,
    make_case,
    prompts,
    save_pictures,
    seeds_of_class,
    seeds_to_train_on,
    train_on,
)
from dreambooth_sm import sampling, toybox
from dreambooth_sm.fidelity import Fidelity, load_encoders, measure, measure_real, score, verdict
from dreambooth_sm.gallery import grid
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.ladder import Rung
from dreambooth_sm.quiet import quiet_libraries
from dreambooth_sm.toybox import SIDE
from dreambooth_sm.toybox.labels import BACKGROUNDS
from dreambooth_sm.training.loop import Trainer
from toybox import examine
from toybox.paint import paint
from toybox.toys import HELD_OUT, scenes_of

# Pictures that are judged: of the subject in each place, and of the class.
A_PLACE, OF_CLASS = (4, 64) if DEVICE.type == "cuda" else (2, 24)
# A variant is a rung of the ladder in a precision, or AdamW in fp32. Rungs that differ in the text encoder and EMA
# alone are one here.
VARIANTS: dict[str, tuple[Rung | None, str]] = {
    "reference": (None, "fp32"),
    "no_prior": (None, "fp32"),
    "prior_output": (None, "fp32"),
    **{rung.name: (rung, "bf16") for rung in METHODS["full"].ladder if rung.name not in ("large", "lean")},
    "medium_fp16": (next(rung for rung in METHODS["full"].ladder if rung.name == "medium"), "fp16"),
}
# diffusers' script runs beside ours; more at a time, or more threads, would only hold everything up.
PEERS_AT_A_TIME, PEER_THREADS = 2, {"OMP_NUM_THREADS": "2"}
FIGURES = tuple(field.name for field in dataclasses.fields(Fidelity))


class Studio:
    """Draws with the base model, or with other weights of its UNet."""

    def __init__(self, base: PretrainedModel) -> None:
        own = base.with_parts({part: base.copy_of(part, DEVICE, torch.float32) for part in base.modules})
        self._pipeline, self._base_weights = own.pipeline(), list(base.unet.parameters())

    def draw(self, seed: int, weights: Iterable[Tensor] | None = None) -> Drawn:
        """The same noise for every model; :meth:`class_pictures` of other seeds."""
        self._put(weights)
        subject = examine.draw(self._pipeline, prompts(A_PLACE), seed, batch=256)
        return Drawn(subject, self._draw_class(seeds_of_class(seed, OF_CLASS)))

    def class_pictures(self, seed: int, count: int) -> list[Image.Image]:
        """The base model's, to train on."""
        self._put(None)
        return self._draw_class(seeds_to_train_on(seed, count), guidance=CLASS_GUIDANCE)

    @torch.no_grad()
    def _put(self, weights: Iterable[Tensor] | None) -> None:
        values = self._base_weights if weights is None else weights
        for mine, value in zip(self._pipeline.unet.parameters(), values, strict=True):
            mine.copy_(value)

    def _draw_class(self, seeds: list[int], guidance: float = examine.DRAWING_GUIDANCE) -> list[Image.Image]:
        batches = sampling.draw(
            self._pipeline,
            PROMPTS["class_prompt"],
            seeds,
            resolution=SIDE,
            batch_size=256,
            steps=examine.DRAWING_STEPS,
            guidance=guidance,
        )
        return [picture for batch in batches for picture in batch]


def make_trainer(variant: str, case: Case, base: PretrainedModel, options: argparse.Namespace, steps: int) -> Trainer:
    """Trains a copy of the base's UNet; the same data, order and noise for every variant of a case."""
    has_prior = variant != "no_prior"
    h = Hyperparameters.parse(
        {
            "instance_prompt": PROMPTS["instance_prompt"],
            **({"class_prompt": PROMPTS["class_prompt"]} if has_prior else {}),
            "resolution": SIDE,
            "train_batch_size": options.batch,
            "learning_rate": options.learning_rate,
            "prior_loss_weight": options.prior_loss_weight,
            "prior": "output" if variant == "prior_output" else "images",
            "num_class_images": options.class_pictures,
            "seed": case.seed,
        }
    )
    plan = plan_of_rung(h, *VARIANTS[variant])
    return train_on(case, METHODS[h.method].attach(copy.deepcopy(base), plan, h, 0), h, plan, steps)


def trained_weights(trainer: Trainer, until: int) -> list[Tensor]:
    """The UNet's weights after so many steps in all."""
    while trainer.step < until:
        trainer.optimizer_step(trainer.h.learning_rate)
    return [trainer.updater.read(parameter) for parameter in trainer.parameters]


def run_peer(case: Case, script: Path, options: argparse.Namespace, work: Path) -> int:
    """diffusers' script in the reference's settings, in a process of its own; its exit code."""
    out = peer_directory(case, work)
    values = {
        "pretrained_model_name_or_path": toybox.BASE,
        "instance_data_dir": case.pictures[0].parent,
        "class_data_dir": case.class_pictures[0].parent,
        **PROMPTS,
        "num_class_images": len(case.class_pictures),
        "resolution": SIDE,
        "train_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "max_train_steps": options.steps,
        "checkpointing_steps": 10 * options.steps,
        "output_dir": out,
        "prior_loss_weight": options.prior_loss_weight,
        "seed": case.seed,
    }
    command = [sys.executable, str(script), "--with_prior_preservation", *(f"--{k}={v}" for k, v in values.items())]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | PEER_THREADS).returncode


def peer_directory(case: Case, work: Path) -> Path:
    return work / f"diffusers-{case.subject}-{case.seed}"


class Record:
    """Measures what was drawn, prints each run, and keeps the figures for the summary."""

    def __init__(self) -> None:
        self._encoders = load_encoders(device=DEVICE)
        self._runs: dict[str, list[Fidelity]] = defaultdict(list)
        self._base: dict[tuple[str, int], Fidelity] = {}

    def add(self, variant: str, case: Case, drawn: Drawn, seconds: float, *, steps: int, counts: bool = True) -> None:
        """Prints the figures of one run; with ``counts``, they go into the summary."""
        found = self._measure(case, drawn)
        base = self._base.setdefault((case.subject, case.seed), found)
        words = verdict(found, base, measure_real(self._encoders, case.training))
        if counts:
            self._runs[variant].append(found)
        emit(
            variant=variant,
            toy=case.subject,
            seed=case.seed,
            steps=steps,
            **figures(found),
            score=round(score(found, base), 3),
            verdict=words.word,
            reason=words.reason,
            seconds=round(seconds, 1),
        )

    def add_real(self, case: Case) -> None:
        found = measure_real(self._encoders, case.training)
        self._runs["real"].append(found)
        emit(variant="real", toy=case.subject, seed=case.seed, **figures(found))

    def summarise(self) -> None:
        for variant, found in self._runs.items():
            emit(summary=variant, runs=len(found), **dict(_means(found)))

    def _measure(self, case: Case, drawn: Drawn) -> Fidelity:
        return measure(
            self._encoders,
            training=case.training,
            generated=drawn.subject,
            prompts=prompts(A_PLACE),
            class_pictures=drawn.of_class,
        )


def _means(found: Sequence[Fidelity]) -> Iterator[tuple[str, list[float]]]:
    """Mean and standard deviation of each figure."""
    for name in FIGURES:
        values = [value for value in (getattr(fidelity, name) for fidelity in found) if value is not None]
        if values:
            yield name, [round(statistics.mean(values), 3), round(statistics.pstdev(values), 3)]


def save_grid(case: Case, drawn: dict[str, Drawn], out: Path) -> None:
    """Rows of one picture a background; see the module."""
    out.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(HELD_OUT[case.subject], len(BACKGROUNDS), case.seed)
    real = [paint(scene) for scene in sorted(scenes, key=lambda scene: BACKGROUNDS.index(scene.background))]
    shown = [drawn[name] for name in ("base", "reference", "no_prior") if name in drawn]
    rows = [real, *(one.subject for one in shown), *(one.of_class for one in shown)]
    columns = len(BACKGROUNDS)
    pictures = [picture for row in rows for picture in row[:columns]]
    grid(pictures, columns).save(out / f"{case.subject}.png")


def run_curve(case: Case, base: PretrainedModel, studio: Studio, record: Record, options: argparse.Namespace) -> None:
    """Finds where overfitting starts: the figures after more and more steps."""
    for variant in ("reference", "no_prior"):
        trainer = make_trainer(variant, case, base, options, max(options.curve))
        for steps in sorted(options.curve):
            started = time.perf_counter()
            weights = trained_weights(trainer, steps)
            seconds = time.perf_counter() - started
            record.add(variant, case, studio.draw(case.seed, weights), seconds, steps=steps, counts=False)
        trainer.make_step.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--curve", nargs="*", type=int, default=[])
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--class_pictures", type=int, default=48)
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    base = load_base(Hyperparameters.parse({**PROMPTS, "pretrained_model_name_or_path": toybox.NAME}))
    studio, record = Studio(base), Record()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cases = []
        for seed in range(options.seeds):
            class_pictures = save_pictures(studio.class_pictures(seed, options.class_pictures), work / f"class-{seed}")
            cases += [make_case(subject, seed, class_pictures, work) for subject in list(HELD_OUT)[: options.subjects]]
        peers = ThreadPoolExecutor(PEERS_AT_A_TIME)
        runs = [(case, peers.submit(run_peer, case, options.peer, options, work)) for case in cases if options.peer]
        of_base = [studio.draw(seed) for seed in range(options.seeds)]
        for case in cases:
            record.add_real(case)
            drawn = {"base": of_base[case.seed]}
            record.add("base", case, drawn["base"], 0.0, steps=0)
            for variant in options.variants:
                started = time.perf_counter()
                trainer = make_trainer(variant, case, base, options, options.steps)
                weights = trained_weights(trainer, options.steps)
                seconds = time.perf_counter() - started
                trainer.make_step.close()
                drawn[variant] = studio.draw(case.seed, weights)
                record.add(variant, case, drawn[variant], seconds, steps=options.steps)
            if options.out and case.seed == 0:
                save_grid(case, drawn, options.out)
        if options.curve:
            run_curve(cases[0], base, studio, record, options)
        for case, code in runs:
            if code.result():
                log = peer_directory(case, work).with_suffix(".log").read_text(errors="replace")
                emit(variant="diffusers", toy=case.subject, seed=case.seed, error=log[-500:])
                continue
            unet = UNet2DConditionModel.from_pretrained(peer_directory(case, work) / "unet")
            record.add("diffusers", case, studio.draw(case.seed, unet.parameters()), 0.0, steps=options.steps)
        record.summarise()


if __name__ == "__main__":
    main()
