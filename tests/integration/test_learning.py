"""DreamBooth on the toybox model: without prior preservation the subject is learned, and the class is lost.

That it keeps the class is what the demo's test shows (`test_demo.py`), with the same figures.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm import selection, toybox
from dreambooth_sm.data.assemble import encode_training_set
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.prior import ClassImages
from dreambooth_sm.fidelity import Fidelity, load_encoders, measure_real, verdict
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.cards import CPU
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.sampling import Sampler
from dreambooth_sm.selection import Examiner
from dreambooth_sm.training.loop import Trainer
from dreambooth_sm.training.schedule import Schedule
from tests.helpers.drawing import draw_otherwise
from toybox import paint, toys

STEPS = 30
SETTINGS: dict[str, Any] = {
    "pretrained_model_name_or_path": toybox.NAME,
    "instance_prompt": "photo of zwx toy",
    "class_prompt": "photo of a toy",
    "resolution": 128,
    "train_batch_size": 4,
    "learning_rate": 4e-4,
    "prior_loss_weight": 1.0,
    "sample_batch_size": 8,
    "seed": 0,
}
WITHOUT = {"with_prior_preservation": False}


@pytest.fixture(scope="module")
def toybox_base() -> PretrainedModel:
    return load_base(Hyperparameters.parse(SETTINGS))


@pytest.fixture(scope="module")
def subject(toybox_base: PretrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Five photos of a toy that the base never saw, and class pictures that it drew."""
    folder = tmp_path_factory.mktemp("subject")
    for number, scene in enumerate(toys.scenes_of(toys.HELD_OUT["teal_hatter"], 5, seed=0)):
        paint.paint(scene).save(folder / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        draw_otherwise(patch.setattr, class_steps=10)
        images = ClassImages(
            toybox_base.pipeline(),
            weights="the toybox's",
            draw_with=lambda: Sampler(toybox_base.pipeline()),
            batch_size=8,
            guidance=1.5,
            remote=None,
            scratch=folder / "scratch",
            shown=folder / "shown",
            report=Reporter(io.StringIO()),
            stop=threading.Event(),
        )
    photos = Subject(tuple(sorted(folder.iterdir())), "photo of zwx toy", "photo of a toy", folder / "class", ())
    return images.complete(photos, [(128, 128)] * 4)


@dataclass
class Student:
    """A copy of the base model to train on the subject, with or without class pictures, as settings say."""

    base: PretrainedModel
    subject: Subject
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.h = Hyperparameters.parse({**SETTINGS, **self.settings})
        self.plan = make_plan(self.h, CPU)
        self.own = copy.deepcopy(self.base)
        self.trainable = METHODS[self.h.method].attach(self.own, self.plan, self.h, 0)
        self.report = Reporter(io.StringIO())

    def learn(self, steps: int, root: Path) -> Student:
        photos = Subject(self.subject.pictures, self.subject.prompt, None, self.subject.class_directory, ())
        trained_on = self.subject if self.h.prior_preservation else photos
        device = torch.device("cpu")
        data = encode_training_set(self.own, (trained_on,), self.h, self.plan, device=device, seed=0)
        schedule = Schedule(steps, 0, self.h.learning_rate)
        Trainer(
            self.trainable,
            data,
            self.plan,
            self.h,
            schedule,
            device=device,
            identity={"seed": 0},
            report=self.report,
        ).train(root, threading.Event())
        return self

    def examine(self) -> Fidelity:
        """The figures of the model as it is now."""
        encoders = load_encoders("judge")
        examiner = Examiner(self.trainable, (self.subject,), encoders, self.h, self.plan, self.report)
        return examiner.examine(0).fidelities[0]


def word_for(after: Fidelity, before: Fidelity) -> str:
    """The verdict's word."""
    painted = [paint.paint(scene) for scene in toys.scenes_of(toys.HELD_OUT["teal_hatter"], 5, 0)]
    return verdict(after, before, measure_real(load_encoders("judge"), painted)).word


@pytest.fixture(scope="module", autouse=True)
def _fewer_pictures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PLACES", ("", "on the beach", "in the snow", "at night"))
        patch.setattr(selection, "draw", partial(selection.draw, steps=10))
        yield


@pytest.fixture(scope="module")
def before(toybox_base: PretrainedModel, subject: Subject) -> Fidelity:
    """The figures of the base model."""
    return Student(toybox_base, subject).examine()


def test_without_the_prior_loss_the_class_becomes_the_subject(
    toybox_base: PretrainedModel, subject: Subject, before: Fidelity, tmp_path: Path
) -> None:
    after = Student(toybox_base, subject, WITHOUT).learn(STEPS, tmp_path).examine()
    assert after.subject > before.subject + 0.5
    assert before.diversity is not None
    assert after.diversity is not None
    assert after.diversity < 0.75 * before.diversity
    assert before.prior is not None
    assert after.prior is not None
    assert after.prior > before.prior + 0.25
    assert word_for(after, before) == "overfit"


def test_a_prior_loss_without_weight_is_none(toybox_base: PretrainedModel, subject: Subject, tmp_path: Path) -> None:
    """The same weights, up to rounding, and so the same fate."""
    without, weightless, with_prior = (
        Student(toybox_base, subject, settings).learn(3, tmp_path / str(number)).trainable.parameters
        for number, settings in enumerate((WITHOUT, {"prior_loss_weight": 0.0}, {}))
    )

    def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
        return sum((one[name] - other[name]).abs().sum().item() for name in one)

    assert distance(weightless, without) < 1e-3 * distance(weightless, with_prior)
