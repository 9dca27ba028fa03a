"""``dreambooth-sm convert`` and ``describe`` with adapters of transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.comfy_file import write_comfy
from dreambooth_sm.adapters.layers import Layer, LowRank
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.cli import main
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.models import PretrainedModel
from tests.helpers.adapters import trained
from tests.helpers.original_names import z_image_name
from tests.helpers.original_names import z_image_original as original
from tests.helpers.training import same, weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYERS = r".*(attention\.to_(q|k|v|out\.0)|feed_forward\.w[12]|layers\.\d+\.adaLN_modulation\.0|linear|cap_embedder\.1)"
RANK, ALPHA = 4, 6


def answer(transformer: Any) -> Tensor:
    """What a transformer predicts of one input."""
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randn(16, 1, 8, 8, generator=generator)]
    states = [torch.randn(9, 32, generator=generator)]
    with torch.no_grad():
        made: Tensor = transformer(rows, torch.tensor([0.4]), states, return_dict=False)[0][0]
    return made


@pytest.fixture(scope="module")
def lora(loaded_z_image: PretrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A LoRA in both layouts, its layers, and what the transformer answers with it."""
    transformer = copy.deepcopy(loaded_z_image.transformer)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS)
    layers: Any = trained(transformer, config)
    adapter = Adapter({"transformer": layers})
    folder = tmp_path_factory.mktemp("lora")
    notes = {"modelspec.trigger_phrase": "zwx toy"}
    write_peft(folder / "peft.safetensors", adapter, notes=notes)
    write_comfy(folder / "comfy.safetensors", adapter, FAMILIES["z_image"].facts, notes=notes)
    files = {"diffusers": folder / "peft.safetensors", "comfyui": folder / "comfy.safetensors"}
    return {**files, "layers": layers, "answer": answer(transformer)}


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    assert main([str(word) for word in words]) == code
    found = capsys.readouterr()
    return found.out, found.err


