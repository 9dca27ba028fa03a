"""``dreambooth-sm convert`` and ``describe`` with adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth_sm.adapters.adapter import Adapter, merge
from dreambooth_sm.adapters.kohya_file import write_kohya
from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.adapters.peft_file import CONFIG_FIELD, write_peft
from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.cli import main
from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.directory import read_directory, write_directory
from dreambooth_sm.stored.files import HASH_FIELD
from dreambooth_sm.stored.model import StoredModel, configs_of
from tests.helpers.adapters import ATTENTION, TEXT, answers, furthest, pipeline, trained


@pytest.fixture(scope="module")
def lora(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A LoRA of all parts in both layouts, and what the base model answers with it."""
    whole = pipeline(tiny_base)
    parts = {
        "unet": trained(whole.unet, LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "conv1"])),
        "text_encoder": trained(whole.text_encoder, LoraConfig(r=4, lora_alpha=6, target_modules=TEXT)),
    }
    folder = tmp_path_factory.mktemp("lora")
    adapter = Adapter(parts)
    write_peft(folder / "peft.safetensors", adapter, notes={"modelspec.trigger_phrase": "zwx toy"})
    write_kohya(folder / "kohya.safetensors", adapter, configs_of(whole), notes={"modelspec.trigger_phrase": "zwx toy"})
    return {"diffusers": folder / "peft.safetensors", "kohya": folder / "kohya.safetensors", "answers": answers(whole)}


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    assert main([str(word) for word in words]) == code
    found = capsys.readouterr()
    return found.out, found.err


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("diffusers", "kohya"), ("kohya", "diffusers")])
def test_an_adapter_goes_into_the_other_layout(
    source: str, target: str, lora: dict[str, Any], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, "convert", lora[source], tmp_path / "new.safetensors", "--precision", "fp32")
    assert out.strip() == str(tmp_path / "new.safetensors")
    new, wanted = load_file(tmp_path / "new.safetensors"), load_file(lora[target])
    assert new.keys() == wanted.keys()
    assert all(torch.equal(new[key], wanted[key]) for key in new)
    read = read_adapter(tmp_path / "new.safetensors")
    assert (read.layout, read.notes["modelspec.trigger_phrase"]) == (target, "zwx toy")
    other = pipeline(tiny_base)
    other.load_lora_weights(str(tmp_path / "new.safetensors"))
    assert furthest(answers(other), lora["answers"]) < 1e-5


def test_an_adapter_goes_into_the_same_layout_in_half_precision(
    lora: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "half.safetensors"
    run(capsys, "convert", lora["kohya"], target, "--layout", "kohya", "--precision", "fp16")
    assert {value.dtype for value in load_file(target).values()} == {torch.float16}
    with safe_open(target, "pt") as half, safe_open(lora["kohya"], "pt") as whole:
        assert half.metadata()[HASH_FIELD] != whole.metadata()[HASH_FIELD]
        assert half.metadata().keys() == whole.metadata().keys()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["merged", "merged.safetensors"])
def test_an_adapter_goes_into_its_base_model(
    target: str, lora: dict[str, Any], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "convert", lora["kohya"], tmp_path / target, "--merge-into", tiny_base)
    if target == "merged":
        assert furthest(answers(pipeline(tmp_path / target)), lora["answers"]) < 1e-5
    run(capsys, "convert", lora["diffusers"], tmp_path / "none", "--merge-into", tiny_base, "--strength", "0")
    assert furthest(answers(pipeline(tmp_path / "none")), answers(pipeline(tiny_base))) == 0


