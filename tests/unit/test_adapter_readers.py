"""ComfyUI and WebUI take every key of what is written, and add the same to the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.kohya_file import write_kohya
from dreambooth_sm.adapters.layers import Hadamard, Kronecker, Layer, LowRank
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.adapters.read import read_adapter
from tests.helpers.readers import comfyui, webui

LAYERS = 2
_SMALL: dict[str, Any] = {"norm_num_groups": 8, "layers_per_block": 2, "cross_attention_dim": 16}
# The levels of the true UNets, and fewer channels.
UNETS: dict[str, dict[str, Any]] = {
    "1": {**_SMALL, "block_out_channels": (8, 16, 16, 16)},
    "2": {**_SMALL, "block_out_channels": (8, 16, 16, 16), "use_linear_projection": True, "cross_attention_dim": 1024},
    "XL": {
        **_SMALL,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}


def modules(family: str) -> dict[str, nn.Module]:
    """The UNet and the text encoders, without values."""
    text = CLIPTextConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2)
    with torch.device("meta"):
        found: dict[str, nn.Module] = {
            "unet": UNet2DConditionModel(**UNETS[family]),
            "text_encoder": CLIPTextModel(text),
        }
        if family == "XL":
            found["text_encoder_2"] = CLIPTextModelWithProjection(text)
    return found


def unet_config(family: str) -> dict[str, Any]:
    """With what diffusers adds to it."""
    with torch.device("meta"):
        return dict(UNet2DConditionModel(**UNETS[family]).config)


def make(kind: str, shape: torch.Size, seed: int) -> Layer:
    """A layer for a weight of this shape."""
    generator = torch.Generator().manual_seed(seed)

    def values(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    out, inputs, *kernel = shape
    ones, flat = [1] * len(kernel), torch.Size(shape[1:]).numel()
    if kind == "several ranks":
        return LowRank(values(1 + seed % 3, inputs, *kernel), values(out, 1 + seed % 3, *ones), 0.5)
    if kind == "LoHa":
        return Hadamard((values(out, 2), values(2, flat)), (values(out, 2), values(2, flat)), 0.5)
    if kind == "LoKr":
        large = values(out // 4, inputs // 4, *kernel)
        return Kronecker((values(4, 4),), (large,) if seed % 2 else (values(out // 4, 2), values(2, flat // 4)), 0.5)
    if kind == "cores" and kernel:
        return LowRank(values(2, inputs, 1, 1), values(out, 2, 1, 1), 0.5, values(2, 2, *kernel))
    return LowRank(values(2, inputs, *kernel), values(out, 2, *ones), 0.5)


def adapter(family: str, kind: str) -> Adapter:
    """A layer for each linear layer and convolution."""
    parts: dict[str, dict[str, Layer]] = {}
    for part, module in modules(family).items():
        for name, child in module.named_modules():
            if isinstance(child, nn.Linear | nn.Conv2d) and name != "text_projection":
                layers = parts.setdefault(part, {})
                layers[name] = make(kind, child.weight.shape, len(layers))
    return Adapter(parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["several ranks", "cores", "LoHa", "LoKr"])
@pytest.mark.parametrize("family", UNETS)
def test_comfyui_and_webui_read_all_of_a_flat_file(family: str, kind: str, tmp_path: Path) -> None:
    written, config = adapter(family, kind), unet_config(family)
    configs: dict[str, Any] = {"unet": config, **({"text_encoder_2": {}} if family == "XL" else {})}
    write_kohya(tmp_path / "kohya.safetensors", written, configs)
    tensors = load_file(tmp_path / "kohya.safetensors")
    encoders = {part: LAYERS for part in written.parts if part != "unet"}
    for changes, left in (
        comfyui(tensors, config, encoders),
        webui(tensors, config, encoders, open_clip=family == "2"),
    ):
        assert not left
        check(written, changes)
    assert not read_adapter(tmp_path / "kohya.safetensors").unknown


def check(written: Adapter, changes: dict[tuple[str, str], torch.Tensor]) -> None:
    assert changes.keys() == {(part, name) for part, name, _ in written}
    for part, name, layer in written:
        change = changes[part, name]
        wanted = layer.change(torch.zeros_like(change))
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_comfyui_reads_the_text_encoders_of_a_file_for_diffusers(tmp_path: Path) -> None:
    """By names that transformers had until 5.6."""
    written = adapter("XL", "several ranks")
    write_peft(tmp_path / "peft.safetensors", written)
    tensors = load_file(tmp_path / "peft.safetensors")
    config = unet_config("XL")
    encoders = {"text_encoder": LAYERS, "text_encoder_2": LAYERS}
    changes, left = comfyui(tensors, config, encoders)
    assert all(key.startswith("unet.") for key in left)
    text = Adapter({part: layers for part, layers in written.parts.items() if part != "unet"})
    check(text, {place: change for place, change in changes.items() if place[0] != "unet"})


def test_both_leave_what_they_do_not_know(tmp_path: Path) -> None:
    """Names of transformers 5, and alphas that are not the rank: a file that was not written here."""
    written, config = adapter("1", "several ranks"), unet_config("1")
    write_kohya(tmp_path / "kohya.safetensors", written, {"unet": config})
    tensors = load_file(tmp_path / "kohya.safetensors")
    halved = {key: value / 2 if key.endswith("alpha") else value for key, value in tensors.items()}
    strange = {key.replace("lora_te_text_model_", "lora_te_"): value for key, value in halved.items()}
    for read in (comfyui, webui):
        changes, left = read(strange, config, {"text_encoder": LAYERS})
        assert left == {key for key in strange if key.startswith("lora_te_")}
        place = ("unet", "mid_block.resnets.0.conv1")
        wanted = written.parts["unet"][place[1]].change(torch.zeros_like(changes[place]))
        torch.testing.assert_close(changes[place], wanted / 2)
