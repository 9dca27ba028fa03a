"""Files of transformers' adapters that ComfyUI reads, and diffusers as well."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.denoiser_names import ARCHITECTURE_FIELD, architecture
from dreambooth_sm.adapters.kohya_file import flat_tensors
from dreambooth_sm.adapters.layers import Layer, LowRank
from dreambooth_sm.adapters.names import UNET_PREFIX
from dreambooth_sm.adapters.peft_file import tensors_of
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import Facts
from dreambooth_sm.stored.files import HASH_FIELD, Stored, write_safetensors

# What ComfyUI calls the denoiser, whatever model it is of.
PREFIX = "diffusion_model."


def write_comfy(
    path: Path,
    adapter: Adapter,
    facts: Facts,
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Writes a file with the metadata of ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec). Scales are in the
    weights, so that readers that know no alpha are right.

    Args:
        path: ends in ``.safetensors``.
        adapter: of the denoiser alone.
        facts: of the base model's family.
        dtype: of the values; None leaves those that need no scale as they are.
        notes: what else the header says; goes over what is made up here.

    Raises:
        UserError: for other adapters than LoRA, beside layers that ComfyUI knows as one.
        OutOfRange: where values are too large for ``dtype``; nothing is written.
    """
    layers = _by_makers_names(adapter.parts[facts.denoiser], facts)
    tensors = {
        f"{place}.{end}": Stored.of(value)
        for name, layer in layers.items()
        for place, its in [_named(name, layer, facts)]
        for end, value in its.items()
    }
    rank = str(max(adapter.ranks))
    header = {
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "modelspec.sai_model_spec": "1.0.1",
        ARCHITECTURE_FIELD: architecture(facts),
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{facts.resolution}x{facts.resolution}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **(notes or {}),
        HASH_FIELD: "",
    }
    write_safetensors(path, tensors, dtype=dtype, notes=header)


def _named(name: str, layer: Layer, facts: Facts) -> tuple[str, dict[str, Tensor]]:
    """What a layer is called, and its tensors by the ends of their names."""
    if not facts.flat_adapters:
        return f"{PREFIX}{name}", tensors_of(layer)
    folded = layer.folded() if isinstance(layer, LowRank) else layer
    return f"{UNET_PREFIX}{name.replace('.', '_')}", flat_tensors(folded)


def _by_makers_names(layers: Mapping[str, Layer], facts: Facts) -> dict[str, Layer]:
    """Layers by the names that ComfyUI knows; those that it has as one layer become one, exactly."""
    found: dict[str, Layer] = {}
    parts: dict[str, dict[tuple[int, int, int], Layer]] = {}
    for name, layer in layers.items():
        for known in facts.makers_names:
            if theirs := known.in_theirs(name):
                if known.rows is None:
                    found[theirs] = layer
                else:
                    parts.setdefault(theirs, {})[known.rows] = layer
                break
        else:
            found[name] = layer
    return found | {name: _together(name, dict(sorted(its.items()))) for name, its in parts.items()}


def _together(name: str, parts: Mapping[tuple[int, int, int], Layer]) -> LowRank:
    """One LoRA beside a layer that is several of diffusers', some of which have a LoRA of their own."""
    folded: dict[tuple[int, int, int], LowRank] = {}
    for rows, layer in parts.items():
        if not isinstance(layer, LowRank) or layer.magnitude is not None:
            raise UserError(f"ComfyUI knows several layers as one ({name}), which LoRA alone can be beside")
        folded[rows] = layer.folded()
    (_, count, of), one = next(iter(folded.items()))
    unit, ranks = one.up.shape[0] // count, [part.rank for part in folded.values()]
    up = torch.zeros(of * unit, sum(ranks), dtype=torch.float32)
    for ((first, count, _), part), start in zip(folded.items(), accumulate([0, *ranks[:-1]]), strict=True):
        up[first * unit : (first + count) * unit, start : start + part.rank] = part.up.float()
    return LowRank(torch.cat([part.down.float() for part in folded.values()]), up)
