"""DreamBooth on the toybox model: the subject is learned, and prior preservation keeps the class."""

from __future__ import annotations

import copy
import io
import threading
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
from dreambooth_sm.selection import Examiner
from dreambooth_sm.training.loop import Trainer
from dreambooth_sm.training.schedule import Schedule
from toybox import paint, toys

STEPS = 80
SETTINGS: dict[str, Any] = {
    "pretrained_model_name_or_path": toybox.NAME,
    "instance_prompt": "photo of zwx toy",
    "class_prompt": "photo of a toy",
    "resolution": 128,
    "train_batch_size": 4,
    "learning_rate": 2e-4,
    "prior_loss_weight": 1.0,
    "sample_batch_size": 8,
    "seed": 0,
}


@pytest.fixture(scope="module")
def toybox_base() -> PretrainedModel:
    return load_base(Hyperparameters.parse(SETTINGS))


@pytest.fixture(scope="module")
def subject(toybox_base: PretrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Five photos of a toy that the base never saw, and class pictures that it drew."""
    folder = tmp_path_factory.mktemp("subject")
    for number, scene in enumerate(toys.scenes_of(toys.HELD_OUT["teal_hatter"], 5, seed=0)):
        paint.paint(scene).save(folder / f"{number}.png")
    images = ClassImages(
        toybox_base.pipeline(),
        batch_size=8,
        guidance=1.5,
        remote=None,
        scratch=folder / "scratch",
        shown=folder / "shown",
        report=Reporter(io.StringIO()),
        stop=threading.Event(),
    )
    photos = Subject(tuple(sorted(folder.iterdir())), "photo of zwx toy", "photo of a toy", folder / "class", ())
    return images.complete(photos, [(128, 128)] * 24)


def learn(base: PretrainedModel, subject: Subject, root: Path, **settings: object) -> tuple[Fidelity, Fidelity, str]:
    """Figures before and after training, and the verdict's word."""
    h = Hyperparameters.parse(SETTINGS | settings)
    plan = make_plan(h, CPU)
    own = copy.deepcopy(base)
    if not h.prior_preservation:
        trained_on = Subject(subject.pictures, subject.prompt, None, subject.class_directory, ())
    else:
        trained_on = subject
    report = Reporter(io.StringIO())
    encoders = load_encoders("judge")
    trainable = METHODS[h.method].attach(own, plan, h, 0)
    examiner = Examiner(trainable, (subject,), encoders, h, plan, report)
    before = examiner.examine(0).fidelities[0]
    device = torch.device("cpu")
    data = encode_training_set(own, (trained_on,), h, plan, device=device, seed=0)
    schedule = Schedule(STEPS, 0, h.learning_rate)
    Trainer(trainable, data, plan, h, schedule, device=device, identity={"seed": 0}, report=report).train(
        root, threading.Event()
    )
    after = examiner.examine(STEPS).fidelities[0]
    real = measure_real(encoders, [paint.paint(scene) for scene in toys.scenes_of(toys.HELD_OUT["teal_hatter"], 5, 0)])
    return before, after, verdict(after, before, real).word


@pytest.fixture(scope="module", autouse=True)
def _fewer_pictures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PLACES", ("", "on the beach", "in the snow", "at night"))
        yield


def test_the_subject_is_learned_and_the_class_is_kept(
    toybox_base: PretrainedModel, subject: Subject, tmp_path: Path
) -> None:
    before, after, word = learn(toybox_base, subject, tmp_path)
    assert before.subject < 0.3
    assert after.subject > before.subject + 0.5
    assert before.diversity is not None
    assert after.diversity is not None
    assert after.diversity >= 0.85 * before.diversity
    assert after.prompt is not None
    assert after.prompt >= 0.75
    assert word == "good"


@pytest.mark.parametrize("settings", [{"with_prior_preservation": False}, {"prior_loss_weight": 0.0}])
def test_without_the_prior_loss_the_class_becomes_the_subject(
    settings: dict[str, object], toybox_base: PretrainedModel, subject: Subject, tmp_path: Path
) -> None:
    before, after, word = learn(toybox_base, subject, tmp_path, **settings)
    assert after.subject > before.subject + 0.5
    assert before.diversity is not None
    assert after.diversity is not None
    assert after.diversity < 0.75 * before.diversity
    assert before.prior is not None
    assert after.prior is not None
    assert after.prior > before.prior + 0.25
    assert word == "overfit"
