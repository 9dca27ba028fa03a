"""Files with the names that PEFT and diffusers give an adapter's tensors, and the configurations in their header."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.adapters.adapter import Adapter, Layers, with_projections
from dreambooth_sm.adapters.layers import Hadamard, Kronecker, Layer, LowRank, Rotation
from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import Stored, write_safetensors

# The header's field that diffusers reads: PEFT's configuration of each part, names with the part before them.
CONFIG_FIELD = "lora_adapter_metadata"
# In transformers until 5.6, all of CLIP's names began with it; ComfyUI and older diffusers know no others.
_CLIP = "text_model."


def write_peft(
    path: Path, adapter: Adapter, *, dtype: torch.dtype | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Writes a file that ``load_lora_weights`` of diffusers reads, from 0.27 on, and PEFT with the configurations in
    its header. Scales are in the weights, so that readers that know neither alpha nor configurations are right as well.
    diffusers reads LoRA and DoRA; the other kinds are for PEFT alone.

    Args:
        path: ends in ``.safetensors``.
        dtype: of the values; None leaves those that need no scale as they are.
        notes: what else the header says.

    Raises:
        UserError: where a part mixes kinds of adapters, which no configuration says.
        OutOfRange: where values are too large for ``dtype``; nothing is written.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for part, trained in adapter.parts.items():
        layers = with_projections(trained)
        for name, layer in layers.items():
            tensors |= {f"{part}.{_old(part, name)}.{key}": value for key, value in tensors_of(layer).items()}
        configs |= {f"{part}.{key}": value for key, value in peft_config(layers).items()}
    header = {**(notes or {}), CONFIG_FIELD: json.dumps(configs, indent=2, sort_keys=True)}
    write_safetensors(path, {key: Stored.of(value) for key, value in tensors.items()}, dtype=dtype, notes=header)


def _old(part: str, name: str) -> str:
    return _CLIP + name if part == "text_encoder" and not name.startswith(_CLIP) else name


def tensors_of(layer: Layer) -> dict[str, Tensor]:
    """A layer's tensors by the ends of their names, with its scale in them."""
    if isinstance(layer, LowRank):
        if layer.middle is not None:
            raise UserError(
                "PEFT has no LoRA with a matrix in the middle (CP decomposition); keep the layout kohya, or merge it"
            )
        folded = layer.folded()
        found = {"lora_A.weight": folded.down, "lora_B.weight": folded.up}
        if folded.magnitude is not None:
            if folded.magnitude.shape[0] != folded.up.shape[0]:
                raise UserError("PEFT has no DoRA with a magnitude for each column; merge it into its base model")
            # As PEFT has them: rows of matrices, and channels of convolutions.
            shape = (1, -1, 1, 1) if folded.down.dim() == 4 else (-1,)
            found["lora_magnitude_vector.weight"] = folded.magnitude.reshape(shape)
        return found
    if isinstance(layer, Hadamard):
        whole = layer.folded()
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        found = dict(zip(names, (*whole.first, *whole.second), strict=True))
        return found | dict(zip(("hada_t1", "hada_t2"), whole.cores or (), strict=bool(whole.cores)))
    if isinstance(layer, Kronecker):
        product = layer.folded()
        found = {}
        for factor, values in (("lokr_w1", product.first), ("lokr_w2", product.second)):
            ends = ("_a", "_b") if len(values) == 2 else ("",)
            found |= {factor + end: value for end, value in zip(ends, values, strict=True)}
        return found | ({"lokr_t2": product.core} if product.core is not None else {})
    assert isinstance(layer, Rotation)
    return {"oft_R.weight": layer.angles}