@pytest.mark.slow
def test_a_lora_is_extracted_from_what_a_model_was_trained_to(
    lora: dict[str, Any], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = pipeline(tiny_base)
    for part, layers in read_adapter(lora["kohya"]).parts.items():
        module = getattr(tuned, part)
        module.load_state_dict(merge(layers, module.state_dict()))
    write_directory(StoredModel.of("tuned", tuned), tmp_path / "tuned", dtype=None)
    target = tmp_path / "lora.safetensors"
    words = ("convert", tmp_path / "tuned", target, "--extract-from", tiny_base, "--rank", "4", "--precision", "fp32")
    _, err = run(capsys, *words)
    assert "100.0% of the difference (of its square) is kept, in 48 layers of rank 4 or less" in err
    read = read_adapter(target)
    assert (read.kinds, read.ranks, read.layout) == (("LoRA",), (4,), "kohya")
    other = pipeline(tiny_base)
    other.load_lora_weights(str(target))
    assert furthest(answers(other), lora["answers"]) < 1e-4
    target.unlink()
    tuned.unet.conv_in.bias.data += 0.1
    write_directory(StoredModel.of("tuned", tuned), tmp_path / "biased", dtype=None)
    _, err = run(capsys, "convert", tmp_path / "biased", target, "--extract-from", tiny_base, "--rank", "1")
    share = float(err.split("warning: ")[1].split("%")[0])
    assert 20 < share < 90
    assert "1 tensors that no LoRA has differ as well and are left out, such as unet.conv_in.bias" in err
    _, err = run(capsys, "convert", tiny_base, tmp_path / "no.safetensors", "--extract-from", tiny_base, code=2)
    assert "do not differ in any layer" in err


def test_what_is_wrong_with_a_conversion_is_told(
    lora: dict[str, Any], tiny_base: Path, tiny_xl_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, file = tmp_path / "new", tmp_path / "new.safetensors"
    dora = LowRank(torch.ones(2, 32), torch.ones(64, 2), magnitude=torch.ones(64, 1))
    write_peft(tmp_path / "dora.safetensors", Adapter({"unet": {"mid_block.attentions.0.proj_in": dora}}))
    for words, said in (
        ((lora["kohya"], new), "an adapter is one file; name one that ends in .safetensors"),
        ((tmp_path / "dora.safetensors", file, "--layout", "kohya"), "DoRA can't be written in the layout kohya"),
        ((tiny_base, new, "--layout", "kohya"), "--layout is for adapters"),
        ((tiny_base, new, "--merge-into", tiny_base), "holds no adapter, or several"),
        ((lora["kohya"], new, "--merge-into", tiny_xl_base), "the adapter is for another base model: "),
        ((lora["kohya"], new, "--extract-from", tiny_base), "name one that ends in .safetensors"),
        ((lora["kohya"], file, "--extract-from", tiny_base), "is a LoRA, not a whole model"),
        ((tiny_base, file, "--extract-from", tiny_base, "--rank", "0"), "the rank has to be at least 1"),
        ((tiny_base, file, "--rank", "4", "--strength", "2"), "--rank belongs to --extract-from"),
        ((lora["kohya"], new, "--merge-into", tiny_base, "--layout", "kohya"), "--merge-into writes a model"),
    ):
        _, err = run(capsys, "convert", *words, code=2)
        assert said in err
        assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["dora.safetensors"]


def test_what_is_not_known_in_a_file_is_named(
    lora: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(lora["kohya"]) | {"lora_unet_strange.lora_up.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "more.safetensors")
    _, err = run(capsys, "convert", tmp_path / "more.safetensors", tmp_path / "new.safetensors")
    assert "1 tensors are of no layer known here and are left out, such as lora_unet_strange.lora_up.weight" in err
    assert "does not say what base model it is for" in err


def test_files_are_described(
    lora: dict[str, Any], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, "describe", lora["kohya"], "--json")
    found = json.loads(out)
    assert (found["kind"], found["layout"], found["rank"], found["alpha"]) == ("LoRA", "kohya", "4", "4")
    assert (found["base model"], found["trigger phrase"]) == ("Stable Diffusion 1", "zwx toy")
    assert found["text_encoder"] == "8 layers: self_attn.k_proj, self_attn.out_proj, self_attn.q_proj, self_attn.v_proj"
    assert found["unet"].startswith("40 layers: attn1.to_k, ")
    out, _ = run(capsys, "describe", tiny_base)
    assert "a whole model" in out
    assert "Stable Diffusion 1 or 2" in out
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 768)}, "name": "x"}, tmp_path / "x.pt"
    )
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, tmp_path / "xl.safetensors")
    torch.save({768: ({"linear.0.weight": torch.ones(2, 2)},), "activation_func": "relu"}, tmp_path / "h.pt")
    for name in ("x.pt", "xl.safetensors"):
        assert "textual inversion" in run(capsys, "describe", tmp_path / name)[0]
        _, err = run(
            capsys, "convert", tmp_path / name, tmp_path / "new.safetensors", "--merge-into", tiny_base, code=2
        )
        assert "is a textual inversion embedding; name the file of a LoRA" in err
    assert "is a hypernetwork" in run(capsys, "describe", tmp_path / "h.pt", code=2)[1]
    whole = lora["kohya"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is not a whole safetensors file" in run(capsys, "describe", tmp_path / "cut.safetensors", code=2)[1]
    (tmp_path / "words.txt").write_text("words")
    assert "neither a safetensors file" in run(capsys, "describe", tmp_path / "words.txt", code=2)[1]


def old_names(key: str) -> str:
    """Of attention processors, in diffusers until 0.20."""
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        for new, old in (("lora_A", "down"), ("lora_B", "up")):
            key = key.replace(f".{layer}.{new}.", f".processor.{layer.removesuffix('.0')}_lora.{old}.")
    return key


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda key: key.replace("text_model.", ""),
        lambda key: key.replace("lora_A.weight", "lora_A.default.weight"),
        lambda key: f"base_model.model.{key}",
        lambda key: key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"),
        old_names,
    ],
    ids=["down and up", "transformers 5", "PEFT's adapter name", "PEFT's model", "linear layers", "processors"],
)
def test_names_of_other_times_and_programs_are_read(rename: Any, lora: dict[str, Any], tmp_path: Path) -> None:
    save_file({rename(key): value for key, value in load_file(lora["diffusers"]).items()}, tmp_path / "a.safetensors")
    read, wanted = read_adapter(tmp_path / "a.safetensors"), read_adapter(lora["diffusers"])
    assert not read.unknown
    assert {part: layers.keys() for part, layers in read.parts.items()} == {
        part: layers.keys() for part, layers in wanted.parts.items()
    }


