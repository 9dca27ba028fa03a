"""The best checkpoint is the one that is exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm import selection
from dreambooth_sm.errors import StopRequested
from dreambooth_sm.fidelity import Encoders, Fidelity
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.measuring import PLACES
from dreambooth_sm.report import measure_pattern
from dreambooth_sm.selection import Examiner, restore
from dreambooth_sm.training.checkpoint import all_checkpoints
from tests.helpers.training import Run, same, weights


class Flat:
    """Every picture is the same to it."""

    def embed(self, pictures: object) -> torch.Tensor:
        return torch.ones(len(pictures), 1)  # type: ignore[arg-type]


def scripted(monkeypatch: pytest.MonkeyPatch, subjects: list[float]) -> None:
    """Lets each measurement find the next of these subject fidelities."""
    left = list(subjects)
    monkeypatch.setattr(selection, "measure", lambda *_, **__: Fidelity(subject=left.pop(0), nearest=0.0))
    monkeypatch.setattr(selection, "draw", lambda pipeline, prompt, seeds, **_: iter([[None] * len(seeds)]))


def trained(base: PretrainedModel, root: Path, **options: object) -> Run:
    """Four steps, with checkpoints after the second, third and last."""
    return Run(base, root, max_train_steps=4, save_steps=1, checkpoints_total_limit=3, **options).train()


def examiner(run: Run) -> Examiner:
    return Examiner(run.trainable, (run.subject,), Encoders(Flat()), run.h, run.plan, run.recorder)


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True], ids=["weights", "average"])
@pytest.mark.parametrize(
    ("final", "second", "third", "best"), [(0.9, 0.5, 0.8, 4), (0.6, 0.9, 0.8, 2), (0.7, 0.7, 0.7, 4)]
)
def test_the_best_one_is_left_in_the_model(
    base: PretrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    final: float,
    second: float,
    third: float,
    best: int,
    ema: bool,
) -> None:
    scripted(monkeypatch, [0.1, final, second, third])
    run = trained(base, tmp_path, use_ema=ema)
    at_the_end = weights(run.base.unet)
    *kept, _ = all_checkpoints(tmp_path / "checkpoints")
    assert [checkpoint.step for checkpoint in kept] == [2, 3]
    found = examiner(run).choose(kept, 4)
    assert found.step == best
    if best == 4:
        assert same(weights(run.base.unet), at_the_end)
    else:
        # A job that was stopped there: the same data, so the same weights.
        stopped = Run(base, tmp_path / "stopped", max_train_steps=4, use_ema=ema)
        with pytest.raises(StopRequested):
            stopped.train(stop_at=best)
        stopped.trainer.finish()
        assert same(weights(run.base.unet), weights(stopped.base.unet))
    log = run.recorder.stream.getvalue()  # type: ignore[union-attr]
    for step in (0, 2, 3, 4):
        assert f"candidate={step} score=" in log
    assert f"best={best} " in log


@pytest.mark.slow
def test_what_is_measured_while_training_continues_is_measured_once(
    base: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.1, 0.9, 0.5, 0.6])  # before, after steps 2 and 3, at the end
    run = Run(
        base,
        tmp_path,
        max_train_steps=4,
        save_steps=1,
        checkpoints_total_limit=3,
        fidelity_encoders="judge",
        fidelity_steps=1,
    )
    watching = examiner(run)
    drawn: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(watching, "is_due", lambda step: step in (2, 3))
    measured = watching._measure

    def noting(model: PretrainedModel, batch_size: int) -> Any:
        drawn.append(weights(model.unet))
        return measured(model, batch_size)

    monkeypatch.setattr(watching, "_measure", noting)
    run.trainer.train(tmp_path / "checkpoints", run.recorder.stop, [watching])
    undisturbed = Run(base, tmp_path / "undisturbed", max_train_steps=4).train()
    assert same(weights(run.base.unet), weights(undisturbed.base.unet))
    *kept, _ = all_checkpoints(tmp_path / "checkpoints")
    assert watching.choose(kept, 4).step == 2
    assert len(drawn) == 3  # on the way, and at the end
    assert not same(drawn[0], drawn[1])
    log = run.recorder.stream.getvalue()  # type: ignore[union-attr]
    found = [re.search(measure_pattern("score"), line) for line in log.splitlines()]
    assert [float(match[1]) for match in found if match] == [0.9, 0.5, 0.6, 0.9]


@pytest.mark.slow
def test_restoring_a_checkpoint_is_exact(base: PretrainedModel, tmp_path: Path) -> None:
    run = trained(base, tmp_path)
    checkpoint = all_checkpoints(tmp_path / "checkpoints")[-1]
    restore(run.trainable.parameters, checkpoint.load())
    saved = checkpoint.load()["weights"]
    assert all(torch.equal(parameter, saved[f"unet.{name}"]) for name, parameter in run.base.unet.named_parameters())


@pytest.mark.slow
def test_what_was_learned_is_measured_in_every_place(
    base: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real drawing and measuring, with an encoder that finds all pictures alike: a perfect and collapsed model."""
    run = Run(base, tmp_path, max_train_steps=1, with_prior_preservation=True).train()
    asked: list[str] = []
    draw = selection.draw

    def noting(pipeline: Any, prompt: str, seeds: list[int], **options: Any) -> Any:
        asked.append(prompt)
        return draw(pipeline, prompt, seeds, steps=5, **options)  # shows what 25 show

    monkeypatch.setattr(selection, "draw", noting)
    monkeypatch.setattr(selection, "CLASS_PICTURES", 2)
    candidate = examiner(run).examine(1)
    assert candidate.fidelities[0].subject == pytest.approx(1)
    assert candidate.fidelities[0].diversity == pytest.approx(0)
    assert {f"photo of zwx toy {place}".strip() for place in PLACES} < set(asked)
