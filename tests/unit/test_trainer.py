"""The training loop on a tiny model: what a step changes, and when a job that learns nothing is stopped."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.length import length_of
from dreambooth_sm.training.attention import attention_context
from dreambooth_sm.training.loop import TrainingError
from dreambooth_sm.training.schedule import Schedule, make_schedule
from tests.helpers.training import Run, hyperparameters, same, weights


def distance(left: torch.nn.Module, right: torch.nn.Module) -> float:
    """Largest difference of any weight."""
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)


def gradients(run: Run) -> torch.Tensor:
    """Of the first batch, in a row."""
    unet = run.base.unet
    run.trainer.loss(run.data.batch_sampler.batch(0, run.h.train_batch_size)).total.backward()
    found = torch.cat([p.grad.flatten() for p in unet.parameters()])
    unet.zero_grad(set_to_none=True)
    return found


# Batches and accumulation


@pytest.mark.slow
@pytest.mark.parametrize("prior", [False, True])
def test_accumulated_batches_are_one_large_batch(base: PretrainedModel, tmp_path: Path, prior: bool) -> None:
    """1 x 4 and 4 x 1, with SGD-like Adam (a large epsilon), so that no sign of a tiny gradient decides."""
    values = {
        "max_train_steps": 2,
        "with_prior_preservation": prior,
        "snr_gamma": 5.0,
        "adam_epsilon": 1.0,
        "learning_rate": 0.1,
        "max_grad_norm": None,
        "center_crop": False,
    }
    runs = [
        Run(base, tmp_path, pictures=3, train_batch_size=size, gradient_accumulation_steps=4 // size, **values).train()
        for size in (4, 2, 1)
    ]
    for other in runs[1:]:
        assert len(other.losses) == 2
        for ours, theirs in zip(runs[0].losses, other.losses, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert distance(runs[0].base.unet, other.base.unet) < 1e-6
    assert distance(runs[0].base.unet, base.unet) > 1e-4


@pytest.mark.slow
def test_both_halves_are_reported_and_weighed(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, with_prior_preservation=True, prior_loss_weight=0.25, max_train_steps=1).train()
    ((total, instance, prior),) = run.losses
    assert total == pytest.approx(instance + 0.25 * prior, rel=1e-6)
    assert [len(losses) for losses in Run(base, tmp_path, max_train_steps=1).train().losses] == [2]


@pytest.mark.slow
def test_the_same_seed_trains_the_same_model_and_another_does_not(base: PretrainedModel, tmp_path: Path) -> None:
    first = Run(base, tmp_path, max_train_steps=2).train()
    torch.rand(5)
    second = Run(base, tmp_path, max_train_steps=2).train()
    assert first.losses == second.losses
    assert same(weights(first.base.unet), weights(second.base.unet))
    second.data.batch_sampler.seed += 1
    other = Run(base, tmp_path, max_train_steps=2)
    other.data.batch_sampler.seed += 1
    assert other.train().losses != first.losses


# Gradients


@pytest.mark.slow
def test_gradients_are_clipped_to_their_global_norm(base: PretrainedModel, tmp_path: Path) -> None:
    """With a large epsilon Adam's first step is as long as the gradient, and so must be the clipped one."""
    steps: dict[float | None, float] = {}
    values = {"max_train_steps": 1, "adam_epsilon": 1e3, "learning_rate": 1e3, "adam_weight_decay": 0}
    norm = gradients(Run(base, tmp_path)).norm().item()
    for limit in (None, 10 * norm, norm / 4):
        run = Run(base, tmp_path, **values, max_grad_norm=limit).train()
        moved = [
            a.detach() - b.detach() for a, b in zip(run.base.unet.parameters(), base.unet.parameters(), strict=True)
        ]
        steps[limit] = torch.cat([part.flatten() for part in moved]).norm().item()
    assert steps[None] == pytest.approx(norm, rel=1e-2)
    assert steps[10 * norm] == pytest.approx(steps[None], rel=1e-5)
    assert steps[norm / 4] == pytest.approx(norm / 4, rel=1e-2)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(base: PretrainedModel, tmp_path: Path) -> None:
    plain, checkpointed = (Run(base, tmp_path, gradient_checkpointing=on) for on in (False, True))
    assert checkpointed.base.unet.is_gradient_checkpointing
    torch.testing.assert_close(gradients(plain), gradients(checkpointed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_base_models_prediction_type_is_trained(
    base: PretrainedModel, tmp_path: Path, prediction_type: str
) -> None:
    base.scheduler = type(base.scheduler).from_config(base.scheduler.config, prediction_type=prediction_type)
    run = Run(base, tmp_path)
    batch = run.data.batch_sampler.batch(0, 1)
    latents = run.data.latents(batch)
    noised = base.scheduler.add_noise(latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        prediction = base.unet(noised, batch.timesteps, run.data.prompts["states"][batch.prompts]).sample
        ours = run.trainer.loss(batch).total.item()
    velocity = base.scheduler.get_velocity(latents, batch.noise, batch.timesteps)
    target = batch.noise if prediction_type == "epsilon" else velocity
    assert ours == pytest.approx((prediction - target).square().mean().item(), rel=1e-4)


# What is trained


@pytest.mark.parametrize("trained", [False, True])
def test_the_text_encoder_is_trained_or_left_bitwise(base: PretrainedModel, tmp_path: Path, trained: bool) -> None:
    run = Run(base, tmp_path, train_text_encoder=trained, max_train_steps=2).train()
    assert same(weights(run.base.text_encoder), weights(base.text_encoder)) is not trained
    assert not same(weights(run.base.unet), weights(base.unet))
    assert same(weights(run.base.vae), weights(base.vae))


@pytest.mark.slow
def test_trained_or_not_the_first_loss_is_that_of_the_same_model(base: PretrainedModel, tmp_path: Path) -> None:
    """Cached embeddings are what the text encoder would have given."""
    first = [Run(base, tmp_path, train_text_encoder=on, max_train_steps=1).train().losses[0] for on in (False, True)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_every_weight_is_trained(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, max_train_steps=2, adam_weight_decay=0).train()
    before = weights(base.unet)
    assert [name for name, value in run.base.unet.named_parameters() if torch.equal(value, before[name])] == []


@pytest.mark.slow
def test_the_average_is_what_is_saved(base: PretrainedModel, tmp_path: Path) -> None:
    plain = Run(base, tmp_path, max_train_steps=1, learning_rate=1e-2).train()
    averaged = Run(base, tmp_path, max_train_steps=1, learning_rate=1e-2, use_ema=True).train()
    assert averaged.losses == plain.losses
    for start, end, mean in zip(
        base.unet.parameters(), plain.base.unet.parameters(), averaged.base.unet.parameters(), strict=True
    ):
        torch.testing.assert_close(mean, start + (end - start) * (1 - 2 / 11), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_training_lowers_the_loss_on_what_it_was_shown(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, pictures=1, max_train_steps=25, learning_rate=1e-3, train_batch_size=2)
    batches = [run.data.batch_sampler.batch(number, 2) for number in range(5)]

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(run.trainer.loss(batch).total.item() for batch in batches) / len(batches)

    before = mean_loss()
    run.train()
    assert mean_loss() < 0.9 * before


# How long, and how fast


@pytest.mark.parametrize(
    ("values", "pictures", "expected"),
    [
        ({"max_train_steps": 7}, 5, Schedule(7, 0, 1e-4)),
        ({"max_train_steps": 7, "num_train_epochs": 3}, 5, Schedule(7, 0, 1e-4)),
        ({"max_train_steps": None}, 5, Schedule(800, 0, 1e-4)),
        ({"max_train_steps": None, "num_train_epochs": 3}, 5, Schedule(15, 0, 1e-4)),
        ({"max_train_steps": None, "num_train_epochs": 3, "train_batch_size": 5}, 5, Schedule(3, 0, 1e-4)),
        (
            {"max_train_steps": None, "num_train_epochs": 2, "train_batch_size": 2, "gradient_accumulation_steps": 3},
            12,
            Schedule(4, 0, 1e-4),
        ),
        ({"save_steps": 100}, 5, Schedule(4, 100, 1e-4)),
        ({"save_steps": 2, "save_use_epochs": True, "train_batch_size": 2}, 6, Schedule(4, 6, 1e-4)),
        ({"scale_lr": True}, 5, Schedule(4, 0, 1e-4)),
        ({"scale_lr": True, "train_batch_size": 2, "gradient_accumulation_steps": 3}, 5, Schedule(4, 0, 6e-4)),
        ({"train_batch_size": 2, "gradient_accumulation_steps": 3}, 5, Schedule(4, 0, 1e-4)),
    ],
)
def test_schedules(values: dict[str, object], pictures: int, expected: Schedule) -> None:
    h = hyperparameters(**values)
    found = make_schedule(h, length_of(h, pictures))
    assert (found.steps, found.save_every) == (expected.steps, expected.save_every)
    assert found.learning_rate == pytest.approx(expected.learning_rate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr_scheduler": "constant"}, [1, 1, 1, 1]),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2}, [0, 0.5, 1, 1]),
        ({"lr_scheduler": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 2}, [0, 0.5, 1, 0.5]),
        ({"lr_scheduler": "cosine"}, [(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]),
        ({"lr_scheduler": "constant", "scale_lr": True, "gradient_accumulation_steps": 2}, [2, 2, 2, 2]),
    ],
)
def test_learning_rates(
    base: PretrainedModel, tmp_path: Path, values: dict[str, object], expected: list[float]
) -> None:
    run = Run(base, tmp_path, pictures=1, max_train_steps=4, **values).train()
    assert [step["lr"] for step in run.recorder.steps] == pytest.approx([1e-4 * share for share in expected])


@pytest.mark.slow
def test_the_learning_rate_of_the_line_is_the_one_that_was_used(base: PretrainedModel, tmp_path: Path) -> None:
    """Adam's first step moves most weights by the learning rate, and by nothing while it is 0."""
    values = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2, "adam_weight_decay": 0}
    run = Run(base, tmp_path, max_train_steps=3, **values)
    moved: list[float] = []
    before = [p.detach().clone() for p in run.base.unet.parameters()]
    for _ in range(3):
        run.trainer.optimizer_step(run.trainer.rate_after(run.trainer.step))
        now = [p.detach().clone() for p in run.base.unet.parameters()]
        moved.append(max((a - b).abs().max().item() for a, b in zip(now, before, strict=True)))
        before = now
    assert moved[0] == 0
    assert 0 < moved[1] < 1.1 * 0.5e-4
    assert moved[1] < moved[2] < 1.1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "weights"), [("adamw", "fp32"), ("blockwise", "fp32"), ("adamw", "master"), ("blockwise", "residual")]
)
def test_text_encoders_have_a_learning_rate_of_their_own(
    base: PretrainedModel, tmp_path: Path, optimizer: str, weights: str
) -> None:
    """Adam's first step moves a weight by its learning rate, wherever its gradient is not 0."""
    plan = {"weights": weights} | ({} if weights == "fp32" else {"precision": "bf16"})
    values = {"train_text_encoder": True, "text_encoder_lr": 3e-5, "adam_weight_decay": 0, "max_train_steps": 1}
    run = Run(base, tmp_path, optimizer=optimizer, plan=plan, **values).train()
    assert run.recorder.steps[0]["lr"] == 1e-4
    for part, rate in (("unet", 1e-4), ("text_encoder", 3e-5)):
        assert distance(getattr(run.base, part), getattr(base, part)) == pytest.approx(rate, rel=0.05)


@pytest.mark.slow
def test_metric_lines_tell_what_prodigy_finds_and_of_no_other(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, optimizer="prodigy", learning_rate=1.0, max_train_steps=2).train()
    assert [(step["lr"], step["d"]) for step in run.recorder.steps] == [(1.0, 1e-6), (1.0, pytest.approx(1e-6, rel=2))]
    assert "d" not in Run(base, tmp_path, max_train_steps=1).train().recorder.steps[0]


@pytest.mark.slow
def test_the_average_of_schedule_free_is_what_is_drawn_and_saved(base: PretrainedModel, tmp_path: Path) -> None:
    """After one step it is where that step led to; later it lags behind."""
    run = Run(base, tmp_path, optimizer="schedule_free", max_train_steps=2)
    for _ in range(2):
        run.trainer.optimizer_step(1e-4)
    optimizer: Any = run.trainer.updater.optimizer
    drawn = {name: value.clone() for name, value in run.trainer.weights_now()}
    optimizer.eval()  # the library's own way
    for name, parameter in run.trainer.named_parameters.items():
        torch.testing.assert_close(drawn[name], parameter.detach(), rtol=1e-5, atol=1e-7)
    optimizer.train()
    stored = run.trainer.state()["weights"]
    run.trainer.finish()
    for name, parameter in run.trainable.parameters.items():
        assert torch.equal(stored[name], parameter)
        torch.testing.assert_close(parameter.detach(), drawn[name], rtol=1e-5, atol=1e-7)


def test_all_parameters_of_one_rate_are_one_group(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, train_text_encoder=True, text_encoder_lr=1e-4)
    (group,) = run.trainer.updater.optimizer.param_groups
    assert group["params"] == run.trainer.parameters


@pytest.mark.slow
def test_metric_lines_are_as_frequent_as_asked(base: PretrainedModel, tmp_path: Path) -> None:
    every = Run(base, tmp_path, max_train_steps=7).train()
    some = Run(base, tmp_path, max_train_steps=7, logging_steps=3).train()
    assert [step["step"] for step in some.recorder.steps] == [1, 3, 6, 7]
    means = [every.losses[0][0], sum(loss[0] for loss in every.losses[1:3]) / 2]
    means += [sum(loss[0] for loss in every.losses[3:6]) / 3, every.losses[6][0]]
    assert [loss[0] for loss in some.losses] == pytest.approx(means, rel=1e-6)


# The self-check


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_job(base: PretrainedModel, tmp_path: Path, value: float) -> None:
    run = Run(base, tmp_path)
    run.data.prompts["states"].fill_(value)
    with pytest.raises(TrainingError, match="loss of step 1 is not finite"):
        run.train()
    assert run.trainer.step == 0


def test_gradients_that_are_not_finite_stop_the_job(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, max_grad_norm=None)
    next(run.base.unet.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match="gradients are not finite at step 1"):
        run.train()


@pytest.mark.parametrize("recomputing", [False, True])
def test_the_attention_that_was_asked_for_is_that_of_the_whole_step(
    base: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recomputing: bool
) -> None:
    """Also where the backward pass computes it again."""
    allowed: list[bool] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    plan = {"attention": "flash_attention", "gradient_checkpointing": recomputing}
    run = Run(base, tmp_path, plan=plan, max_train_steps=1)
    before = len(allowed)
    run.train()
    assert len(allowed) > before
    assert not any(allowed[before:])
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("blocked", ["unet", "text_encoder"])
def test_an_update_that_changes_nothing_stops_the_job(base: PretrainedModel, tmp_path: Path, blocked: str) -> None:
    run = Run(base, tmp_path, train_text_encoder=True, adam_weight_decay=0)
    for parameter in getattr(run.base, blocked).parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=f"left the weights of {blocked} as they were"):
        run.train()


def test_a_learning_rate_too_small_for_the_weights_stops_the_job(base: PretrainedModel, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="left the weights of unet"):
        Run(base, tmp_path, learning_rate=1e-60).train()  # 0 in fp32


def test_warm_up_steps_with_no_learning_rate_are_no_reason_to_stop(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, max_train_steps=2, lr_scheduler="constant_with_warmup", lr_warmup_steps=2).train()
    assert [step["lr"] for step in run.recorder.steps] == pytest.approx([0, 0.5e-4])
    assert distance(run.base.unet, base.unet) > 0


def test_the_first_update_after_warm_up_is_checked(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, adam_weight_decay=0, lr_scheduler="constant_with_warmup", lr_warmup_steps=2)
    for parameter in run.base.unet.parameters():
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match="left the weights of unet"):
        run.train()
    assert run.trainer.step == 1


def test_xformers_that_can_not_run_gives_way_with_a_line(base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path)
    said: list[str] = []
    attention_context(
        dataclasses.replace(run.plan, attention="xformers"), run.base.unet, torch.device("cpu"), said.append
    )
    (line,) = said
    assert "xformers" in line
    assert "\n" not in line
