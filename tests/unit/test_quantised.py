"""Frozen layers in 8 and 4 bits: what their codes stand for, and that adapters train, resume and are exported beside
them."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreambooth_sm.adapters.peft_layers import inject, parameters_of
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel, keep_layers
from dreambooth_sm.planning.cards import find_card
from dreambooth_sm.planning.choice import make_plan, smaller_plan
from dreambooth_sm.sampling import draw, drawing_part
from dreambooth_sm.stored import model as stored_model
from dreambooth_sm.stored.model import empty_module
from dreambooth_sm.training import quantised
from dreambooth_sm.training.checkpoint import latest_checkpoint
from dreambooth_sm.training.quantised import (
    LEVELS,
    QuantisedConv2d,
    QuantisedLayer,
    QuantisedLinear,
    dequantised,
    is_quantised,
    quantise,
    quantise_layers,
)
from tests.helpers.interpreter import printed_in_the_interpreter
from tests.helpers.marks import slow_except
from tests.helpers.training import Run, attach, cpu_plan, hyperparameters, run_out_of_memory, same, weights
from tests.helpers.true_sizes import CONFIGS
from tests.unit.test_lora import PROMPTS, VALUES, VARIANTS

CPU = torch.device("cpu")
KINDS: tuple[quantised.CodeKind, ...] = ("int8", "nf4")


def matrix(rows: int = 24, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_levels_are_those_of_nf4() -> None:
    """The first three and the last of the published table."""
    assert len(LEVELS) == 16
    assert list(LEVELS) == sorted(LEVELS)
    assert LEVELS[:3] == pytest.approx([-1, -0.6961928, -0.52507305], abs=1e-6)
    assert LEVELS[7] == 0
    assert LEVELS[-2:] == pytest.approx([0.72295684, 1], abs=1e-6)


def test_each_value_becomes_the_nearest_that_there_is() -> None:
    weight = matrix()
    integers = dequantised(*quantise(weight, "int8", torch.float32))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((integers - weight).abs() <= step / 2 + 1e-6).all()
    blocks = weight.view(-1, 64)
    choices = blocks.abs().amax(1, keepdim=True)[..., None] * torch.tensor(LEVELS)
    nearest = (choices - blocks[..., None]).abs().amin(-1)
    found = dequantised(*quantise(weight, "nf4", torch.float32)).view(-1, 64)
    torch.testing.assert_close((found - blocks).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_and_the_type_is_that_of_the_scales(kind: quantised.CodeKind, dtype: torch.dtype) -> None:
    weight = matrix()
    weight[:2] = 0
    found = dequantised(*quantise(weight, kind, dtype))
    assert found.dtype == dtype
    assert found.shape == weight.shape
    assert not found[:2].any()
    assert (found - weight).norm() / weight.norm() < (0.012 if kind == "int8" else 0.1)


def test_bitsandbytes_makes_the_same_codes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scales = quantise(matrix(), "nf4", torch.float32)
    theirs, state = functional.quantize_4bit(matrix(), blocksize=64, quant_type="nf4")
    assert torch.equal(codes.flatten(), theirs.flatten())
    torch.testing.assert_close(dequantised(codes, scales), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "dora", "lokr"])
def test_layers_compute_with_what_the_codes_stand_for(kind: quantised.CodeKind, name: str) -> None:
    """Outputs and gradients are those of a layer with the same values in full."""
    h = hyperparameters(**VALUES, **({} if name == "lora" else VARIANTS[name]))
    found = []
    for whole in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 64, bias=False)).requires_grad_(False)
        quantise_layers(module, kind, torch.float32, CPU)
        if whole:
            for number, layer in ((0, module[0]), (2, module[2])):
                module[number] = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                module[number].weight = nn.Parameter(layer.weight, requires_grad=False)
                module[number].bias = layer.bias
        inject(module, h, ("0", "2"))
        torch.manual_seed(1)
        for parameter in parameters_of(module).values():
            nn.init.normal_(parameter.requires_grad_())
        states = torch.randn(3, 5, 64, requires_grad=True)
        result = module(states)
        result.square().sum().backward()
        found.append([result, states.grad, *(p.grad for p in parameters_of(module).values())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 1, "padding": 0}, {"stride": 2, "bias": False}])
def test_convolutions_compute_with_what_the_codes_stand_for(
    kind: quantised.CodeKind, layout: torch.memory_format, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    whole = nn.Conv2d(32, 64, **{"kernel_size": 3, "padding": 1} | options).requires_grad_(False)
    module = nn.Sequential(whole)
    quantise_layers(module, kind, torch.float32, CPU)
    before = whole.weight.clone()
    assert type(module[0]) is QuantisedConv2d
    with torch.no_grad():
        whole.weight.copy_(module[0].weight)
    assert 0 < (whole.weight - before).norm() / before.norm() < (0.012 if kind == "int8" else 0.1)
    found = []
    for layer in (whole, module[0]):
        image = torch.randn(2, 32, 9, 8, generator=torch.Generator().manual_seed(1))
        image = image.to(memory_format=layout).requires_grad_()
        result = layer(image)
        result.square().sum().backward()
        found.append([result, image.grad])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["lora", "dora", "loha", "lokr", "oft"])
def test_adapters_beside_convolutions_compute_with_what_the_codes_stand_for(
    kind: quantised.CodeKind, size: int, name: str
) -> None:
    h = hyperparameters(**VALUES, lora_variant=name)
    found = []
    for whole in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(32, 64, size, padding=size // 2)).requires_grad_(False)
        quantise_layers(module, kind, torch.float32, CPU)
        if whole:
            layer, module[0] = module[0], nn.Conv2d(32, 64, size, padding=size // 2).requires_grad_(False)
            module[0].weight.copy_(layer.weight)
            module[0].bias = layer.bias
        inject(module, h, ("0",))
        assert isinstance(module[0].base_layer, QuantisedConv2d) != whole
        torch.manual_seed(1)
        for parameter in parameters_of(module).values():
            nn.init.normal_(parameter.requires_grad_(), std=0.1)
        image = torch.randn(2, 32, 9, 8, requires_grad=True)
        result = module(image)
        result.square().sum().backward()
        found.append([result, image.grad, *(p.grad for p in parameters_of(module).values())])
    assert len(found[0]) > 2
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_layers_of_odd_shapes_stay_and_those_that_are_trained_or_read_and_make_latents() -> None:
    convolutions = [nn.Conv2d(4, 64, 3), nn.Conv2d(64, 16, 3), nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 64, 1)]
    linears = [nn.Linear(7, 64), nn.Linear(10, 3), nn.Linear(64, 64)]
    module = nn.Sequential(*linears, *convolutions).requires_grad_(False).append(nn.Linear(64, 64))
    quantise_layers(module, "nf4", torch.float32, CPU)
    kinds = [nn.Linear, nn.Linear, QuantisedLinear, nn.Conv2d, nn.Conv2d, nn.Conv2d, QuantisedConv2d, nn.Linear]
    assert [type(layer) for layer in module] == kinds


@pytest.fixture(scope="module")
def plain(loaded_base: PretrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(loaded_base, tmp_path_factory.mktemp("plain"), **VALUES, train_text_encoder=True).train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_near_that_beside_whole_weights_and_resumes_to_the_bit(
    kind: str, base: PretrainedModel, plain: Run, tmp_path: Path
) -> None:
    options = VALUES | {"train_text_encoder": True, "base_weights": kind}
    run = Run(base, tmp_path / "run", **options).train()
    layers = [type(module) for module in run.base.unet.modules()]
    assert layers.count(QuantisedLinear) > 10
    assert layers.count(QuantisedConv2d) > 3
    assert any(isinstance(module, QuantisedLinear) for module in run.base.text_encoder.modules())
    assert run.trainable.parameters.keys() == plain.trainable.parameters.keys()
    assert run.losses != plain.losses
    for mine, theirs in zip(run.losses, plain.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=0.01 if kind == "int8" else 0.1)
    stopped = Run(base, tmp_path / "stopped", **options)
    with pytest.raises(StopRequested):
        stopped.train(stop_at=2)
    resumed = Run(base, tmp_path / "stopped", **options)
    checkpoint = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None
    resumed.trainer.resume(checkpoint)
    resumed.train()
    assert stopped.losses + resumed.losses == run.losses
    mine, theirs = ({name: p.detach() for name, p in each.trainable.parameters.items()} for each in (resumed, run))
    assert same(mine, theirs)


@pytest.mark.slow
def test_out_of_memory_keeps_the_base_in_fewer_bits(
    base: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What draws while the adapter is trained shares the codes: nobody holds the whole weights."""
    options = VALUES | {"gradient_checkpointing": True, "max_train_steps": 6}
    whole = Run(base, tmp_path / "whole", **options).train()
    run = Run(base, tmp_path / "stepped", **options)
    drawn = run.trainable.drawable(torch.float32)
    run_out_of_memory(monkeypatch, {2, 4})
    log = run.train_as_a_job()
    assert log.index("base_weights=int8") < log.index("base_weights=nf4")
    assert run.losses[:2] == whole.losses[:2]
    for stepped, uninterrupted in zip(run.losses, whole.losses, strict=True):
        assert stepped == pytest.approx(uninterrupted, rel=0.1)
    codes = [
        {name: p.data_ptr() for name, p in each.model.unet.named_parameters() if name.endswith(".codes")}
        for each in (drawn, run.trainable)
    ]
    assert codes[0] == codes[1]
    assert len(codes[0]) > 10
    layers = [layer for layer in run.base.unet.modules() if isinstance(layer, QuantisedLayer)]
    assert {layer.kind for layer in layers} == {"nf4"}
    (picture,) = next(draw(drawn.model.pipeline(), "photo of zwx toy", [0], resolution=64, steps=2))
    assert picture.size == (64, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_that_were_asked_for_stay(kind: str) -> None:
    h = Hyperparameters.parse({**PROMPTS, "method": "lora", "base_weights": kind, "gradient_checkpointing": True})
    assert smaller_plan(make_plan(h, find_card("24GB")), h) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "loha", "oft"])
