"""Files of transformers' adapters that ComfyUI reads, and diffusers as well."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import torch

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.layers import Layer, LowRank
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
        f"{PREFIX}{name}.{end}": Stored.of(value)
        for name, layer in layers.items()
        for end, value in tensors_of(layer).items()
    }
    rank = str(max(adapter.ranks))
    header = {
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{facts.name.replace('_', '-')}/lora",
        "modelspec.title": path.stem,
        "modelspec.resolution": f"{facts.resolution}x{facts.resolution}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **(notes or {}),
        HASH_FIELD: "",
    }
    write_safetensors(path, tensors, dtype=dtype, notes=header)


def _by_makers_names(layers: Mapping[str, Layer], facts: Facts) -> dict[str, Layer]:
    """Layers by the names that ComfyUI knows; those that it has as one layer become one, exactly."""
    found: dict[str, Layer] = {}
    thirds: dict[str, dict[int, Layer]] = {}
    for name, layer in layers.items():
        for known in facts.makers_names:
            if match := known.ours.fullmatch(name):
                theirs = known.theirs.format(match[1])
                if known.third is None:
                    found[theirs] = layer
                else:
                    thirds.setdefault(theirs, {})[known.third] = layer
                break
        else:
            found[name] = layer
    return found | {name: _together(name, parts) for name, parts in thirds.items()}


def _together(name: str, parts: Mapping[int, Layer]) -> LowRank:
    """One LoRA beside a layer whose outputs are thirds, each with a LoRA of its own or none."""
    folded: dict[int, LowRank] = {}
    for third, layer in parts.items():
        if not isinstance(layer, LowRank) or layer.magnitude is not None:
            raise UserError(f"ComfyUI knows queries, keys and values as one ({name}), which LoRA alone can be beside")
        folded[third] = layer.folded()
    outputs, ranks = next(iter(folded.values())).up.shape[0], [part.rank for part in folded.values()]
    up = torch.zeros(3 * outputs, sum(ranks), dtype=torch.float32)
    for (third, part), start in zip(folded.items(), accumulate([0, *ranks[:-1]]), strict=True):
        up[third * outputs : (third + 1) * outputs, start : start + part.rank] = part.up.float()
    return LowRank(torch.cat([part.down.float() for part in folded.values()]), up)