def peft_config(layers: Layers) -> dict[str, Any]:
    """The configuration with which PEFT makes such layers, their scales being in the weights: no more of it than they
    need, for older versions to take it.

    Raises:
        UserError: where they are of several kinds.
    """
    kinds = sorted({layer.kind for layer in layers.values()})
    if len(kinds) != 1:
        raise UserError(f"a configuration of PEFT is for one kind of adapter, not {' and '.join(kinds)}")
    ranks = {name.removeprefix(_CLIP): layer.rank for name, layer in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: other for name, other in ranks.items() if other != rank}
    config: dict[str, Any] = {"target_modules": sorted(ranks), "r": rank, "rank_pattern": others}
    first = next(iter(layers.values()))
    if isinstance(first, LowRank):
        return {
            **config,
            "peft_type": "LORA",
            "lora_alpha": rank,
            "alpha_pattern": others,
            "use_dora": first.kind == "DoRA",
            "use_rslora": False,
        }
    if isinstance(first, Hadamard):
        cores = any(isinstance(layer, Hadamard) and layer.cores for layer in layers.values())
        return {**config, "peft_type": "LOHA", "alpha": rank, "alpha_pattern": others, "use_effective_conv2d": cores}
    if isinstance(first, Kronecker):
        found = [layer for layer in layers.values() if isinstance(layer, Kronecker)]
        return {
            **config,
            "peft_type": "LOKR",
            "alpha": rank,
            "alpha_pattern": others,
            "use_effective_conv2d": any(layer.core is not None for layer in found),
            "decompose_both": any(len(layer.first) == 2 for layer in found),
            "decompose_factor": _factor(found),
        }
    assert isinstance(first, Rotation)
    return {
        "peft_type": "OFT",
        "target_modules": sorted(ranks),
        "r": 0,
        "oft_block_size": first.size,
        "block_share": all(isinstance(layer, Rotation) and len(layer.angles) == 1 for layer in layers.values()),
        "use_cayley_neumann": first.terms is not None,
        "num_cayley_neumann_terms": first.terms or 5,
    }


def _factor(layers: list[Kronecker]) -> int:
    """The ``decompose_factor`` by which PEFT comes to the sizes of these factors; -1 asks it for the squarest."""
    from peft.tuners.lokr.layer import factorization

    sizes = {pair for layer in layers for pair in layer.sizes}
    for factor in sorted({small for small, _ in sizes}):
        if all(factorization(small * large, factor) == (small, large) for small, large in sizes):
            return int(factor)
    return -1


def from_peft(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Layer], list[str]]:
    """The layers that PEFT's tensors of one module are.

    Args:
        state: as PEFT's ``get_peft_model_state_dict`` gives it: ``down_blocks.0....to_q.lora_A.weight``.
        config: PEFT's, as a dictionary; where it says nothing, a layer's scale is 1.

    Returns:
        the layers by name, and the names of tensors that are of none.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, value in state.items():
        if match := _TENSOR.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = value
        else:
            unknown.append(key)
    layers: dict[str, Layer] = {}
    for name, tensors in found.items():
        if layer := _layer(tensors, name, config):
            layers[name] = layer
        else:
            unknown += [f"{name}.{end}" for end in tensors]
    return layers, unknown


_TENSOR = re.compile(
    r"(.+)\.(lora_[AB]|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|oft_R)"
    r"(?:\.default)?(?:\.weight)?"
)


def _layer(tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]) -> Layer | None:
    if {"lora_A", "lora_B"} <= tensors.keys():
        down, up = tensors["lora_A"], tensors["lora_B"]
        magnitude = tensors.get("lora_magnitude_vector")
        if magnitude is not None:
            magnitude = magnitude.reshape(-1, *[1] * (down.dim() - 1))
        rank = _of(config, "rank_pattern", name, down.shape[0])
        alpha = _of(config, "alpha_pattern", name, config.get("lora_alpha", rank))
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        return LowRank(down, up, scale, magnitude=magnitude)
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= tensors.keys():
        first, second = ((tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]) for n in (1, 2))
        cores = (tensors["hada_t1"], tensors["hada_t2"]) if {"hada_t1", "hada_t2"} <= tensors.keys() else None
        return Hadamard(first, second, _scale(config, name, first[1].shape[0]), cores)
    if any(key.startswith("lokr_w1") for key in tensors) and any(key.startswith("lokr_w2") for key in tensors):
        one, other = (
            (tensors[key],) if (key := f"lokr_w{n}") in tensors else (tensors[f"{key}_a"], tensors[f"{key}_b"])
            for n in (1, 2)
        )
        return Kronecker(one, other, _scale(config, name, config.get("r", 1)), tensors.get("lokr_t2"))
    if "oft_R" in tensors:
        angles = tensors["oft_R"]
        size = round((1 + (1 + 8 * angles.shape[1]) ** 0.5) / 2)
        exact = not config.get("use_cayley_neumann", True)
        return Rotation(angles, size, None if exact else int(config.get("num_cayley_neumann_terms", 5)))
    return None


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Of a LoHa or LoKr; 1 without a configuration."""
    rank = _of(config, "rank_pattern", name, config.get("r", rank))
    return float(_of(config, "alpha_pattern", name, config.get("alpha", rank))) / rank


def _of(config: Mapping[str, Any], patterns: str, name: str, other: Any) -> Any:
    """What a configuration says of one layer."""
    said = config.get(patterns) or {}
    pattern = next((each for each in said if re.fullmatch(rf"(.*\.)?({each})", name)), None)
    return other if pattern is None else said[pattern]
