"""Files in the flat layout of sd-scripts, which WebUI, ComfyUI and diffusers read, and LyCORIS's kinds in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.adapters.adapter import Adapter, with_projections
from dreambooth_sm.adapters.embedding_file import bundled
from dreambooth_sm.adapters.layers import Hadamard, Kronecker, Layer, LowRank
from dreambooth_sm.adapters.names import LAYERS, LAYERS_FIELD, find_layer, flat_names
from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import HASH_FIELD, Stored, write_safetensors
from dreambooth_sm.stored.layout import OPEN_CLIP, Configs, is_xl, text_prefix
from dreambooth_sm.stored.single_file import specification

# Kinds that programs which read this layout would draw wrongly, and why.
NOT_CARRIED = {
    "DoRA": "the programs that read it apply its magnitudes each in another way",
    "OFT": "it rotates what goes into a layer, and those in this layout what comes out",
}
_FACTORS = re.compile(r"lokr_w[12](_[ab])?")


def write_kohya(
    path: Path,
    adapter: Adapter,
    configs: Configs,
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a file that WebUI, ComfyUI and diffusers read, with the metadata of sd-scripts and ModelSpec 1.0.1
    (github.com/Stability-AI/ModelSpec). Scales are in the weights and alpha is the rank, so that readers that know no
    alpha are right as well; lower ranks of a LoRA are filled up with zeros, as diffusers takes several for others.
    diffusers refuses files with learned words in them.

    Args:
        path: ends in ``.safetensors``.
        configs: of the base model's parts (:attr:`dreambooth_sm.stored.model.StoredModel.configs`).
        dtype: of the values; None leaves those that need no scale as they are.
        notes: what else the header says, such as ``modelspec.trigger_phrase``; goes over what is made up here.

    Raises:
        UserError: where the layout can't carry the kind of the adapter (``NOT_CARRIED``).
        OutOfRange: where values are too large for ``dtype``; nothing is written.
    """
    check_carried(adapter, "kohya")
    tensors: dict[str, Tensor] = bundled(adapter.words)
    rank = max((layer.rank for _, _, layer in adapter if isinstance(layer, LowRank)), default=0)
    for part, trained in adapter.parts.items():
        layers = with_projections(trained)
        flat = flat_names(part, layers, configs)
        for name, layer in layers.items():
            filled = layer.folded().padded(rank) if isinstance(layer, LowRank) else layer
            tensors |= {f"{flat[name]}.{key}": value for key, value in flat_tensors(filled).items()}
    header = {**_metadata(adapter, configs, path.stem), **(notes or {}), HASH_FIELD: ""}
    write_safetensors(path, {key: Stored.of(value) for key, value in tensors.items()}, dtype=dtype, notes=header)


def check_carried(adapter: Adapter, layout: str) -> None:
    """Raises UserError where a layout that WebUI or ComfyUI read can't carry an adapter's kind."""
    problems = [
        f"{kind} can't be written in the layout {layout}: {NOT_CARRIED[kind]}; take the layout diffusers, or merge it "
        "into its base model"
        for kind in adapter.kinds
        if kind in NOT_CARRIED
    ]
    if problems:
        raise UserError(problems)


def flat_tensors(layer: Layer) -> dict[str, Tensor]:
    """A layer's tensors by the ends of their names, with its scale in them."""
    alpha = torch.tensor(float(layer.rank))
    if isinstance(layer, LowRank):
        middle = {} if layer.middle is None else {"lora_mid.weight": layer.middle}
        return {"lora_down.weight": layer.down, "lora_up.weight": layer.up, **middle, "alpha": alpha}
    if isinstance(layer, Hadamard):
        whole = layer.folded()
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        cores = dict(zip(("hada_t1", "hada_t2"), whole.cores, strict=True)) if whole.cores else {}
        return {**dict(zip(names, (*whole.first, *whole.second), strict=True)), **cores, "alpha": alpha}
    assert isinstance(layer, Kronecker)
    product = layer.folded()
    found = {"alpha": alpha} | ({} if product.core is None else {"lokr_t2": product.core})
    for factor, values in (("lokr_w1", product.first), ("lokr_w2", product.second)):
        ends = ("_a", "_b") if len(values) == 2 else ("",)
        found |= {factor + end: value for end, value in zip(ends, values, strict=True)}
    return found


