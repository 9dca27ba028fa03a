"""The plan: what was asked for wins, and what a card can't run is an error."""

from __future__ import annotations

import dataclasses

import pytest

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import Card, find_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.memory import predict_peak_gb
from dreambooth_sm.planning.optimizers import ON_MASTERS

T4 = Card("Tesla T4", 14.6, (7, 5))
H200 = Card("NVIDIA H200", 139.8, (9, 0))
A10G = Card("NVIDIA A10G", 22.0, (8, 6))
CPU = Card("CPU", 0.0)


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({"instance_prompt": "photo of zwx toy", **values})


@pytest.mark.parametrize("card", [H200, CPU], ids=lambda card: card.name)
@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("gradient_checkpointing", "gradient_checkpointing", {True: True, False: False}),
        ("train_text_encoder", "train_text_encoder", {True: True, False: False}),
        ("use_ema", "use_ema", {True: True, False: False}),
        ("not_cache_latents", "cache_latents", {True: False, False: True}),
        ("sample_batch_size", "sample_batch_size", {1: 1, 7: 7}),
        ("max_grad_norm", "max_grad_norm", {0.25: 0.25, None: None}),
    ],
)
def test_what_was_asked_for_wins(card: Card, name: str, field: str, values: dict[object, object]) -> None:
    for value, expected in values.items():
        assert getattr(make_plan(parse(**{name: value}), card), field) == expected


@pytest.mark.parametrize(("asked", "precision"), [("no", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")])
def test_precision_on_a_large_card(asked: str, precision: str) -> None:
    assert make_plan(parse(mixed_precision=asked), H200).precision == precision


def test_precision_follows_the_card() -> None:
    assert [make_plan(parse(), card).precision for card in (T4, H200, CPU)] == ["fp16", "bf16", "fp32"]


@pytest.mark.parametrize("attention", ["default", "xformers", "flash_attention"])
def test_attention_on_a_large_card(attention: str) -> None:
    assert make_plan(parse(attention=attention), H200).attention == attention


@pytest.mark.parametrize(
    ("values", "card", "attention"),
    [
        ({}, H200, "flash_attention"),
        ({"max_train_steps": 2_599}, H200, "flash_attention"),
        ({"max_train_steps": 2_600}, H200, "default"),
        ({"max_train_steps": 800, "train_batch_size": 4}, H200, "default"),
        ({"base_architecture": "sdxl", "max_train_steps": 500}, H200, "default"),
        ({"base_architecture": "sdxl", "max_train_steps": 300}, H200, "flash_attention"),
        ({"num_train_epochs": 3}, H200, "default"),
        ({"mixed_precision": "no"}, H200, "default"),
        ({"base_architecture": "flux2", "method": "lora", "max_train_steps": 100}, H200, "default"),
        ({}, A10G, "default"),
    ],
)
def test_short_jobs_do_not_wait_for_attention_to_be_compiled(
    values: dict[str, object], card: Card, attention: str
) -> None:
    assert make_plan(parse(**values), card).attention == attention


def test_the_cpu_does_what_it_can_and_says_what_it_can_not() -> None:
    plan = make_plan(parse(mixed_precision="fp16", attention="xformers"), CPU)
    assert (plan.device, plan.precision, plan.attention) == ("cpu", "fp32", "default")
    notes = " ".join(plan.notes)
    assert "no CUDA device" in notes
    assert "mixed_precision=fp16" in notes
    assert "attention=xformers" in notes
    assert make_plan(parse(mixed_precision="bf16"), CPU).precision == "bf16"


def test_a_learning_rate_of_text_encoders_that_are_not_trained_is_told() -> None:
    for card, train, told in ((CPU, "auto", 1), (CPU, True, 0), (H200, "auto", 0), (find_card("4GB"), "auto", 1)):
        plan = make_plan(parse(text_encoder_lr=1e-6, train_text_encoder=train), card)
        assert sum("text_encoder_lr=1e-06 changes nothing" in note for note in plan.notes) == told


@pytest.mark.parametrize("optimizer", ON_MASTERS)
def test_optimizers_on_fp32_values(optimizer: str) -> None:
    """They get masters on a GPU, and fp32 weights elsewhere; more than AdamW of 32 bits only where they keep more."""
    h = parse(optimizer=optimizer, use_ema="auto")
    plan = make_plan(h, H200)
    assert (plan.weights, plan.optimizer, plan.state_bits) == ("master", optimizer, 32)
    assert (plan.cuda_graph, plan.update_in_backward, plan.max_grad_norm) == (True, False, 1.0)
    assert any(note.startswith("the update follows the CUDA graph: ") for note in plan.notes)
    assert plan.use_ema == (optimizer != "schedule_free")
    assert plan.predicted_peak_gb == predict_peak_gb(plan, h)
    alike = dataclasses.replace(plan, optimizer="adamw")
    more = plan.predicted_peak_gb - predict_peak_gb(alike, h)
    assert (more > 0) == (ON_MASTERS[plan.optimizer].state + ON_MASTERS[plan.optimizer].working > 8)
    assert not any("graph" in note for note in make_plan(parse(optimizer=optimizer, cuda_graph=False), H200).notes)
    for smaller in (make_plan(h, CPU), make_plan(parse(optimizer=optimizer, mixed_precision="no"), H200)):
        assert (smaller.weights, smaller.optimizer) == ("fp32", optimizer)
    with pytest.raises(UserError, match="optimizer=auto"):
        make_plan(h, find_card("12GB"))


def test_use_cpu_leaves_a_gpu_alone() -> None:
    plan = make_plan(parse(use_cpu=True), H200)
    assert (plan.device, plan.precision) == ("cpu", "fp32")
    assert any("use_cpu" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("values", "card", "said"),
    [
        ({"use_8bit_adam": True}, CPU, "use_8bit_adam=true needs a GPU"),
        ({"mixed_precision": "bf16"}, T4, "Tesla T4 has no bf16"),
    ],
)
def test_what_a_card_can_not_run(values: dict[str, object], card: Card, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_plan(parse(**values), card)


@pytest.mark.parametrize("card", [T4, H200, CPU], ids=lambda card: card.name)
def test_a_plan_is_a_value_that_the_log_shows_in_full(card: Card) -> None:
    plan = make_plan(parse(), card)
    assert plan == make_plan(parse(), card)
    assert hash(plan) == hash(make_plan(parse(), card))
    settings, *notes = plan.lines()
    assert notes == list(plan.notes)
    for field in dataclasses.fields(plan):
        if field.name != "notes":
            assert f"{field.name}={getattr(plan, field.name)}" in settings.split()
