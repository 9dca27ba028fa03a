"""Adapters' files: what is written is what was trained, for every reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth_sm.adapters.adapter import Adapter, check_fit, merge
from dreambooth_sm.adapters.kohya_file import write_kohya
from dreambooth_sm.adapters.layers import Hadamard, Kronecker, Layer, LowRank, Rotation
from dreambooth_sm.adapters.peft_file import CONFIG_FIELD, write_peft
from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.model import configs_of
from tests.helpers.adapters import ATTENTION, CONVOLUTIONS, TEXT, answers, furthest, pipeline, trained
from tests.helpers.marks import slow_except

BASES = ("tiny_base", "tiny_xl_base")
# Of the UNet, and of text encoders where there are any.
LORAS: dict[str, dict[str, Any]] = {
    "rank is not alpha": {"r": 4, "lora_alpha": 6},
    "rank-stabilised, several ranks": {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"to_k": 2}},
    "DoRA": {"r": 2, "lora_alpha": 3, "use_dora": True},
}
OTHERS = {
    "loha": LoHaConfig(r=2, alpha=3, target_modules=[*ATTENTION, *CONVOLUTIONS]),
    "loha with cores": LoHaConfig(r=2, alpha=3, target_modules=["conv1", "to_q"], use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=[*ATTENTION, *CONVOLUTIONS]),
    "lokr with cores": LoKrConfig(
        r=2, alpha=3, target_modules=["conv1", "to_q"], use_effective_conv2d=True, decompose_both=True
    ),
    "lokr of one size": LoKrConfig(r=64, alpha=3, target_modules=ATTENTION, decompose_factor=4),
    "oft": OFTConfig(oft_block_size=8, target_modules=ATTENTION),
    "oft, three terms": OFTConfig(oft_block_size=8, target_modules=ATTENTION, num_cayley_neumann_terms=3),
    "oft, exact": OFTConfig(oft_block_size=8, target_modules=ATTENTION, use_cayley_neumann=False, block_share=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("text", [True, False], ids=["all parts", "UNet"])
def test_diffusers_draws_with_a_file_as_peft_does(
    request: pytest.FixtureRequest, base: str, kind: str, text: bool, tmp_path: Path
) -> None:
    directory = request.getfixturevalue(base)
    whole, options = pipeline(directory), LORAS[kind]
    parts = {"unet": trained(whole.unet, LoraConfig(target_modules=[*ATTENTION, *CONVOLUTIONS], **options))}
    for part in [part for part in configs_of(whole) if part.startswith("text_encoder") and text]:
        parts[part] = trained(getattr(whole, part), LoraConfig(target_modules=TEXT, **options))
    adapter, wanted = Adapter(parts), answers(whole)
    write_peft(tmp_path / "peft.safetensors", adapter)
    files = ["peft"]
    if kind == "DoRA":
        with pytest.raises(UserError, match=r"^DoRA can't be written .* take the layout diffusers, or merge it"):
            write_kohya(tmp_path / "kohya.safetensors", adapter, configs_of(whole))
    else:
        write_kohya(tmp_path / "kohya.safetensors", adapter, configs_of(whole))
        files.append("kohya")
    for name in files:
        drawing = pipeline(directory)
        assert furthest(answers(drawing), wanted) > 0.1
        drawing.load_lora_weights(str(tmp_path / f"{name}.safetensors"))
        assert furthest(answers(drawing), wanted) < 1e-5, name
        assert_merges(read_adapter(tmp_path / f"{name}.safetensors"), directory, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["fc1", "fc2"], ["k_proj", "fc1", "fc2"]], ids="-".join)
def test_diffusers_draws_with_text_encoders_that_lack_projections(
    targets: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    """Which it can't tell apart, or takes for others, where the file has no more than what was trained."""
    whole = pipeline(tiny_base)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    adapter = Adapter({"text_encoder": trained(whole.text_encoder, config)})
    wanted = answers(whole)
    write_peft(tmp_path / "peft.safetensors", adapter)
    write_kohya(tmp_path / "kohya.safetensors", adapter, configs_of(whole))
    for name in ("peft", "kohya"):
        drawing = pipeline(tiny_base)
        drawing.load_lora_weights(str(tmp_path / f"{name}.safetensors"))
        assert furthest(answers(drawing), wanted) < 1e-5, name
        assert_merges(read_adapter(tmp_path / f"{name}.safetensors"), tiny_base, wanted)


def assert_merges(adapter: Adapter, directory: Path, wanted: dict[str, torch.Tensor]) -> None:
    """The base model with the adapter in its weights answers like this."""
    assert not adapter.unknown
    merged = pipeline(directory)
    for part, layers in adapter.parts.items():
        module = getattr(merged, part)
        module.load_state_dict(merge(layers, module.state_dict()))
    assert furthest(answers(merged), wanted) < 1e-5


