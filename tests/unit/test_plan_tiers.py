"""The VRAM tiers: what each card gets, that it fits, and what is given up when memory runs out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.cli import main
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.planning.cards import CARDS, Card, find_card
from dreambooth_sm.planning.choice import make_plan, smaller_plan
from dreambooth_sm.planning.memory import predict_peak_gb
from dreambooth_sm.planning.table import tier_table

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, **values})


@pytest.mark.parametrize(
    ("card", "tier", "precision", "weights", "text_encoder"),
    [
        ("H100", "roomy", "bf16", "residual", True),
        ("A100-40", "roomy", "bf16", "residual", True),
        ("A10G", "large", "bf16", "residual", True),
        ("L4", "large", "bf16", "residual", True),
        ("T4", "medium", "fp16", "residual", True),
        ("V100", "medium", "fp16", "residual", True),
        ("12GB", "medium", "bf16", "residual", True),
        ("10GB", "medium", "bf16", "residual", True),
        ("8GB", "small", "bf16", "residual", True),
        ("6GB", "tight", "bf16", "stochastic", False),
        ("4GB", "tiny", "bf16", "stochastic", False),
        ("CPU", "cpu", "fp32", "fp32", False),
    ],
)
def test_what_each_card_gets(card: str, tier: str, precision: str, weights: str, text_encoder: bool) -> None:
    plan = make_plan(parse(), find_card(card))
    assert (plan.tier, plan.precision, plan.weights, plan.train_text_encoder) == (
        tier,
        precision,
        weights,
        text_encoder,
    )


gigabytes = st.floats(1.0, 200.0)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "train_text_encoder": st.booleans(),
        "use_ema": st.booleans(),
        "gradient_checkpointing": st.booleans(),
        "use_8bit_adam": st.booleans(),
        "max_grad_norm": st.sampled_from([0.5, None, "auto"]),
        "gradient_accumulation_steps": st.integers(1, 4),
        "train_batch_size": st.integers(1, 8),
        "resolution": st.sampled_from([256, 512, 768]),
        "mixed_precision": st.sampled_from(["no", "fp16", "auto"]),
    },
)


@given(memory=gigabytes, modern=st.booleans(), values=wishes)
def test_a_plan_fits_and_keeps_to_what_was_asked_for(memory: float, modern: bool, values: dict[str, Any]) -> None:
    card = Card("a card", memory, (8, 6) if modern else (7, 5))
    h = parse(**values)
    try:
        plan = make_plan(h, card)
    except UserError:  # what it says is another test's
        return
    assert plan.predicted_peak_gb <= card.budget_gb
    assert plan.predicted_peak_gb == predict_peak_gb(plan, h)
    for name in ("train_text_encoder", "use_ema", "gradient_checkpointing"):
        if name in values:
            assert getattr(plan, name) == values[name]
    if isinstance(values.get("max_grad_norm"), float):
        assert plan.max_grad_norm == values["max_grad_norm"]
    if plan.update_in_backward:
        assert plan.max_grad_norm is None
        assert h.gradient_accumulation_steps == 1
    if values.get("use_8bit_adam") is False:
        assert plan.state_bits >= 16
    assert (plan.optimizer == "adamw8bit") == (values.get("use_8bit_adam") is True)


@given(memory=st.floats(3.88, 200.0))
def test_more_memory_never_gives_a_lower_rung(memory: float) -> None:
    names = [rung.name for rung in METHODS["full"].ladder]
    rungs = [names.index(make_plan(parse(), Card("a card", m, (8, 6))).tier) for m in (memory, memory + 1)]
    assert rungs[1] <= rungs[0]


@pytest.mark.parametrize("card", [name for name in CARDS if name != "CPU"])
@pytest.mark.parametrize("values", [{}, {"use_ema": True}, {"train_text_encoder": True, "optimizer": "adamw"}], ids=str)
def test_stepping_down_ends_and_changes_nothing_that_is_trained(card: str, values: dict[str, Any]) -> None:
    h = parse(**values)
    try:
        plan = make_plan(h, find_card(card))
    except UserError:
        pytest.skip("does not fit to begin with")
    seen = [plan]
    while (smaller := smaller_plan(seen[-1], h)) is not None:
        assert smaller.predicted_peak_gb <= seen[-1].predicted_peak_gb
        assert (smaller.train_text_encoder, smaller.use_ema) == (plan.train_text_encoder, plan.use_ema)
        seen.append(smaller)
        assert len(seen) < 10
    assert seen[-1].gradient_checkpointing


def test_an_explicit_wish_is_not_stepped_down() -> None:
    h = parse(gradient_checkpointing=False, use_8bit_adam=False, max_grad_norm=1.0)
    plan: Any = make_plan(h, CARDS["H100"])
    while plan is not None:
        assert not plan.gradient_checkpointing
        assert plan.state_bits == 16
        assert plan.max_grad_norm == 1.0
        plan = smaller_plan(plan, h)


@pytest.mark.parametrize(
    ("values", "card", "advice"),
    [
        ({"optimizer": "adamw"}, "12GB", "optimizer=auto"),
        ({"train_batch_size": 32}, "8GB", "train_batch_size=1"),
        ({"train_text_encoder": True}, "4GB", "train_text_encoder=auto"),
        ({}, "2GB", "such as T4"),
    ],
    ids=str,
)
def test_what_can_not_fit_is_said_with_what_would(values: dict[str, Any], card: str, advice: str) -> None:
    with pytest.raises(UserError, match=advice):
        make_plan(parse(**values), find_card(card))


DRAWING = {"validation_prompt": "a toy", "validation_steps": 100}


@pytest.mark.parametrize("card", [name for name in CARDS if name != "CPU"])
def test_pictures_while_training_are_planned_for(card: str) -> None:
    """A captured step keeps its memory, and all three parts of the model come to it in 16 bits."""
    plan = make_plan(parse(), CARDS[card])
    drawing = make_plan(parse(**DRAWING), CARDS[card])
    assert drawing.tier == plan.tier
    assert drawing.predicted_peak_gb - plan.predicted_peak_gb > 2e-3 * (859.5 + 123.1 + 83.7)
    assert any("validation_steps" in note for note in drawing.notes)
    measuring = make_plan(parse(fidelity_encoders="judge", fidelity_steps=100), CARDS[card])
    assert measuring.predicted_peak_gb == drawing.predicted_peak_gb
    assert any("fidelity_steps" in note for note in measuring.notes)
    assert make_plan(parse(validation_prompt="a toy"), CARDS[card]) == plan, "before and after, the model is alone"


def test_pictures_while_training_make_room_on_small_cards() -> None:
    names = [rung.name for rung in METHODS["full"].ladder]
    alone, drawing = (make_plan(parse(**values), find_card("8GB")).tier for values in ({}, DRAWING))
    assert names.index(drawing) > names.index(alone)
    with pytest.raises(UserError, match=r"it fits with validation_steps=0$"):
        make_plan(parse(**DRAWING), find_card("6GB"))


def test_the_seed_notebook_runs_on_a_t4() -> None:
    """Its explicit values: no 8-bit Adam, EMA, checkpointing, no text encoder, pictures encoded at each step."""
    h = parse(
        mixed_precision="fp16",
        use_8bit_adam="False",
        use_ema="True",
        train_text_encoder="False",
        gradient_checkpointing="True",
        not_cache_latents="True",
        attention="xformers",
    )
    plan = make_plan(h, CARDS["T4"])
    assert (plan.state_bits, plan.use_ema, plan.gradient_checkpointing, plan.cache_latents) == (16, True, True, False)


def test_the_command_line_prints_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "T4", "--json", "--train_text_encoder", "false"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = make_plan(parse(train_text_encoder=False), CARDS["T4"])
    assert printed == {**dataclasses.asdict(expected), "notes": list(expected.notes)}
    assert main(["plan"]) == 0
    assert capsys.readouterr().out.strip() == tier_table(parse())
    assert main(["plan", "--gpu", "GTX 9999"]) == 2
    assert "unknown card" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--gpu", "8GB", "--use_eam", "true"])
    assert "use_ema" in capsys.readouterr().err
