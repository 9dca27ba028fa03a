"""Files of transformers' adapters that ComfyUI reads, and diffusers as well."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.peft_file import tensors_of
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
        OutOfRange: where values are too large for ``dtype``; nothing is written.
    """
    layers = adapter.parts[facts.denoiser]
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