def test_other_variants_train_beside_it(name: str, base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(base, tmp_path, **VALUES | VARIANTS[name] | {"base_weights": "nf4", "max_train_steps": 2}).train()
    assert all(torch.isfinite(torch.tensor(loss)).all() for loss in run.losses)


@pytest.mark.parametrize("variant", ["lora", "dora", "loha", "lokr", "oft"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_put_beside_it_without_making_its_weights(
    kind: quantised.CodeKind, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT asks each layer for them more than ten times; large models would wait a minute. DoRA reads them, once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 64), nn.Conv2d(64, 64, 3)).requires_grad_(False)
    plain = copy.deepcopy(net)
    quantised.quantise_layers(net, kind, torch.float32, CPU)
    made: list[torch.Size] = []

    def counted(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        made.append(codes.shape)
        return dequantised(codes, scales)

    monkeypatch.setattr(quantised, "dequantised", counted)
    h = hyperparameters(**VALUES | VARIANTS.get(variant, {}) | {"lora_targets": "all"})
    for module in (net, plain):
        torch.manual_seed(1)
        inject(module, h, ["0", "1"])
    assert len(made) == (2 if variant == "dora" else 0)
    ours, theirs = parameters_of(net), parameters_of(plain)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # Magnitudes are of what the codes stand for.
        tolerance = {"int8": 0.02, "nf4": 0.2}[kind] if "magnitude" in name else 0
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=0)
    assert net[0].weight.any()  # weights again once they are there


@pytest.mark.slow
def test_files_are_of_the_whole_base(base: PretrainedModel, tmp_path: Path) -> None:
    """What is merged is merged with the base model as it is, not with what its codes stand for."""
    before = weights(base.unet)
    run = Run(base, tmp_path / "run", **VALUES | {"base_weights": "nf4", "max_train_steps": 1, "export": "merged"})
    run.train()
    run.trainable.export(tmp_path, run.h, torch.float32)
    merged = {name: value.read() for name, value in _stored(tmp_path, run.h).weights("unet").items()}
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    adapted = {name.removeprefix("unet.").rpartition(".lora_")[0] for name in run.trainable.parameters}
    assert changed == {f"{name}.weight" for name in adapted}


def _stored(directory: Path, h: Hyperparameters) -> PretrainedModel:
    from dreambooth_sm.models import open_base

    return open_base(h.model_copy(update={"pretrained_model_name_or_path": str(directory)}))


def test_a_model_that_draws_while_another_trains_shares_its_codes(base: PretrainedModel) -> None:
    h = hyperparameters(**VALUES, base_weights="int8")
    trainable = attach(base, h, cpu_plan(h))
    before = weights(base.unet)
    drawn = trainable.drawable(torch.float32)
    assert same(weights(base.unet), before)
    trainable.place(cpu_plan(h), CPU)
    codes = [
        {p.data_ptr() for name, p in each.model.unet.named_parameters() if name.endswith(".codes")}
        for each in (drawn, trainable)
    ]
    assert codes[0] == codes[1]
    assert codes[0]
    assert drawn.model.part("unet", "cpu", torch.float32) is drawn.model.unet
    half = drawn.model.part("unet", "cpu", torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.int8, torch.float16}


def test_what_is_drawn_before_training_is_drawn_with_the_same_codes(base: PretrainedModel) -> None:
    h = hyperparameters(**VALUES, base_weights="int8")
    plan, before = cpu_plan(h), weights(base.unet)
    drawn = drawing_part(base, plan, "unet")
    assert same(weights(base.unet), before)
    assert not is_quantised(drawing_part(base, plan, "text_encoder"))
    trainable = attach(base, h, plan)
    trainable.load()
    trainable.place(plan, CPU)
    trained = drawing_part(trainable.model, plan, "unet")
    assert trained is trainable.model.unet
    names = {name.replace(".base_layer", ""): value for name, value in weights(trained).items()}
    codes = {name: value for name, value in weights(drawn).items() if name.endswith(".codes")}
    assert codes
    assert same({name: names[name] for name in codes}, codes)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_quantised_while_they_are_read(
    base: PretrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: quantised.CodeKind
) -> None:
    """Beside codes there is never more than a piece of whole weights."""
    base.save(tmp_path, torch.float16)
    read = _stored(tmp_path, Hyperparameters.parse(PROMPTS))
    whole: list[int] = []
    shrink = functools.partial(quantise_layers, kind=kind, dtype=torch.float32, device=CPU)

    def watched(module: nn.Module) -> None:
        layers = [layer for layer in module.modules() if type(layer) in (nn.Linear, nn.Conv2d)]
        shrink(module)
        replaced = [layer for layer in layers if all(layer is not other for other in module.modules())]
        whole.append(sum(layer.weight.numel() for layer in replaced) * 2)

    monkeypatch.setattr(stored_model, "_PIECE", 20_000)
    in_pieces = read.copy_of("unet", "cpu", None, watched)
    largest = max(parameter.numel() for parameter in base.unet.parameters()) * 2
    assert len(whole) > 5
    assert max(whole) <= 20_000 + largest
    at_once = read.copy_of("unet", "cpu", None)
    shrink(at_once)
    assert same(dict(in_pieces.state_dict()), dict(at_once.state_dict()))


@pytest.mark.parametrize("family", slow_except(["sd"], FAMILIES))
def test_footprints_count_the_layers_in_fewer_bits(family: str) -> None:
    footprint = FAMILIES[family].facts.footprint
    facts = FAMILIES[family].facts
    found: dict[bool, float] = {True: 0, False: 0}
    for part, config in CONFIGS[family].items():
        if part in facts.plain_text:
            continue
        module = empty_module(part, config, facts.pipeline).requires_grad_(False)
        if facts.text_layers and part == "text_encoder":
            keep_layers(module, facts.text_layers)
        whole = {name: parameter.numel() for name, parameter in module.named_parameters()}
        quantise_layers(module, "nf4", torch.bfloat16, torch.device("meta"))
        kept = {name for name, parameter in module.named_parameters() if parameter.dtype != torch.uint8}
        found[part == facts.denoiser] += sum(count for name, count in whole.items() if name not in kept) * 1e-6
    assert footprint.denoiser_coded == pytest.approx(found[True], rel=1e-3)
    assert footprint.text_coded == pytest.approx(found[False], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_count_the_bits_of_a_weight(kind: quantised.CodeKind) -> None:
    """Beside the adapters, what differs is what the same layers take, and one layer made whole."""
    h = Hyperparameters.parse({**PROMPTS, "base_architecture": "sdxl", "method": "lora"})
    card = find_card("24GB")
    plans = [make_plan(h.model_copy(update={"base_weights": each}), card) for each in ("plain", kind)]
    codes, scales = quantise(matrix(64, 1280), kind, torch.bfloat16)
    each = (codes.nbytes + scales.nbytes) / (64 * 1280)
    saved = 2560.6e-3 * (2 - each) - 2 * 9 * 2560 * 1280e-9
    difference = plans[0].predicted_peak_gb - plans[1].predicted_peak_gb
    assert difference == pytest.approx(saved, abs=0.02)
    assert any(f"base_weights={kind}" in note for note in plans[1].notes)
    assert not plans[0].notes


def test_small_cards_keep_the_base_in_fewer_bits() -> None:
    chosen = {}
    large = [("z_image", size) for size in ("8GB", "12GB", "24GB")]
    for family, size in (*itertools.product(("sd", "sdxl"), ("4GB", "6GB", "8GB")), *large):
        values: dict[str, Any] = {**PROMPTS, "base_architecture": family, "method": "lora"}
        if size == "4GB":
            values["with_prior_preservation"] = False
        plan = make_plan(Hyperparameters.parse(values), find_card(size))
        assert plan.predicted_peak_gb <= find_card(size).budget_gb
        chosen[family, size] = plan.base_weights
        assert any("no room" in note for note in plan.notes) == (plan.base_weights != "plain")
    assert {size: chosen["sd", size] for size in ("4GB", "6GB", "8GB")} == dict.fromkeys(("4GB", "6GB", "8GB"), "plain")
    assert [chosen["sdxl", size] for size in ("4GB", "6GB", "8GB")] == ["nf4", "int8", "plain"]
    assert [chosen[each] for each in large] == ["nf4", "int8", "plain"]


def test_a_card_that_is_too_small_for_what_was_asked_for_says_so() -> None:
    values = {**PROMPTS, "base_architecture": "sdxl", "method": "lora", "base_weights": "plain"}
    with pytest.raises(UserError, match="it fits with base_weights=auto"):
        make_plan(Hyperparameters.parse(values), find_card("6GB"))
    with pytest.raises(UserError, match="method=full computes with the base model as it is; set base_weights to auto"):
        make_plan(Hyperparameters.parse({**PROMPTS, "base_weights": "int8"}), find_card("24GB"))


@pytest.mark.slow
def test_the_kernel_in_the_interpreter() -> None:
    assert printed_in_the_interpreter(__file__).count("compared") == 1


def compare_kernel() -> None:
    """Of the types that the interpreter rounds as cards do."""
    for dtype, shape in itertools.product((torch.float32, torch.float16), ((24, 128), (50, 96 * 2), (32, 66))):
        assert quantised._kernels(CPU) is not None
        codes, scales = quantise(matrix(*shape), "int8", dtype)
        assert torch.equal(dequantised(codes, scales), codes * scales)
        codes, scales = quantise(matrix(*shape), "nf4", dtype)
        pairs = F.embedding(codes.int(), quantised._pairs(CPU, dtype))
        expected = pairs.view(-1, 64).mul_(scales).view(shape)
        assert torch.equal(dequantised(codes, scales), expected)
    print("compared")


if __name__ == "__main__":
    compare_kernel()