def with_adapter(model: PretrainedModel, file: Path) -> Any:
    """The transformer after diffusers has loaded a file, every key of it."""
    transformer = copy.deepcopy(model.transformer)
    pipeline: Any = model.with_parts({"transformer": transformer}).pipeline()
    pipeline.load_lora_weights(str(file))
    loaded = {name for name, _ in transformer.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(load_file(file))
    return transformer


def is_the_same(found: Adapter, layers: dict[str, Layer]) -> None:
    assert not found.unknown
    assert found.parts.keys() == {"transformer"}
    assert found.parts["transformer"].keys() == layers.keys()
    for name, layer in layers.items():
        assert isinstance(layer, LowRank)
        weight = torch.zeros(layer.up.shape[0], layer.down.shape[1])
        torch.testing.assert_close(found.parts["transformer"][name].change(weight), layer.change(weight))


@pytest.mark.parametrize(("source", "target"), [("diffusers", "comfyui"), ("comfyui", "diffusers")])
def test_an_adapter_goes_into_the_other_layout(
    source: str,
    target: str,
    lora: dict[str, Any],
    loaded_z_image: PretrainedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new = tmp_path / "new.safetensors"
    _, err = run(capsys, "convert", lora[source], new, "--precision", "fp32")
    assert "warning" not in err
    assert same(load_file(new), load_file(lora[target]))
    found = read_adapter(new)
    assert (found.layout, found.notes["modelspec.trigger_phrase"]) == (target, "zwx toy")
    is_the_same(found, lora["layers"])
    assert torch.allclose(answer(with_adapter(loaded_z_image, new)), lora["answer"], atol=1e-5)


def as_made(layers: dict[str, LowRank]) -> dict[str, Tensor]:
    """By the names of Z-Image's makers, with alpha: queries, keys and values are one layer of three times the rank."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if name.endswith((".to_k", ".to_v")):
            continue
        made, up, down = z_image_name(f"{name}.").removesuffix("."), layer.up, layer.down
        if name.endswith(".to_q"):
            three = [layers[name.replace("to_q", f"to_{each}")] for each in "qkv"]
            made = name.replace("to_q", "qkv")
            up, down = torch.block_diag(*(each.up for each in three)), torch.cat([each.down for each in three])
        found |= {f"{made}.lora_up.weight": up, f"{made}.lora_down.weight": down}
        found[f"{made}.alpha"] = torch.tensor(ALPHA / RANK * len(down))
    return found


def flat(key: str) -> str:
    layer, end = key.split(".lora_") if ".lora_" in key else (key.removesuffix(".alpha"), "")
    return f"lora_unet_{layer.replace('.', '_')}" + (f".lora_{end}" if end else ".alpha")


def test_names_of_other_programs_are_read(lora: dict[str, Any], tmp_path: Path) -> None:
    path, layers = tmp_path / "a.safetensors", lora["layers"]
    tensors = load_file(lora["comfyui"])
    today = {key.removeprefix("diffusion_model."): value.clone() for key, value in tensors.items()}
    old = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): value for key, value in today.items()}
    made = as_made(layers)
    for found, layout in (
        (today, "diffusers"),
        ({f"base_model.model.{key}": value for key, value in today.items()}, "diffusers"),
        ({f"transformer.{key}": value for key, value in old.items()}, "diffusers"),
        ({f"diffusion_model.{key}": value for key, value in old.items()}, "comfyui"),
        ({f"diffusion_model.{key}": value for key, value in made.items()}, "comfyui"),
        ({flat(key): value for key, value in old.items()}, "kohya"),
    ):
        save_file({key: value.contiguous() for key, value in found.items()}, path)
        read = read_adapter(path)
        assert (read.layout, read.family) == (layout, "z_image")
        is_the_same(read, layers)


def test_flat_names_of_fused_layers_are_read(lora: dict[str, Any], tmp_path: Path) -> None:
    """But for those outside of blocks, whose flat names in the makers' code say no words."""
    made = {key: value for key, value in as_made(lora["layers"]).items() if ".attention." in key}
    save_file({flat(key): value.contiguous() for key, value in made.items()}, tmp_path / "a.safetensors")
    is_the_same(
        read_adapter(tmp_path / "a.safetensors"),
        {name: layer for name, layer in lora["layers"].items() if ".attention." in name},
    )


def test_other_kinds_are_renamed_where_nothing_is_divided(lora: dict[str, Any], tmp_path: Path) -> None:
    """A LoKr beside queries, keys and values in one is none beside each."""
    one, other = torch.randn(2, 2), torch.randn(4, 8)
    names = ("layers.0.attention.out", "layers.0.attention.to_q", "layers.1.attention.qkv")
    tensors = {f"diffusion_model.{name}.lokr_w{n}": value for name in names for n, value in ((1, one), (2, other))}
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors")
    assert read.kinds == ("LoKr",)
    assert read.unknown == (names[2],)
    layers = read.parts["transformer"]
    assert layers.keys() == {"layers.0.attention.to_out.0", names[1]}
    for layer in layers.values():
        torch.testing.assert_close(layer.change(torch.zeros(8, 16)), torch.kron(one, other))


def test_an_adapter_goes_into_its_base_model(
    lora: dict[str, Any],
    tiny_z_image: Path,
    loaded_z_image: PretrainedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base is a directory, or a file of the transformer with the rest of one."""
    file = tmp_path / "base.safetensors"
    save_file(original(weights(loaded_z_image.transformer)), file)
    for name, source, base in (
        ("one", "comfyui", [tiny_z_image]),
        ("two", "diffusers", [file, "--parts", tiny_z_image]),
    ):
        run(capsys, "convert", lora[source], tmp_path / name, "--merge-into", *base)
        pipeline = ZImagePipeline.from_pretrained(tmp_path / name)
        assert torch.allclose(answer(pipeline.transformer), lora["answer"], atol=1e-5)
        assert same(weights(pipeline.text_encoder), weights(loaded_z_image.text_encoder))
    _, err = run(capsys, "convert", lora["comfyui"], tmp_path / "m.safetensors", "--merge-into", tiny_z_image, code=2)
    assert "Z-Image models are written as directories; name one" in err


def test_an_adapter_is_extracted_from_what_a_model_was_trained_to(
    lora: dict[str, Any],
    tiny_z_image: Path,
    loaded_z_image: PretrainedModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a directory, and of a file of the transformer alone."""
    run(capsys, "convert", lora["comfyui"], tmp_path / "tuned", "--merge-into", tiny_z_image)
    save_file(original(load_file(tmp_path / "tuned" / "transformer" / WEIGHTS)), tmp_path / "tuned.safetensors")
    for tuned, layout in (("tuned", []), ("tuned.safetensors", ["--layout", "diffusers"])):
        target = tmp_path / f"lora-of-{tuned}.safetensors"
        words = ["--extract-from", tiny_z_image, "--rank", RANK, "--precision", "fp32", *layout]
        _, err = run(capsys, "convert", tmp_path / tuned, target, *words)
        count = len(lora["layers"])
        assert f"100.0% of the difference (of its square) is kept, in {count} layers of rank {RANK} or less" in err
        assert "differs as well" not in err
        assert read_adapter(target).layout == ("diffusers" if layout else "comfyui")
        assert torch.allclose(answer(with_adapter(loaded_z_image, target)), lora["answer"], atol=1e-4)
    text = tmp_path / "tuned" / "text_encoder" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(text).items()}, text)
    _, err = run(capsys, "convert", tmp_path / "tuned", tmp_path / "a.safetensors", "--extract-from", tiny_z_image)
    assert "the text_encoder differs as well, and no adapter has one" in err


def test_files_are_described(lora: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout in ("diffusers", "comfyui"):
        found = json.loads(run(capsys, "describe", lora[layout], "--json")[0])
        assert (found["kind"], found["layout"], found["base model"]) == ("LoRA", layout, "Z-Image")
        assert (found["rank"], found["alpha"], found["trigger phrase"]) == (str(RANK), str(RANK), "zwx toy")
        assert found["transformer"].startswith(f"{len(lora['layers'])} layers: ")
    strange = {key.replace("layers.", "blocks."): value for key, value in load_file(lora["comfyui"]).items()}
    save_file(strange, tmp_path / "a.safetensors")
    found = json.loads(run(capsys, "describe", tmp_path / "a.safetensors", "--json")[0])
    assert "not known" in found
    assert "diffusion_model.blocks." in found["not known"] or "blocks." in found["not known"]
    save_file({key: value for key, value in strange.items() if "blocks" in key}, tmp_path / "b.safetensors")
    _, err = run(capsys, "describe", tmp_path / "b.safetensors", code=2)
    assert "an adapter of a transformer, such as Flux, of a kind that is not known here" in err


def test_what_is_wrong_with_a_conversion_is_told(
    lora: dict[str, Any], tiny_base: Path, tiny_z_image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new.safetensors"
    name, layer = next(iter(lora["layers"].items()))
    dora = LowRank(layer.down, layer.up, magnitude=torch.ones(layer.up.shape[0], 1))
    write_peft(tmp_path / "dora.safetensors", Adapter({"transformer": {name: dora}}))
    for words, said in (
        (
            (lora["comfyui"], file, "--layout", "kohya"),
            "--layout kohya is not for Z-Image: set it to diffusers or comfyui",
        ),
        ((tmp_path / "dora.safetensors", file), "DoRA can't be written in the layout comfyui"),
        (
            (lora["comfyui"], tmp_path / "new", "--merge-into", tiny_base),
            "the adapter is for another base model: it has",
        ),
        ((tiny_z_image, file, "--extract-from", tiny_base), "has no unet, and"),
    ):
        _, err = run(capsys, "convert", *words, code=2)
        assert said in err
    assert not file.exists()
