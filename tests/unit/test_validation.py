"""Validation pictures: those of the model at that step, and training as it would be without them."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth_sm import sampling
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.errors import UserError
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.report import Listener, Reporter, ValidationPicture
from dreambooth_sm.validation import Validator, take_over_pictures, validation_prompts
from tests.helpers.training import Run, attach, hyperparameters, make_subject, same, weights

pytestmark = pytest.mark.usefixtures("quick_drawing")

PLANS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fast": {
        "optimizer": "blockwise",
        "state_bits": 8,
        "update_in_backward": True,
        "max_grad_norm": None,
        "precision": "bf16",
        "weights": "residual",
        "gradient_checkpointing": True,
        "train_text_encoder": True,
    },
    "average": {"ema": "device"},
    "latents not cached": {"cache_latents": False},
}
JOB: dict[str, Any] = {
    "learning_rate": 1e-2,
    "validation_prompt": "photo of zwx toy | a cat",
    "validation_steps": 2,
    "num_validation_images": 2,
}


def train(base: PretrainedModel, root: Path, plan: dict[str, Any], *, steps: int, validate: bool) -> Run:
    run = Run(base, root, plan=plan, max_train_steps=steps, train_text_encoder="train_text_encoder" in plan, **JOB)
    prompts = validation_prompts(run.h, (run.subject,))
    validator = Validator(
        attach(copy.deepcopy(base), run.h, run.plan), prompts, run.h, run.plan, root / "samples", run.recorder
    )
    run.trainer.train(root / "checkpoints", run.recorder.stop, [validator] if validate else [])
    return run


def draw(base: PretrainedModel, run: Run, directory: Path, *, step: int) -> list[ValidationPicture]:
    """What a run's validator draws with a model as it is."""
    report = Reporter(io.StringIO())
    Validator(attach(base, run.h, run.plan), validation_prompts(run.h, ()), run.h, run.plan, directory, report).draw(
        step
    )
    return report.samples


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_training_is_the_same_and_pictures_are_the_models(name: str, base: PretrainedModel, tmp_path: Path) -> None:
    with_ = train(base, tmp_path / "with", PLANS[name], steps=4, validate=True)
    without = train(base, tmp_path / "without", PLANS[name], steps=4, validate=False)
    assert with_.losses == without.losses
    for part in ("unet", "text_encoder"):
        assert same(weights(getattr(with_.base, part)), weights(getattr(without.base, part)))
    drawn = with_.recorder.samples
    assert [(s.step, s.prompt) for s in drawn] == [(2, "photo of zwx toy")] * 2 + [(2, "a cat")] * 2

    short = train(base, tmp_path / "short", PLANS[name], steps=2, validate=False)
    after = draw(short.base, short, tmp_path / "after", step=2)
    before = draw(base, short, tmp_path / "before", step=0)
    for mine, expected, untrained in zip(drawn, after, before, strict=True):
        assert np.array_equal(pixels(mine.path), pixels(expected.path))
        assert mine.path.name == expected.path.name
        assert not np.array_equal(pixels(mine.path), pixels(untrained.path))


def test_pictures_know_their_prompt_and_seed(base: PretrainedModel, tmp_path: Path) -> None:
    h = hyperparameters(validation_prompt="a “toy” at night")
    run = Run(base, tmp_path)
    validator = Validator(run.trainable, validation_prompts(h, ()), h, run.plan, tmp_path / "samples", run.recorder)
    validator.draw(0)
    validator.draw(7)
    first, second = run.recorder.samples
    assert (first.seed, second.step) == (second.seed, 7)
    with Image.open(second.path) as picture:
        assert picture.text["prompt"] == "a “toy” at night"  # type: ignore[attr-defined]
        assert f"Seed: {second.seed}" in picture.text["parameters"]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_later_attempt_draws_what_is_missing_alone(base: PretrainedModel, tmp_path: Path) -> None:
    h = hyperparameters(validation_prompt="a toy", num_validation_images=2)
    run = Run(base, tmp_path)
    drawn: list[ValidationPicture] = []

    class Remembers(Listener):
        def drew(self, pictures: Sequence[ValidationPicture]) -> None:
            drawn.extend(pictures)

    run.recorder.listeners.append(Remembers())
    validator = Validator(run.trainable, ("a toy",), h, run.plan, tmp_path / "samples", run.recorder)
    validator.draw(0)
    missing = run.recorder.samples.pop(0)
    missing.path.unlink()
    validator.draw(0)
    assert drawn == [missing, *run.recorder.samples[:1], missing]
    assert {sample.path for sample in drawn} == set((tmp_path / "samples").iterdir())


@pytest.mark.slow
def test_whole_pictures_of_earlier_attempts_come_beside_those_of_other_jobs(
    base: PretrainedModel, tmp_path: Path
) -> None:
    run = Run(base, tmp_path)
    validator = Validator(run.trainable, ("one", "two"), run.h, run.plan, tmp_path / "earlier", run.recorder)
    validator.draw(0)
    whole, half = (sample.path for sample in run.recorder.samples)
    half.write_bytes(half.read_bytes()[:-9])
    here = tmp_path / "samples"
    here.mkdir()
    others = {"step-000400-prompt-0-seed-2000-0123abcd.png": b"another job's", "mine.png": b"the user's"}
    for name, content in others.items():
        (here / name).write_bytes(content)
    take_over_pictures(tmp_path / "earlier", here)
    found = {path.name: path.read_bytes() for path in here.iterdir()}
    assert found == others | {whole.name: whole.read_bytes()}


def test_the_class_is_drawn_as_well(tmp_path: Path) -> None:
    subject = make_subject(tmp_path, class_pictures=1)
    assert validation_prompts(hyperparameters(validation_prompt="one|two|one|"), (subject, subject)) == (
        "one",
        "two",
        "photo of a toy",
    )
    assert validation_prompts(hyperparameters(), (subject,)) == ()
    with pytest.raises(UserError, match="validation_prompt"):
        hyperparameters(validation_steps=5)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_prompts_are_read_once_unless_their_reading_is_trained(
    base: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    """A text encoder may be larger than what training leaves of a card."""
    run = Run(base, tmp_path, train_text_encoder=trained, **JOB)
    validator = Validator(
        attach(base, run.h, run.plan), ("a cat",), run.h, run.plan, tmp_path / "samples", run.recorder
    )
    reads: list[object] = []
    monkeypatch.setattr(sampling, "embed", lambda *rest, **named: reads.append(rest) or embed(*rest, **named))
    validator.draw(0)
    assert len(reads) == 1
    validator.look(run.trainer.weights_now(), 2)
    assert len(reads) == 1 + trained
    assert len(run.recorder.samples) == 4
