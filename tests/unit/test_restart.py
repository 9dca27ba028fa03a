"""One training after another with the same trainer: each is to the bit what it would be with a trainer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.training.loop import Trainer
from dreambooth_sm.training.train import Bench
from tests.helpers.training import Run, paint_pictures, same

LORA: dict[str, Any] = {"method": "lora", "learning_rate": 1e-2}
MASTER: dict[str, Any] = {"precision": "bf16", "weights": "master"}
EMA: dict[str, Any] = {"ema": "device"}
BLOCKWISE: dict[str, Any] = {"precision": "bf16", "weights": "residual", "optimizer": "blockwise", "state_bits": 8}
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw": ({}, EMA),
    "blockwise": ({"max_grad_norm": None}, BLOCKWISE | EMA | {"max_grad_norm": None, "update_in_backward": True}),
    "prodigy": (LORA, MASTER | {"optimizer": "prodigy"}),
}


def subject(root: Path, seed: int, pictures: int) -> Subject:
    return Subject(tuple(paint_pictures(root, pictures, seed=seed)), f"photo of zwx {seed}", None, root / "class", ())


@pytest.mark.slow
@pytest.mark.parametrize(("values", "plan"), PLANS.values(), ids=PLANS)
def test_a_training_after_another_is_as_if_alone(
    base: PretrainedModel, tmp_path: Path, values: dict[str, Any], plan: dict[str, Any]
) -> None:
    first, second, alone = (
        Run(base, tmp_path / str(n), subject=subject(tmp_path / f"of-{seed}", seed, 2 + seed), plan=plan, **values)
        for n, seed in enumerate((0, 1, 1))
    )
    begins = [first.trainer.updater.read(p).clone() for p in first.trainer.parameters]
    for run in (first, second):
        run.trainer.close()  # the bench has one of its own
    alone.train()
    bench = Bench()
    first.train_on(bench, first)
    kept = bench._trainer
    assert isinstance(kept, Trainer)
    memory = [tensor.data_ptr() for tensor in kept._memory]
    for parameter, value in zip(first.trainable.parameters.values(), begins, strict=True):
        parameter.data = value
    first.train_on(bench, second)
    assert bench._trainer is kept
    assert [tensor.data_ptr() for tensor in kept._memory] == memory
    assert second.losses == alone.losses != first.losses
    ended = ({name: p.detach() for name, p in run.trainable.parameters.items()} for run in (first, alone))
    assert same(*ended)
    assert all(p.dtype == torch.float32 for p in first.trainable.parameters.values())
