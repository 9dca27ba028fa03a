"""What LoRA may do beside training its matrices: each option by a plain computation of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm.errors import UserError
from dreambooth_sm.models import PretrainedModel
from tests.helpers.training import Run, hyperparameters

VALUES: dict[str, Any] = {
    "method": "lora",
    "lora_rank": 4,
    "learning_rate": 1e-2,
    "max_train_steps": 3,
    "model_name": "zwx",
}


def offsets(run: Run, scale: float) -> list[torch.Tensor]:
    """What a merged model's weights are more than the base's."""
    values = {name: p.detach().double() for name, p in run.trainable.parameters.items()}
    downs = [name for name in values if ".lora_A." in name]
    return [scale * values[name.replace("_A.", "_B.")].flatten(1) @ values[name].flatten(1) for name in downs]


def test_the_penalty_is_the_squared_distance(base: PretrainedModel, tmp_path: Path) -> None:
    options = {"lora_targets": "all", "lora_alpha": 2, "train_text_encoder": True}
    held = Run(copy.deepcopy(base), tmp_path / "held", **VALUES, **options, distance_penalty=0.3)
    for _ in range(2):
        before = sum(float(offset.square().sum()) for offset in offsets(held, 2 / 4))
        loss = held.trainer.optimizer_step(1e-2)
        assert float(loss.total - loss.instance) == pytest.approx(0.3 * before, rel=1e-4, abs=1e-9)
    assert before > 0
    # Its gradient is that of the products themselves.
    loss = held.trainer.loss(held.data.batch_sampler.batch(2, 1))
    (loss.total - loss.instance).backward()
    parameters = held.trainable.parameters
    name = next(name for name in parameters if ".lora_A." in name and parameters[name].dim() == 4)
    down, up = (parameters[each].detach().clone().requires_grad_() for each in (name, name.replace("_A.", "_B.")))
    (0.3 * (2 / 4 * up.flatten(1) @ down.flatten(1)).square().sum()).backward()
    for each, plain in ((name, down), (name.replace("_A.", "_B."), up)):
        found = parameters[each].grad
        assert found is not None
        torch.testing.assert_close(found, plain.grad, rtol=1e-3, atol=1e-6)


def test_it_holds_what_drifts(base: PretrainedModel, tmp_path: Path) -> None:
    runs = [
        Run(copy.deepcopy(base), tmp_path / str(weight), **VALUES, distance_penalty=weight).train() for weight in (0, 1)
    ]
    free, held = (sum(float(offset.square().sum()) for offset in offsets(run, 1)) for run in runs)
    assert held < free


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"distance_penalty": 1, "lora_variant": "dora"}, "distance_penalty is for lora_variant=lora, and this job's"),
        ({"distance_penalty": 1, "method": "full"}, "distance_penalty belongs to method=lora"),
    ],
)
def test_what_belongs_to_lora_alone_is_refused_elsewhere(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        hyperparameters(**{"method": "lora", **values})
