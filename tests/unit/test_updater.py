"""Masters of 16-bit weights, beside plain loops of torch."""

from __future__ import annotations

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan, smaller_plan
from dreambooth_sm.planning.ladder import Rung
from dreambooth_sm.planning.memory import predict_peak_gb
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.training.optimizers import LARGEST_D, make_updater
from dreambooth_sm.training.updater import MasterUpdater
from tests.helpers.optimizers import PLAIN_OPTIMIZERS, PlainProdigy, PlainScheduleFree
from tests.helpers.training import cpu_plan, hyperparameters

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def master_plan(precision: str, max_grad_norm: float | None = 0.5, optimizer: str = "adamw") -> Plan:
    changes: dict[str, Any] = {"precision": precision, "max_grad_norm": max_grad_norm, "optimizer": optimizer}
    return dataclasses.replace(cpu_plan(hyperparameters()), weights="master", **changes)


def options_of(optimizer: str) -> dict[str, Any]:
    return OPTIONS | ({"lr": 1.0} if optimizer == "prodigy" else {})


def make_weights(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    shapes = [(4, 8), (8, 4), (5,), (2, 3, 4, 4)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(weight) for weight in weights]


def gradients(weights: list[torch.nn.Parameter], step: int) -> list[Tensor]:
    """Of one direction, with noise."""
    torch.manual_seed(99)
    means = [torch.randn_like(weight) for weight in weights]
    torch.manual_seed(100 + step)
    return [mean + torch.randn_like(mean) / 4 for mean in means]


def take(updater: MasterUpdater, weights: list[torch.nn.Parameter], step: int, factor: float = 1.0) -> None:
    """A step on the gradients of ``sum(gradient * weight)``."""
    updater.prepare_step()
    loss = sum((w * g).float().sum() for w, g in zip(weights, gradients(weights, step), strict=True))
    updater.scale(loss * factor).backward()
    updater.update()
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize(
    ("optimizer", "precision", "max_grad_norm"),
    [
        *[("adamw", precision, norm) for precision in PRECISIONS for norm in (0.5, None)],
        *[(optimizer, "bf16", 0.5) for optimizer in PLAIN_OPTIMIZERS],
        ("prodigy", "fp16", None),
    ],
)
def test_masters_are_those_of_a_plain_loop(optimizer: str, precision: str, max_grad_norm: float | None) -> None:
    """In fp16 the scale of the loss is a power of two, and changes no bit of these gradients."""
    weights = make_weights(PRECISIONS[precision])
    masters = [torch.nn.Parameter(weight.detach().clone().float()) for weight in weights]
    plain = PLAIN_OPTIMIZERS.get(optimizer, torch.optim.AdamW)(masters, **options_of(optimizer))
    updater = make_updater([weights], master_plan(precision, max_grad_norm, optimizer), options_of(optimizer), 0)
    assert isinstance(updater, MasterUpdater)
    if precision == "fp16":
        updater._updater._scaler._init_scale = 16.0
    for step in range(8):
        for master, gradient in zip(masters, gradients(weights, step), strict=True):
            master.grad = gradient.float()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(masters, max_grad_norm)
        plain.step()
        take(updater, weights, step)
        for weight, master in zip(weights, masters, strict=True):
            ours = updater._master_of[weight]
            torch.testing.assert_close(ours, master, rtol=1e-5, atol=1e-6)
            assert torch.equal(weight, ours.to(weight.dtype))
    if isinstance(plain, PlainScheduleFree):
        plain.take_average()
    if isinstance(plain, PlainProdigy):
        assert updater.metrics() == {"d": pytest.approx(plain.d, rel=1e-4)}
        assert plain.d > 2 * plain.D0
    for weight, master in zip(weights, masters, strict=True):
        torch.testing.assert_close(updater.read(weight), master.detach(), rtol=1e-5, atol=1e-6)
    averaged = not all(torch.equal(updater.read(weight), updater._master_of[weight]) for weight in weights)
    assert averaged == isinstance(plain, PlainScheduleFree)


def test_updates_below_the_weights_precision_are_kept() -> None:
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    updater = make_updater([[weight]], master_plan("bf16"), OPTIONS | {"lr": 1e-4, "weight_decay": 0.0}, 0)
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        updater.update()
    assert torch.equal(weight, torch.ones_like(weight))
    torch.testing.assert_close(updater.read(weight), torch.full((8,), 1 - 10 * 1e-4))


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "schedule_free"])
def test_gradients_that_are_not_finite_leave_everything_as_it_was(optimizer: str) -> None:
    weights = make_weights(torch.float16)
    updater = make_updater([weights], master_plan("fp16", optimizer=optimizer), options_of(optimizer), 0)
    take(updater, weights, 0, factor=1e-3)
    before = [bits.clone() for weight in weights for bits in updater.bits(weight)]
    state, scale = copy.deepcopy(updater.optimizer.state_dict()), float(updater.scale(torch.ones(())))
    take(updater, weights, 1, factor=1e6)
    assert updater.skipped()
    assert all(map(torch.equal, before, [bits for weight in weights for bits in updater.bits(weight)]))
    after = updater.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for index, values in state["state"].items():
        for name, value in values.items():
            now = after["state"][index][name]
            assert torch.equal(value, now) if isinstance(value, Tensor) else value == now
    assert float(updater.scale(torch.ones(()))) == scale / 2
    take(updater, weights, 2, factor=1e-3)
    assert not updater.skipped()


