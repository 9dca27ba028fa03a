"""What LoRA may do beside training its matrices: each option by a plain computation of its own."""

from __future__ import annotations

import copy
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreambooth_sm.adapters.peft_layers import inject, mask_ranks, parameters_of
from dreambooth_sm.adapters.rank_mask import RankMask, TrainedRows
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.training.checkpoint import latest_checkpoint
from tests.helpers.training import Run, hyperparameters, same

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_it_holds_what_drifts(base: PretrainedModel, tmp_path: Path) -> None:
    runs = [
        Run(copy.deepcopy(base), tmp_path / str(weight), **VALUES, distance_penalty=weight).train() for weight in (0, 1)
    ]
    free, held = (sum(float(offset.square().sum()) for offset in offsets(run, 1)) for run in runs)
    assert held < free


def plain_mask(noise: float, name: str, size: int, dropout: float) -> list[float]:
    """Of a row, by Python's integers: a 32-bit hash of the row's first noise, the layer's name and each place."""

    def scatter(number: int) -> int:
        number = ((number >> 16) ^ number) * 0x7FEB352D % 2**32
        number = ((number >> 15) ^ number) * 0x846CA68B % 2**32
        return (number >> 16) ^ number

    (bits,) = struct.unpack("<I", struct.pack("<f", noise))
    start = scatter(bits ^ zlib.crc32(name.encode()))
    kept = [scatter((start + place) % 2**32) >= int(dropout * 2**32) for place in range(size)]
    return [each / (1 - dropout) for each in kept]


def masked_layers(h: Hyperparameters, rows: TrainedRows) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(2), nn.Linear(16, 5)).requires_grad_(False)
    inject(module, h, ("0", "2"))
    mask_ranks(module, "part", h, rows, by_time=True)
    for parameter in parameters_of(module).values():
        nn.init.normal_(parameter.requires_grad_())
    return module


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.3}, {"lora_min_rank": 1}, {"lora_dropout": 0.3, "lora_min_rank": 1, "lora_alpha": 2}],
    ids=["dropout", "ranks", "both"],
)
def test_masks_are_those_of_a_plain_computation(options: dict[str, Any]) -> None:
    h = hyperparameters(**VALUES, **options)
    torch.manual_seed(1)
    noise, times, inputs = torch.randn(2, 4, 3, 3), torch.tensor([999, 300]), torch.randn(2, 3, 4, 4)
    module = masked_layers(h, TrainedRows(noise, times, 1000))
    states = inputs.clone().requires_grad_()
    result = module(states)
    result.square().sum().backward()
    # Of the latest time 1 rank is left, and floor(0.7 * 3) + 1 = 3 at time 300.
    ranks = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]]) if h.lora_min_rank else torch.ones(2, 4)
    masks = {}
    for name, shape in {"0": (2, 4, 4, 4), "2": (2, 6, 4)}.items():
        size = math.prod(shape[1:])
        rows = [plain_mask(float(row[0, 0, 0]), f"part.{name}", size, h.lora_dropout) for row in noise]
        of_rank = ranks.view(2, 4, 1, 1) if len(shape) == 4 else ranks.view(2, 1, 4)
        masks[name] = torch.tensor(rows).view(shape) * of_rank
    values = {name: p.detach().clone().requires_grad_() for name, p in parameters_of(module).items()}
    scale = (h.lora_alpha or 4) / 4
    plain = inputs.clone().requires_grad_()
    low = F.conv2d(plain, values["0.lora_A.weight"], padding=1) * masks["0"]
    hidden = module[0].base_layer(plain) + scale * F.conv2d(low, values["0.lora_B.weight"])
    hidden = hidden.flatten(2)
    low = hidden @ values["2.lora_A.weight"].t() * masks["2"]
    expected = module[2].base_layer(hidden) + scale * low @ values["2.lora_B.weight"].t()
    expected.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states.grad, plain.grad, rtol=1e-4, atol=1e-3)
    for name, parameter in parameters_of(module).items():
        torch.testing.assert_close(parameter.grad, values[name].grad, rtol=1e-4, atol=1e-3)
    with torch.no_grad():  # what is drawn has all of it
        whole = masked_layers(hyperparameters(**VALUES, lora_alpha=h.lora_alpha), TrainedRows())
        torch.testing.assert_close(module(inputs), whole(inputs))


def test_as_many_are_left_out_as_asked_for_and_others_for_each_row_layer_and_step() -> None:
    noise = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    shape = torch.Size((8, 64, 16))
    one, other = (RankMask(key, 0.25, None, TrainedRows(noise)) for key in (1, 2))
    masks = [mask(shape, torch.float32, -1) for mask in (one, other)]
    masks.append(RankMask(1, 0.25, None, TrainedRows(noise + 1e-3))(shape, torch.float32, -1))
    flat = torch.cat([mask.flatten(1) for mask in masks if mask is not None])
    assert flat.mean() == pytest.approx(1, abs=0.01)
    assert flat.unique().tolist() == pytest.approx([0, 4 / 3])
    apart = torch.corrcoef(flat) - torch.eye(len(flat))
    assert float(apart.abs().max()) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.3, "train_text_encoder": True, "lora_min_rank": 1, "lora_targets": "all"}]
)
def test_masked_training_is_resumed_to_the_bit_and_recomputed_alike(
    base: PretrainedModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    values = VALUES | options | {"max_token_length": 150}
    whole = Run(base, tmp_path / "whole", **values).train()
    with pytest.raises(StopRequested):
        Run(base, tmp_path / "stopped", **values).train(stop_at=2)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    resumed = Run(base, tmp_path / "stopped", **values)
    resumed.trainer.resume(checkpoint)
    resumed.train()
    smaller = Run(base, tmp_path / "smaller", plan={"gradient_checkpointing": True}, **values).train()
    plain = Run(base, tmp_path / "plain", **{**values, "lora_dropout": 0.0, "lora_min_rank": None}).train()
    mine, again = ({name: p.detach() for name, p in run.trainable.parameters.items()} for run in (whole, resumed))
    assert same(mine, again)
    for one, other in zip(smaller.losses, whole.losses, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert whole.losses[0] == plain.losses[0], "what begins at zero is zero whatever is masked"
    assert whole.losses[2] != pytest.approx(plain.losses[2], rel=1e-4)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lora_dropout": 0.1, "lora_variant": "loha"}, "lora_dropout is for lora_variant=lora"),
        ({"lora_min_rank": 4, "lora_variant": "oft"}, "lora_min_rank is for lora_variant=lora"),
        ({"lora_min_rank": 8, "lora_rank": 4}, "lora_min_rank=8 is more than lora_rank=4; set lora_min_rank to 4"),
        ({"distance_penalty": 1, "lora_variant": "dora"}, "distance_penalty is for lora_variant=lora, and this job's"),
        ({"distance_penalty": 1, "method": "full"}, "distance_penalty belongs to method=lora"),
    ],
)
def test_what_belongs_to_lora_alone_is_refused_elsewhere(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        hyperparameters(**{"method": "lora", **values})
