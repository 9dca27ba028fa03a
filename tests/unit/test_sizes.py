"""Families of several sizes: plans are of the one that is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.families.facts import Facts
from dreambooth_sm.families.find import find_facts
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import keep_layers
from dreambooth_sm.planning.cards import CARDS, find_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.memory import reading_gb
from dreambooth_sm.stored.model import empty_module
from launcher.estimates import estimate_on
from launcher.instances import Instance
from tests.helpers.true_sizes import CONFIGS

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
# Family, the first size's name, a larger one's, and its modules as its makers configure them.
LARGER: list[tuple[str, str, str, dict[str, dict[str, Any]]]] = [
    (
        "sd",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-2-1",
        {
            "unet": {
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
            },
            "text_encoder": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
            },
        },
    ),
    (
        "flux2",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "black-forest-labs/FLUX.2-klein-base-9B",
        {
            "transformer": {
                "num_layers": 8,
                "num_single_layers": 24,
                "num_attention_heads": 32,
                "joint_attention_dim": 12288,
                "guidance_embeds": False,
            },
            "text_encoder": {
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
        },
    ),
    (
        "sd3",
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
        {
            "transformer": {
                "num_layers": 38,
                "num_attention_heads": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            **{part: config for part, config in CONFIGS["sd3"].items() if part != "transformer"},  # of all sizes
        },
    ),
]
EVERY = pytest.mark.parametrize(("family", "first", "larger", "configs"), LARGER, ids=[family for family, *_ in LARGER])


def parse(name: str, **values: object) -> Hyperparameters:
    family = next(found for found, *names, _ in LARGER if name in names)
    gates = FAMILIES[family].facts.gates
    accepted = next((licence for licence, names in gates.items() if names.search(name)), None)
    usual = {"method": "full" if family == "sd" else "lora", "accept_license": accepted}
    return Hyperparameters.parse({**PROMPTS, "pretrained_model_name_or_path": name, **usual, **values})


@EVERY
def test_facts_of_a_larger_model_are_those_of_the_true_one(
    family: str, first: str, larger: str, configs: dict[str, dict[str, Any]]
) -> None:
    facts = parse(larger).facts
    assert facts != parse(first).facts == FAMILIES[family].facts
    modules = {part: empty_module(part, config, facts.pipeline) for part, config in configs.items()}
    check_footprint(facts, modules)
    denoiser = modules.pop(facts.denoiser)
    for layers in facts.adapted.values():
        for ends, width, found in (
            (layers.denoiser, layers.width, [denoiser]),
            (layers.text_encoder, layers.text_width, [*modules.values()]),
        ):
            named = [
                m for module in found for name, m in module.named_modules() if f".{name}".endswith(_after_dots(ends))
            ]
            assert width == sum(m.weight.shape[0] + m.weight.shape[1:].numel() for m in named)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.facts.matches_flow])
def test_facts_are_those_of_the_true_model(family: str) -> None:
    facts = FAMILIES[family].facts
    check_footprint(facts, {part: empty_module(part, each, facts.pipeline) for part, each in CONFIGS[family].items()})


def check_footprint(facts: Facts, modules: dict[str, nn.Module]) -> None:
    footprint, texts = facts.footprint, dict(modules)
    denoiser = texts.pop(facts.denoiser)
    stored = sum(value.numel() for value in denoiser.state_dict().values())  # with SD 3.5's table of places
    assert footprint.denoiser == pytest.approx(stored / 1e6, rel=1e-3)
    read = sum(value.numel() for module in texts.values() for value in module.parameters())
    assert footprint.text_encoder == pytest.approx(read / 1e6, rel=1e-3)
    if facts.text_layers:
        for module in texts.values():
            keep_layers(module, facts.text_layers)
        computing = sum(value.numel() for module in texts.values() for value in module.parameters())
        assert footprint.text_read == pytest.approx(computing / 1e6, rel=1e-3)
    if facts.matches_flow:
        linear = _linear(denoiser)
        assert footprint.largest_coded == pytest.approx(max(linear), rel=1e-2)
        assert footprint.denoiser_coded == pytest.approx(sum(linear), rel=1e-3)
        coded = sum(sum(_linear(module)) for part, module in texts.items() if part not in facts.plain_text)
        assert footprint.text_coded == pytest.approx(coded, rel=1e-3)


def _linear(module: nn.Module) -> list[float]:
    """Millions of weights of each linear layer."""
    return [layer.weight.numel() / 1e6 for layer in module.modules() if isinstance(layer, nn.Linear)]


def _after_dots(ends: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{end}" for end in ends)


@EVERY
def test_a_larger_model_needs_more_and_takes_longer(
    family: str, first: str, larger: str, configs: dict[str, dict[str, Any]]
) -> None:
    plans = [make_plan(parse(name), CARDS["H100"]) for name in (first, larger)]
    assert plans[1].predicted_peak_gb > plans[0].predicted_peak_gb + 2
    assert {plan.tier for plan in plans} == {"roomy"}
    minutes = [
        estimate_on(parse(name, max_train_steps=1000), Instance("a type", CARDS["H100"], 1, 1.0)).training_minutes
        for name in (first, larger)
    ]
    assert (minutes[1] > minutes[0]) == (family != "sd")


def test_the_configuration_of_a_directory_counts_for_more_than_its_name(tiny_base: Path, tmp_path: Path) -> None:
    first = FAMILIES["sd"].facts
    model = tmp_path / "stable-diffusion-2-1"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text((tiny_base / "model_index.json").read_text())
    config = model / "unet" / "config.json"
    for width, is_second in ((768, False), (1024, True)):
        config.write_text(json.dumps({"cross_attention_dim": width}))
        assert (find_facts("sd", str(model)) != first) == is_second


@pytest.mark.parametrize(
    ("family", "tensor", "is_larger"),
    [
        ("sd", "cond_stage_model.transformer.text_model.final_layer_norm.weight", False),
        ("sd", "cond_stage_model.model.ln_final.weight", True),
        ("flux2", "double_blocks.4.img_attn.proj.weight", False),
        ("flux2", "double_blocks.7.img_attn.proj.weight", True),
        ("sd3", "model.diffusion_model.joint_blocks.23.x_block.attn.proj.weight", False),
        ("sd3", "model.diffusion_model.joint_blocks.37.x_block.attn.proj.weight", True),
    ],
)
def test_what_a_single_file_holds_counts_for_more_than_its_name(
    tmp_path: Path, family: str, tensor: str, is_larger: bool
) -> None:
    path = tmp_path / "sd2-9b-large.safetensors"
    save_file({tensor: torch.zeros(1)}, path)
    assert (find_facts(family, str(path)) != FAMILIES[family].facts) == is_larger


@pytest.mark.parametrize(
    ("name", "is_larger"),
    [
        ("stabilityai/stable-diffusion-2", True),
        ("stabilityai/stable-diffusion-2-base", True),
        ("s3://models/sd21/", True),
        ("s3://models/v2-1_768-ema-pruned.safetensors", True),
        ("someone/dreamshaper-v2", False),
        ("someone/sd2022", False),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", False),
    ],
)
def test_of_what_is_not_here_the_name_tells(name: str, is_larger: bool) -> None:
    assert (find_facts("sd", name) != FAMILIES["sd"].facts) == is_larger


def test_all_that_keeps_a_model_from_being_trained_is_told_at_once() -> None:
    values = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large", "resolution": 520}
    with pytest.raises(UserError) as told:
        Hyperparameters.parse({**PROMPTS, **values})
    for part in ("method=full: the base model is an SD 3.5 model", "accept_license=", "takes multiples of 16"):
        assert sum(part in problem for problem in told.value.problems) == 1


def test_text_encoders_read_in_fewer_bits_where_the_card_has_no_room() -> None:
    """SD 3.5's take 11 GB in 16 bits, more than its training does."""
    wishes = {**PROMPTS, "method": "lora", "base_architecture": "sd3"}
    kept = {}
    for name in ("6GB", "8GB", "16GB"):
        h, card = Hyperparameters.parse(wishes), find_card(name)
        plan = make_plan(h, card)
        assert reading_gb(plan, h.facts.footprint) <= card.budget_gb
        said = any("text encoder takes" in note for note in plan.notes)
        assert said == (plan.text_weights != "plain")
        kept[name] = plan.text_weights
    assert kept == {"6GB": "nf4", "8GB": "int8", "16GB": "plain"}
    with pytest.raises(UserError, match=r"needs 4\.8 GB at least and 4 GB card"):
        make_plan(
            Hyperparameters.parse({**wishes, "resolution": 256, "with_prior_preservation": False}), find_card("4GB")
        )