def _metadata(adapter: Adapter, configs: Configs, title: str) -> dict[str, str]:
    second = not is_xl(configs) and text_prefix("text_encoder", configs) == OPEN_CLIP
    v_prediction = configs.get("scheduler", {}).get("prediction_type") == "v_prediction"
    architecture, implementation, clip_layer = specification(configs, v_prediction)
    version = "sdxl_base_v1-0" if is_xl(configs) else f"sd_v{2 if second else 1}{'_v' if v_prediction else ''}"
    rank = max(adapter.ranks)
    kohya = adapter.kinds == ("LoRA",)
    arguments: dict[str, Any] = {} if kohya else {"algo": adapter.kinds[0].lower()}
    if any(isinstance(layer, LowRank) and layer.down[0, 0].numel() > 1 for _, _, layer in adapter):
        arguments |= {"conv_dim": str(rank), "conv_alpha": str(float(rank))}
    return {
        "ss_network_module": "networks.lora" if kohya else "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": version,
        "ss_v2": str(second),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": f"https://github.com/Stability-AI/{implementation}",
        "modelspec.title": title,
        "modelspec.resolution": _resolution(configs, second and v_prediction),
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "modelspec.encoder_layer": clip_layer,
        **(
            {LAYERS_FIELD: str(layers)} if (layers := configs["unet"].get("layers_per_block", LAYERS)) != LAYERS else {}
        ),
    }


def _resolution(configs: Configs, larger: bool) -> str:
    pixels = 1024 if is_xl(configs) else 768 if larger else 512
    return f"{pixels}x{pixels}"


def from_kohya(
    tensors: Mapping[str, Tensor], notes: Mapping[str, str]
) -> tuple[dict[str, dict[str, Layer]], list[str]]:
    """The layers in a flat file.

    Args:
        tensors: by their names in the file, such as ``lora_unet_mid_block_attentions_0_proj_in.lora_down.weight``.

    Returns:
        the layers by part and name, and the names of tensors that are of none.
    """
    said = str(notes.get(LAYERS_FIELD, LAYERS))
    count = int(said) if said.isdecimal() else LAYERS
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        flat, _, end = key.partition(".")
        found.setdefault(flat, {})[end] = value
    parts: dict[str, dict[str, Layer]] = {}
    unknown: list[str] = []
    for flat, values in found.items():
        place, layer = find_layer(flat, count), _layer(values)
        if place and layer:
            parts.setdefault(place[0], {})[place[1]] = layer
        else:
            unknown += [f"{flat}.{end}" if end else flat for end in values]
    return parts, unknown


def _layer(tensors: Mapping[str, Tensor]) -> Layer | None:
    """None where there is a tensor that no kind known here has."""
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    names = tensors.keys() - {"alpha"}

    def scale(rank: int) -> float:
        return 1.0 if alpha is None else alpha / rank

    if {"lora_down.weight", "lora_up.weight"} <= names <= _LOW_RANK:
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        magnitude = tensors.get("dora_scale")
        if magnitude is not None and magnitude.dim() == 1:
            magnitude = magnitude.reshape(-1, *[1] * (down.dim() - 1))
        return LowRank(down, up, scale(down.shape[0]), tensors.get("lora_mid.weight"), magnitude)
    if _HADAMARD <= names <= _HADAMARD | _CORES:
        first, second = ((tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]) for n in (1, 2))
        cores = (tensors["hada_t1"], tensors["hada_t2"]) if names >= _CORES else None
        return Hadamard(first, second, scale(first[1].shape[0]), cores)
    factors = {name for name in names if _FACTORS.fullmatch(name)}
    if factors and names <= factors | {"lokr_t2"}:
        halves = [
            (tensors[key],) if (key := f"lokr_w{n}") in tensors else (tensors[f"{key}_a"], tensors[f"{key}_b"])
            for n in (1, 2)
            if {f"lokr_w{n}"} & names or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= names
        ]
        if len(halves) == 2:
            product = Kronecker(halves[0], halves[1], core=tensors.get("lokr_t2"))
            # Both halves are whole matrices: alpha has no rank to be divided by.
            whole = all(len(half) == 1 for half in halves)
            return Kronecker(halves[0], halves[1], 1.0 if whole else scale(product.rank), product.core)
    return None


_LOW_RANK = {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"}
_HADAMARD = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_CORES = {"hada_t1", "hada_t2"}