def test_a_parameter_without_a_gradient_stays() -> None:
    weights = make_weights(torch.bfloat16)
    updater = make_updater([weights], master_plan("bf16"), OPTIONS, 0)
    kept = updater.read(weights[1]).clone()
    for weight in weights:
        weight.grad = None if weight is weights[1] else torch.ones_like(weight)
    updater.update()
    assert torch.equal(updater.read(weights[1]), kept)
    assert not torch.equal(updater.read(weights[0]), make_weights(torch.bfloat16)[0].float())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", *PLAIN_OPTIMIZERS])
def test_values_are_written_to_both_and_state_goes_on_to_the_bit(optimizer: str, groups: int) -> None:
    """As a checkpoint of it is resumed, or a smaller plan goes on."""
    if (optimizer, groups) == ("prodigy", 2):
        pytest.skip("has one learning rate")
    plan = master_plan("bf16", optimizer=optimizer)
    weights, others = make_weights(torch.bfloat16), make_weights(torch.bfloat16)
    first, second = (
        make_updater([each] if groups == 1 else [each[::2], each[1::2]], plan, options_of(optimizer), 0)
        for each in (weights, others)
    )
    for step in range(3):
        take(first, weights, step)
    assert second.accepts(first.state_dict())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    values = [first.read(weight).clone() for weight in weights]
    for other, value in zip(others, values, strict=True):
        second.write(other, value)
    second.load_state_dict(torch.load(file, weights_only=True))
    for weight, other, value in zip(weights, others, values, strict=True):
        assert torch.equal(weight, other)
        assert torch.equal(second.read(other), value)
    for step in range(3, 6):
        take(first, weights, step)
        take(second, others, step)
    for weight, other in zip(weights, others, strict=True):
        assert torch.equal(first.read(weight), second.read(other))
        assert all(map(torch.equal, first.bits(weight), second.bits(other)))
        average = torch.zeros_like(first.read(weight))
        first.average_into(average, weight, torch.tensor(0.25))
        assert torch.equal(average, first.read(weight) * 0.25)


def test_prodigys_learning_rate_is_held_and_told() -> None:
    """A gradient that never changes has no best learning rate."""
    weight = torch.nn.Parameter(torch.zeros(8))
    updater = make_updater([[weight]], master_plan("fp32", None, "prodigy"), options_of("prodigy"), 0)
    assert updater.complaint() is None
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        updater.update()
    assert updater.metrics() == {"d": LARGEST_D}
    assert "held there" in str(updater.complaint())
    before = updater.read(weight).clone()
    weight.grad = torch.ones_like(weight)
    updater.update()
    assert float((updater.read(weight) - before).abs().max()) <= 1.1 * LARGEST_D


def test_prodigy_has_one_learning_rate() -> None:
    weights = make_weights(torch.float32)
    with pytest.raises(UserError, match="one learning rate for all parameters"):
        make_updater([weights[:1], weights[1:]], master_plan("fp32", optimizer="prodigy"), OPTIONS, 0)


# Plans


MASTER = Rung("roomy", 0, "master", 32, True, False, False, False, "adamw")


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(METHODS["hypernetwork"]), "ladder", (MASTER,))


@pytest.mark.usefixtures("ladder")
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ("roomy", "master", "adamw", 32)),
        ({"optimizer": "auto16"}, ("roomy", "master", "adamw", 32)),
        ({"optimizer": "adamw"}, ("reference", "fp32", "adamw", 32)),
        ({"optimizer": "adamw8bit"}, ("reference", "fp32", "adamw8bit", 8)),
        ({"optimizer": "blockwise"}, ("reference", "residual", "blockwise", 8)),
        ({"mixed_precision": "no"}, ("reference", "fp32", "adamw", 32)),
        ({"optimizer": "prodigy"}, ("roomy", "master", "prodigy", 32)),
        ({"optimizer": "lion", "mixed_precision": "no"}, ("reference", "fp32", "lion", 32)),
    ],
)
def test_a_rung_with_masters(asked: dict[str, Any], expected: tuple[str, str, str, int]) -> None:
    h = Hyperparameters.parse({"method": "hypernetwork", "instance_prompt": "photo of zwx toy", **asked})
    plan = make_plan(h, CARDS["L4"])
    assert (plan.tier, plan.weights, plan.optimizer, plan.state_bits) == expected
    assert plan.max_grad_norm == 1.0
    smaller: Any = plan
    while smaller := smaller_plan(smaller, h):
        assert (smaller.weights == "master") == (plan.weights == "master")


def test_masters_take_the_memory_that_is_predicted_for_them() -> None:
    """Beside a 16-bit weight 4 bytes of its master and 8 of moments, where a residual takes 2 and its moments 2 and two
    fp32 scales a block; of the gradient's fp32 copy some part counts, as activations are gone when it is made."""
    h = hyperparameters(optimizer="auto", mixed_precision="auto")
    residual = make_plan(h, CARDS["H100"])
    assert (residual.weights, residual.state_bits, residual.update_in_backward) == ("residual", 8, False)
    master = dataclasses.replace(residual, weights="master", optimizer="adamw", state_bits=32)
    billions = FAMILIES[h.architecture].facts.footprint.denoiser * 1e-3
    more = predict_peak_gb(master, h) - predict_peak_gb(residual, h)
    least = (2 + 4 + 8 - (2 + 2 + 2 + 8 / 256)) * billions
    assert least - 0.01 < more < least + 4 * billions
