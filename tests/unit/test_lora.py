"""LoRA and its kin: what they compute, what their files hold, and that training them is training."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch import nn

from dreambooth_sm.adapters.peft_layers import inject, parameters_of, switched_off
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.cards import CARDS, find_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw
from dreambooth_sm.stored.model import empty_module
from dreambooth_sm.validation import Validator
from tests.helpers.marks import slow_except
from tests.helpers.training import Run, attach, cpu_plan, hyperparameters, same, weights
from tests.helpers.true_sizes import CONFIGS

VALUES: dict[str, object] = {"method": "lora", "learning_rate": 1e-2, "model_name": "zwx", "lora_rank": 4}
VARIANTS: dict[str, dict[str, object]] = {
    "lora": {"lora_alpha": 2, "lora_targets": "linear", "train_text_encoder": True},
    "all": {"lora_targets": "all", "lora_rank_stabilised": True},
    "dora": {"lora_variant": "dora", "lora_init": "gaussian"},
    "loha": {"lora_variant": "loha", "lora_alpha": 8},
    "lokr": {"lora_variant": "lokr", "lora_targets": "all"},
    "oft": {"lora_variant": "oft", "lora_rank": 8},
}
PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}


def picture(model: Any) -> np.ndarray:
    pipeline = model.pipeline() if isinstance(model, PretrainedModel) else model
    ((drawn,),) = draw(pipeline, "photo of zwx toy", [3], resolution=64, steps=2)
    return np.asarray(drawn).astype(int)


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """But for rounding."""
    return bool(np.abs(one - other).max() <= 1)


@pytest.fixture(scope="module", params=slow_except(["lora"], VARIANTS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run, np.ndarray]:
    """A trained adapter, and what its model draws."""
    base = request.getfixturevalue("loaded_base")
    run = Run(base, tmp_path_factory.mktemp(request.param), **VALUES | VARIANTS[request.param]).train()
    return request.param, run, picture(run.base)


def test_untrained_it_changes_nothing_and_the_model_stays_as_it_is(base: PretrainedModel) -> None:
    before, untrained = weights(base.unet), picture(base)
    h = hyperparameters(**VALUES, lora_targets="all")
    trainable = attach(base, h, cpu_plan(h))
    assert {p.device.type for p in trainable.parameters.values()} == {"meta"}
    shapes = {name: p.shape for name, p in trainable.parameters.items()}
    trainable.load()
    assert {name: p.shape for name, p in trainable.parameters.items()} == shapes
    assert same(weights(base.unet), before)
    trainable.place(cpu_plan(h), torch.device("cpu"))
    assert np.array_equal(picture(base), untrained)


def test_what_is_frozen_stays_and_it_can_be_switched_off(
    trained: tuple[str, Run, np.ndarray], loaded_base: PretrainedModel
) -> None:
    _, run, drawn = trained
    untrained = picture(loaded_base)
    assert not alike(drawn, untrained)
    with switched_off([run.base.unet, run.base.text_encoder]):
        assert np.array_equal(picture(run.base), untrained)
    assert np.array_equal(picture(run.base), drawn)
    frozen = {name.replace(".base_layer", ""): value for name, value in weights(run.base.unet).items()}
    assert all(torch.equal(frozen[name], value) for name, value in weights(loaded_base.unet).items())


def test_its_files_draw_as_the_trained_model_does(
    trained: tuple[str, Run, np.ndarray], tiny_base: Path, tmp_path: Path
) -> None:
    name, run, drawn = trained
    h = run.h.model_copy(update={"export": "both"})
    run.trainable.export(tmp_path, h, torch.float32)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    flat = name not in ("dora", "oft")
    assert files == {FILE, *(["zwx.safetensors"] if flat else [])}
    merged = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert alike(picture(merged), drawn)
    loadable = [FILE] * (name not in ("loha", "lokr", "oft")) + ["zwx.safetensors"] * (name in ("lora", "all"))
    for file in loadable:
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.float32)
        pipeline.load_lora_weights(str(tmp_path), weight_name=file)
        assert alike(picture(pipeline), drawn), file


@pytest.mark.slow
def test_sdxl_with_both_text_encoders(xl_base: PretrainedModel, tiny_xl_base: Path, tmp_path: Path) -> None:
    untrained = picture(xl_base)
    values = {**VALUES, "base_architecture": "sdxl", "train_text_encoder": True, "max_train_steps": 2}
    run = Run(xl_base, tmp_path / "run", **values).train()
    assert {name.partition(".")[0] for name in run.trainable.parameters} == {"unet", *run.base.text_parts}
    drawn = picture(run.base)
    assert not alike(drawn, untrained)
    run.trainable.export(tmp_path, run.h, torch.float32)
    for file in (FILE, "zwx.safetensors"):
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_xl_base, dtype=torch.float32)
        pipeline.load_lora_weights(str(tmp_path), weight_name=file)
        assert alike(picture(pipeline), drawn), file


def test_files_say_what_they_are_of(trained: tuple[str, Run, np.ndarray], tmp_path: Path) -> None:
    name, run, _ = trained
    run.trainable.export(tmp_path, run.h, torch.float16)
    assert not (tmp_path / "model_index.json").exists()
    sizes = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert sizes <= 2 * run.trainable.exported_values(run.h) * 2 + 2e5
    usage = METHODS["lora"].usage("StableDiffusionPipeline", "the-base", "photo", run.h.model_dump())
    assert ("load_lora_weights" in usage) == (name not in ("loha", "lokr", "oft"))
    assert ("<lora:NAME:1>" in usage) == (name not in ("dora", "oft"))


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 1, "lora_targets": "linear"}])
def test_layers_compute_what_pefts_compute(options: dict[str, object]) -> None:
    h = hyperparameters(**VALUES, **options)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 8, bias=False)).requires_grad_(False)
    inject(module, h, ("0", "2"))
    for parameter in parameters_of(module).values():
        nn.init.normal_(parameter.requires_grad_())
    theirs = copy.deepcopy(module)
    for layer in theirs.modules():
        layer.__dict__.pop("forward", None)
    inputs = torch.randn(3, 5, 12)
    found = []
    for each in (module, theirs):
        states = inputs.clone().requires_grad_()
        result = each(states)
        result.square().sum().backward()
        found.append([result, states.grad, *(p.grad for p in parameters_of(each).values())])
    assert all(value is not None for value in found[0])
    torch.testing.assert_close(*found)
    assert all(
        layer.weight.grad is None for layer in module.modules() if type(layer) is nn.Linear and layer.bias is not None
    )


def test_a_model_that_draws_while_another_trains_shares_what_is_frozen(base: PretrainedModel) -> None:
    h = hyperparameters(**VALUES)
    trainable = attach(base, h, cpu_plan(h))
    drawn = trainable.drawable(torch.float32)
    trainable.place(cpu_plan(h), torch.device("cpu"))
    mine, theirs = ({p.data_ptr() for p in model.unet.parameters()} for model in (drawn.model, base))
    frozen = sum(1 for _ in base.unet.parameters()) - len(trainable.parameters)
    assert len(mine & theirs) == frozen
    assert not {p.data_ptr() for p in drawn.parameters.values()} & theirs


@pytest.mark.slow
@pytest.mark.usefixtures("quick_drawing")
def test_pictures_on_the_way_are_the_models_and_training_is_the_same(base: PretrainedModel, tmp_path: Path) -> None:
    options = VALUES | {"validation_prompt": "photo of zwx toy", "validation_steps": 2, "use_ema": True}
    with_ = Run(base, tmp_path / "with", **options)
    validator = Validator(
        with_.trainable, ("photo of zwx toy",), with_.h, with_.plan, tmp_path / "samples", with_.recorder
    )
    with_.trainer.train(tmp_path / "checkpoints", with_.recorder.stop, [validator])
    without = Run(base, tmp_path / "without", **options).train()
    assert with_.losses == without.losses
    (drawn,) = with_.recorder.samples
    short = Run(base, tmp_path / "short", **options | {"max_train_steps": 2}).train()
    after = Validator(short.trainable, ("photo of zwx toy",), short.h, short.plan, tmp_path / "after", short.recorder)
    after.draw(2)
    with Image.open(drawn.path) as one, Image.open(short.recorder.samples[0].path) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.slow
def test_a_smaller_plan_learns_the_same_and_another_one_may_continue(base: PretrainedModel, tmp_path: Path) -> None:
    options = VALUES | {"train_text_encoder": True}
    whole = Run(base, tmp_path / "whole", **options).train()
    smaller = Run(base, tmp_path / "smaller", plan={"gradient_checkpointing": True}, **options).train()
    for mine, theirs in zip(smaller.losses, whole.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    stepped = Run(base, tmp_path / "stepped", **options)
    for _ in range(2):
        stepped.trainer.optimizer_step(1e-2)
    state = stepped.trainer.rescue()
    again = stepped.trainer_of(dataclasses.replace(stepped.plan, gradient_checkpointing=True))
    again.load_state(state, 2)
    for _ in range(2):
        again.optimizer_step(1e-2)
    again.finish()
    for name, parameter in whole.trainable.parameters.items():
        torch.testing.assert_close(stepped.trainable.parameters[name], parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_weights_of_a_cards_plan_learn_what_fp32_learns(base: PretrainedModel, tmp_path: Path) -> None:
    """bf16 weights beside fp32 masters, on the CPU."""
    plan = {"weights": "master", "precision": "bf16", "optimizer": "adamw"}
    half = Run(base, tmp_path / "half", plan=plan, **VALUES).train()
    whole = Run(base, tmp_path / "whole", **VALUES).train()
    for mine, theirs in zip(half.losses, whole.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-2)
    assert {p.dtype for p in half.trainable.parameters.values()} == {torch.float32}


def test_rates_are_apart(base: PretrainedModel) -> None:
    h = hyperparameters(**VALUES, train_text_encoder=True, text_encoder_lr=1e-3, lora_plus_ratio=8)
    rates = attach(base, h, cpu_plan(h)).rates
    found = {(name.partition(".")[0], name.split(".")[-2]): rate for name, rate in rates.items()}
    assert found == {
        ("unet", "lora_A"): 1,
        ("unet", "lora_B"): 8,
        ("text_encoder", "lora_A"): pytest.approx(0.1),
        ("text_encoder", "lora_B"): pytest.approx(0.8),
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_plans_know_how_many_parameters_there_are(family: str) -> None:
    facts = FAMILIES[family].facts
    modules = {part: empty_module(part, config, facts.pipeline) for part, config in CONFIGS[family].items()}
    for targets, layers in facts.adapted.items():
        h = Hyperparameters.parse({**PROMPTS, "base_architecture": family, "method": "lora", "lora_targets": targets})
        found = {}
        for part, module in modules.items():
            ends = layers.denoiser if part == facts.denoiser else layers.text_encoder
            named = [m for name, m in module.named_modules() if any(f".{name}".endswith(f".{end}") for end in ends)]
            found[part] = sum(m.weight.shape[0] + m.weight.shape[1:].numel() for m in named)
        assert layers.width == found.pop(facts.denoiser)
        assert layers.text_width == sum(found.values())
        millions = METHODS["lora"].trained_millions(facts.footprint, h, True)
        assert millions == pytest.approx(16e-6 * (layers.width + layers.text_width))


def test_small_cards_train_it() -> None:
    for family in ("sd", "sdxl"):
        h = Hyperparameters.parse({**PROMPTS, "base_architecture": family, "method": "lora"})
        full = make_plan(h, CARDS["H100"])
        assert full.tier == "roomy"
        assert full.weights == "master"
        assert not full.notes
        small = make_plan(h, find_card("4GB" if family == "sd" else "8GB"))
        assert small.predicted_peak_gb <= find_card("8GB").budget_gb
        both = make_plan(h.model_copy(update={"train_text_encoder": True}), CARDS["T4"])
        assert both.train_text_encoder


@pytest.mark.parametrize("export", ["diffusers", "single_file"])
def test_exports_of_whole_models_are_refused(export: str) -> None:
    with pytest.raises(UserError, match="set export to adapter or merged or both"):
        Hyperparameters.parse({**PROMPTS, "method": "lora", "export": export})
    with pytest.raises(UserError, match="set export to diffusers or single_file or both"):
        Hyperparameters.parse({**PROMPTS, "export": "adapter"})
