"""What several unit tests build: a tiny base model, pictures, training sets and trainers of it."""

from __future__ import annotations

import copy
import dataclasses
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_sm.data.assemble import encode_training_set
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.distributed import World
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS, Trainable
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import Card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.length import length_of
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.training.loop import Trainer, TrainingSet
from dreambooth_sm.training.schedule import make_schedule
from dreambooth_sm.training.train import Bench, train

CPU = torch.device("cpu")
SEED = 7
# Explicit wherever the plan would choose, so that the tests do not change when the plan does.
SMALL: dict[str, object] = {
    "instance_prompt": "photo of zwx toy",
    "resolution": 64,
    "center_crop": True,
    "max_train_steps": 4,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "mixed_precision": "no",
    "attention": "default",
    "gradient_checkpointing": False,
    "optimizer": "adamw",
    "train_text_encoder": False,
    "use_ema": False,
    "not_cache_latents": False,
    "with_prior_preservation": False,
    "max_grad_norm": 1.0,
    "seed": SEED,
}


def hyperparameters(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**SMALL, **values})


def cpu_plan(h: Hyperparameters) -> Plan:
    return make_plan(h, Card("CPU", memory_gib=0.0))


def paint_pictures(directory: Path, count: int, *, size: tuple[int, int] = (80, 64), seed: int = 0) -> list[Path]:
    """Blocks of colour, no two alike."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    paths: list[Path] = []
    for number in range(count):
        blocks = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        paths.append(directory / f"{number:02d}.png")
        blocks.resize(size, Image.Resampling.NEAREST).save(paths[-1])
    return paths


def make_subject(root: Path, *, pictures: int = 3, class_pictures: int = 0) -> Subject:
    return Subject(
        pictures=tuple(paint_pictures(root / "instance", pictures, seed=1)),
        prompt="photo of zwx toy",
        class_prompt="photo of a toy" if class_pictures else None,
        class_directory=root / "class",
        class_pictures=tuple(paint_pictures(root / "class", class_pictures, seed=2)),
    )


def make_set(
    base: PretrainedModel, subjects: Sequence[Subject], h: Hyperparameters, plan: Plan, seed: int = SEED
) -> TrainingSet:
    return encode_training_set(base, tuple(subjects), h, plan, device=CPU, seed=seed)


def attach(base: PretrainedModel, h: Hyperparameters, plan: Plan) -> Trainable:
    return METHODS[h.method].attach(base, plan, h, SEED)


class Recorder(Reporter):
    """Keeps the values of each metric line of training, unrounded, and sets ``stop`` at a step."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.steps: list[dict[str, float]] = []
        self.stop = threading.Event()
        self.stop_at: int | None = None

    def metrics(self, **values: object) -> None:
        super().metrics(**values)
        if "loss" in values:
            self.steps.append({k: float(v) for k, v in values.items() if isinstance(v, float | int)})
            if values["step"] == self.stop_at:
                self.stop.set()

    @property
    def losses(self) -> list[tuple[float, ...]]:
        """Total, instance and (with prior preservation) prior loss of each step."""
        names = ("loss", "instance_loss", "prior_loss")
        return [tuple(step[name] for name in names if name in step) for step in self.steps]


class Run:
    """A trainer of its own copy of a base model.

    Args:
        subject: one with ``pictures`` pictures of one size, and 4 class pictures if they are trained on, if left out.
        plan: what differs from the plan for the CPU, such as a rung's weights and optimizer.
        values: hyperparameters that differ from ``SMALL``.
    """

    def __init__(
        self,
        base: PretrainedModel,
        root: Path,
        *,
        pictures: int = 3,
        subject: Subject | None = None,
        plan: Mapping[str, Any] = MappingProxyType({}),
        **values: object,
    ) -> None:
        prior = bool(values.get("with_prior_preservation"))
        if prior:
            values.setdefault("class_prompt", "photo of a toy")
        self.root = root
        self.h = hyperparameters(**values)
        self.plan = dataclasses.replace(cpu_plan(self.h), **plan)
        self.base = copy.deepcopy(base)
        self.subject = subject or make_subject(root, pictures=pictures, class_pictures=4 if prior else 0)
        self.trainable = attach(self.base, self.h, self.plan)
        self.data = make_set(self.trainable.model, [self.subject], self.h, self.plan)
        self.schedule = make_schedule(self.h, length_of(self.h, len(self.subject.pictures)))
        self.recorder = Recorder()
        self.trainer = self.trainer_of(self.plan)

    def trainer_of(self, plan: Plan) -> Trainer:
        """One that trains the same model by a plan."""
        return Trainer(
            self.trainable,
            self.data,
            plan,
            self.h,
            self.schedule,
            device=CPU,
            identity={"seed": SEED},
            report=self.recorder,
        )

    def train(self, *, stop_at: int | None = None) -> Run:
        """Trains to the end, or raises StopRequested after step ``stop_at``."""
        self.recorder.stop_at = stop_at
        self.trainer.train(self.root / "checkpoints", self.recorder.stop)
        return self

    def train_on(self, bench: Bench, other: Run) -> None:
        """Trains this model on what another run reads, as the next subject of a fleet."""
        train(
            self.trainable,
            other.data,
            self.plan,
            other.h,
            other.schedule,
            {"seed": SEED},
            None,
            self.root / "checkpoints",
            report=other.recorder,
            stop=other.recorder.stop,
            world=World(),
            bench=bench,
        )

    def train_as_a_job(self) -> str:
        """Trains as a job does, with smaller plans where memory runs out; the log."""
        train(
            self.trainable,
            self.data,
            self.plan,
            self.h,
            self.schedule,
            {"seed": SEED},
            None,
            self.root / "checkpoints",
            report=self.recorder,
            stop=self.recorder.stop,
            world=World(),
        )
        return self.recorder.stream.getvalue()  # type: ignore[attr-defined, no-any-return]

    @property
    def losses(self) -> list[tuple[float, ...]]:
        return self.recorder.losses


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, at_steps: set[int]) -> None:
    """Each of these steps fails once, before it has changed anything."""
    step = Trainer.optimizer_step

    def failing(self: Trainer, rate: float) -> Any:
        if self.step in at_steps:
            at_steps.remove(self.step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return step(self, rate)

    monkeypatch.setattr(Trainer, "optimizer_step", failing)