@pytest.mark.parametrize("kind", slow_except(["lokr of one size"], OTHERS))
def test_other_kinds_are_what_peft_makes_of_them(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    config = OTHERS[kind]
    whole = pipeline(tiny_base)
    adapter = Adapter({"unet": trained(whole.unet, config)})
    wanted = answers(whole)
    assert_merges(adapter, tiny_base, wanted)
    write_peft(tmp_path / "peft.safetensors", adapter)
    assert_merges(read_adapter(tmp_path / "peft.safetensors"), tiny_base, wanted)
    # PEFT, with nothing but the file.
    with safe_open(tmp_path / "peft.safetensors", "pt") as file:
        said = {key.removeprefix("unet."): each for key, each in json.loads(file.metadata()[CONFIG_FIELD]).items()}
    other = pipeline(tiny_base)
    inject_adapter_in_model(type(config)(**said), other.unet)
    state = load_file(tmp_path / "peft.safetensors")
    result = set_peft_model_state_dict(other.unet, {key.removeprefix("unet."): value for key, value in state.items()})
    assert not result.unexpected_keys
    other.unet.eval()
    assert furthest(answers(other), wanted) < 1e-5
    kohya = tmp_path / "kohya.safetensors"
    if "oft" in kind:
        with pytest.raises(UserError, match="OFT can't be written in the layout kohya"):
            write_kohya(kohya, adapter, configs_of(whole))
    else:
        write_kohya(kohya, adapter, configs_of(whole))
        assert_merges(read_adapter(kohya), tiny_base, wanted)


def matrix(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, tuple[int, ...]]:
    """A layer of any kind, and the shape of the weight that it is for."""
    out, inputs, rank, kernel = (draw(st.integers(1, 4)) for _ in range(4))
    seed, scale = draw(st.integers(0, 99)), draw(st.sampled_from([1.0, 0.5, 3.0]))
    square = (kernel, kernel) if draw(st.booleans()) else ()
    shape = (out, inputs, *square)
    ones = (1, 1) if square else ()
    kind = draw(st.sampled_from(["low", "core", "dora", "hadamard", "kronecker", "rotation"]))
    down, up = matrix(rank, inputs, *square, seed=seed), matrix(out, rank, *ones, seed=seed + 1)
    if kind == "low" or (kind == "core" and not square):
        return LowRank(down, up, scale), shape
    if kind == "core":
        middle = matrix(rank, rank, *square, seed=seed + 2)
        return LowRank(matrix(rank, inputs, 1, 1, seed=seed), up, scale, middle), shape
    if kind == "dora":
        magnitude = matrix(out, *[1] * (len(shape) - 1), seed=seed).abs() + 0.1
        return LowRank(down, up, scale, magnitude=magnitude), shape
    if kind == "hadamard":
        flat = inputs * max(1, torch.Size(square).numel())
        pairs = [(matrix(out, rank, seed=seed + n), matrix(rank, flat, seed=seed + n + 5)) for n in (0, 1)]
        return Hadamard(pairs[0], pairs[1], scale), shape
    if kind == "kronecker":
        small = (matrix(2, rank, seed=seed), matrix(rank, 3, seed=seed + 1))
        return Kronecker(small, (matrix(out, inputs, *square, seed=seed + 2),), scale), (2 * out, 3 * inputs, *square)
    return Rotation(matrix(out, 3, seed=seed), 3), (inputs, 3 * out)


@given(layers(), st.sampled_from(["unet", "text_encoder", "text_encoder_2"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, layer: tuple[Layer, tuple[int, ...]], part: str, kohya: bool
) -> None:
    """Every kind in every part, in both layouts, or refused by name."""
    made, shape = layer
    text = "text_model.encoder.layers.1.self_attn.out_proj"
    names = {"unet": "down_blocks.1.resnets.0.conv1", "text_encoder_2": text}
    name = names.get(part, text.removeprefix("text_model."))
    path = tmp_path_factory.getbasetemp() / "adapter.safetensors"
    adapter = Adapter({part: {name: made}})
    configs: dict[str, Any] = {"unet": {"layers_per_block": 2, "up_block_types": ["UpBlock2D"] * 2}}

    def write() -> None:
        if kohya:
            write_kohya(path, adapter, configs | {"text_encoder_2": {}})
        else:
            write_peft(path, adapter)

    if made.kind in ("DoRA", "OFT") if kohya else isinstance(made, LowRank) and made.middle is not None:
        with pytest.raises(UserError, match=r"DoRA|OFT|CP decomposition"):
            write()
        return
    write()
    read = read_adapter(path)
    assert [(found[0], found[1]) for found in read] == [(part, name)]
    assert not read.unknown
    assert read.kinds == adapter.kinds
    check_fit(read, {part: {f"{name}.weight": shape}}, "the base")
    weight = matrix(*shape, seed=1)
    torch.testing.assert_close(read.parts[part][name].change(weight), made.change(weight), rtol=1e-4, atol=1e-5)