def test_a_pickle_and_alpha_are_read(lora: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    """Half of alpha is half of the change."""
    tensors = load_file(lora["kohya"])
    torch.save(
        {key: value / 2 if key.endswith("alpha") else value for key, value in tensors.items()}, tmp_path / "a.pt"
    )
    read, wanted = read_adapter(tmp_path / "a.pt"), read_adapter(lora["kohya"])
    weights = read_directory(tiny_base).load().unet.state_dict()
    for name, layer in read.parts["unet"].items():
        weight = weights[f"{name}.weight"]
        torch.testing.assert_close(layer.change(weight), wanted.parts["unet"][name].change(weight) / 2)


@pytest.mark.parametrize("shape", [(4, 1), (4,), (1, 6)], ids=["rows", "rows, flat", "columns"])
def test_magnitudes_of_lycoris_are_read(shape: tuple[int, ...], tmp_path: Path) -> None:
    """As LyCORIS has them, whose files are read, and written for PEFT where they are of rows."""
    up, down, weight, magnitude = torch.randn(4, 2), torch.randn(2, 6), torch.randn(4, 6), torch.rand(shape) + 0.5
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.dora_scale": magnitude}
    save_file(tensors | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.kinds == ("DoRA",)
    whole = weight + up @ down / 2
    norm = whole.norm(dim=0 if shape == (1, 6) else 1, keepdim=True)
    wanted = whole / norm * magnitude.reshape(norm.shape)
    torch.testing.assert_close(weight + read.parts["unet"]["mid_block.attentions.0.proj_in"].change(weight), wanted)
    if shape == (1, 6):
        with pytest.raises(UserError, match="PEFT has no DoRA with a magnitude for each column"):
            write_peft(tmp_path / "b.safetensors", read)
    else:
        write_peft(tmp_path / "b.safetensors", read)
        again = read_adapter(tmp_path / "b.safetensors").parts["unet"]["mid_block.attentions.0.proj_in"]
        torch.testing.assert_close(weight + again.change(weight), wanted)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
            torch.ones(8, 3),
            "ranks [3, 4] in one",
        ),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", torch.ones(8), "has the shape"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha", torch.ones(2), "make no adapter"),
    ],
)
def test_damaged_adapters_are_told(
    key: str, value: torch.Tensor, said: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    save_file(load_file(lora["kohya"]) | {key: value}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path / "a.safetensors")
    assert len(error.value.problems) == 1
    assert said in str(error.value)


@pytest.mark.parametrize("said", ["{", "[]", '{"unet.lora_alpha": "four"}', '{"unet.rank_pattern": {"(": 2}}'])
def test_configurations_that_can_not_be_read_are_told(said: str, lora: dict[str, Any], tmp_path: Path) -> None:
    save_file(load_file(lora["diffusers"]), tmp_path / "a.safetensors", metadata={CONFIG_FIELD: said})
    with pytest.raises(UserError, match="make no adapter"):
        read_adapter(tmp_path / "a.safetensors")


def test_other_adapters_are_called_by_their_names(tmp_path: Path) -> None:
    for key, said in (
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "an OFT or BOFT of LyCORIS"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "of a kind that is not known here"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "an adapter of a transformer, such as Flux"),
    ):
        save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=said):
            read_adapter(tmp_path / "a.safetensors")
