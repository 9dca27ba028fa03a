"""The plans for GPUs, run on the CPU: they learn as the fp32 reference does, resume bitwise, and step down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm.errors import StopRequested
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.training.checkpoint import latest_checkpoint
from tests.helpers.training import Run, hyperparameters, run_out_of_memory, same, weights

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"optimizer": "blockwise", "state_bits": 8, "update_in_backward": True, "max_grad_norm": None}
PLANS: dict[str, dict[str, Any]] = {
    "roomy": {**FAST, "precision": "bf16", "weights": "residual", "update_in_backward": False, "max_grad_norm": 1.0},
    "medium": {**FAST, "precision": "bf16", "weights": "residual"},
    "medium fp16": {**FAST, "precision": "fp16", "weights": "residual"},
    "lean": {**FAST, "precision": "bf16", "weights": "residual", "gradient_checkpointing": True},
    "16-bit state": {**FAST, "precision": "bf16", "weights": "residual", "state_bits": 16},
    "tight": {**FAST, "precision": "bf16", "weights": "stochastic", "gradient_checkpointing": True},
    "master": {"precision": "bf16", "weights": "master"},
    "tiny": {**FAST, "precision": "bf16", "weights": "stochastic", "gradient_checkpointing": True, "state_bits": 4},
}
JOB: dict[str, Any] = {"max_train_steps": 6, "learning_rate": 1e-3, "with_prior_preservation": True}


@pytest.fixture(scope="module")
def reference(loaded_base: PretrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of torch's AdamW in fp32."""
    run = Run(loaded_base, tmp_path_factory.mktemp("reference"), **JOB).train()
    return [loss[0] for loss in run.losses]


@pytest.mark.parametrize("name", PLANS)
def test_learns_as_the_reference_does(
    name: str, loaded_base: PretrainedModel, tmp_path: Path, reference: list[float]
) -> None:
    """Same data, order and noise, so the curves may be compared step by step.

    The measure: the mean distance of the curves, as a share of what the reference has learned. A plan whose updates
    are lost, doubled or of the wrong sign is off by a third and more, also after so few steps.
    """
    run = Run(loaded_base, tmp_path, plan=PLANS[name], **JOB).train()
    losses = [loss[0] for loss in run.losses]
    learned = reference[0] - sum(reference[-3:]) / 3
    assert learned > 0.3
    distance = sum(abs(a - b) for a, b in zip(losses, reference, strict=True)) / len(reference)
    assert distance / learned < (0.06 if PLANS[name]["weights"] == "stochastic" else 0.04)


@pytest.mark.parametrize(
    ("name", "text_encoder"), [("medium", False), ("medium", True), ("medium fp16", True), ("tiny", True)]
)
def test_a_base_that_waits_in_half_precision_trains_the_same_to_the_bit(
    name: str, text_encoder: bool, base: PretrainedModel, tmp_path: Path
) -> None:
    base.save(tmp_path / "half")
    h = hyperparameters(pretrained_model_name_or_path=str(tmp_path / "half"))
    options = JOB | {"max_train_steps": 2, "train_text_encoder": text_encoder}
    full, half = (
        Run(load_base(h, dtype), tmp_path / str(dtype), plan=PLANS[name], **options).train()
        for dtype in (torch.float32, None)
    )
    assert full.losses == half.losses
    for module in ("unet", "text_encoder"):
        assert same(weights(getattr(full.base, module)), weights(getattr(half.base, module)))


@pytest.mark.parametrize("name", ["medium", "master", "tiny"])
def test_an_interrupted_job_has_the_losses_of_an_uninterrupted_one(
    name: str, loaded_base: PretrainedModel, tmp_path: Path
) -> None:
    options = JOB | {"max_train_steps": 4, "use_ema": True}
    changes = PLANS[name] | {"ema": "device"}
    whole = Run(loaded_base, tmp_path / "whole", plan=changes, **options).train()
    first = Run(loaded_base, tmp_path / "parts", plan=changes, **options)
    with pytest.raises(StopRequested):
        first.train(stop_at=2)
    second = Run(loaded_base, tmp_path / "parts", plan=changes, **options)
    checkpoint = latest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert checkpoint is not None
    second.trainer.resume(checkpoint)
    second.train()
    assert first.losses + second.losses == whole.losses
    assert same(weights(second.base.unet), weights(whole.base.unet))


def test_a_checkpoint_of_a_smaller_plan_can_be_continued(loaded_base: PretrainedModel, tmp_path: Path) -> None:
    """A job that stepped down and was interrupted: its successor begins with the larger plan again."""
    options = JOB | {"max_train_steps": 8}
    stepped_down = Run(loaded_base, tmp_path, plan=PLANS["tiny"], **options)
    with pytest.raises(StopRequested):
        stepped_down.train(stop_at=6)
    successor = Run(loaded_base, tmp_path, plan=PLANS["medium"], **options)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    successor.trainer.resume(checkpoint)
    successor.train()
    assert "start from zero" in successor.recorder.stream.getvalue()  # type: ignore[attr-defined]
    assert [step["step"] for step in successor.recorder.steps] == [7, 8]
    assert all(loss[0] < 0.8 * stepped_down.losses[0][0] for loss in successor.losses)


@pytest.mark.parametrize("name", ["reference", "master", "medium"])
def test_out_of_memory_steps_down_and_continues(
    name: str, loaded_base: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = JOB | {"max_train_steps": 4, "gradient_checkpointing": "auto", "use_ema": True}
    changes = PLANS.get(name, {}) | {"ema": "device"}
    whole = Run(loaded_base, tmp_path / "whole", plan=changes, **options).train()
    run = Run(loaded_base, tmp_path / "stepped", plan=changes, **options)
    run.trainer.finish()  # the job makes trainers of its own
    run_out_of_memory(monkeypatch, {0, 2})
    log = run.train_as_a_job()
    assert log.count("warning: out of memory") == 2
    assert "continuing after step 2" in log
    assert [step["step"] for step in run.recorder.steps] == [1, 2, 3, 4]
    for stepped, uninterrupted in zip(run.losses, whole.losses, strict=True):
        assert stepped == pytest.approx(uninterrupted, rel=0.02)
