"""Checkpoints as earlier versions wrote them.

Of four jobs (AdamW, with everything, blockwise, latents not cached) the result was compared once with what the last
version before format 2 wrote for the same jobs: the same names in the same order, and the same bits.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What its identity held, beside what the plan had decided.
_KNOBS = (
    "pretrained_model_name_or_path",
    "instance_prompt",
    "class_prompt",
    "resolution",
    "bucket_step",
    "caption_dropout",
    "background_weight",
    "train_batch_size",
    "gradient_accumulation_steps",
    "prior",
    "prior_loss_weight",
    "lr_scheduler",
    "lr_warmup_steps",
    "learning_rate",
    "scale_lr",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "adam_weight_decay",
)
_DECIDED = ("seed", "processes", "aspect_ratio_buckets", "train_text_encoder", "use_ema", "weights", "optimizer")


def rewrite_state(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the record of a checkpoint, whose checksum stays right."""
    path = directory / "state.json"
    state = json.loads(path.read_text())
    del state["state_crc32"]
    change(state)
    path.write_text(json.dumps(state | {"state_crc32": zlib.crc32(json.dumps(state, sort_keys=True).encode())}))


def rewrite_tensors(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the tensors of a checkpoint, whose checksums stay right."""
    path = directory / "tensors.pt"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)
    content = path.read_bytes()
    rewrite_state(directory, lambda state: state.update(bytes=len(content), crc32=zlib.crc32(content)))


def lay_weights_by_part(tensors: dict[str, Any]) -> None:
    """As the first checkpoints with format 2 had them, and all with format 1."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors["weights"].items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    tensors["weights"] = parts


def as_format_1(directory: Path) -> None:
    """Makes a checkpoint of format 2 one of format 1; without the scheduler's state, which nobody reads."""

    def change(state: dict[str, Any]) -> None:
        identity = state["identity"]
        del state["format"]
        state["identity"] = {name: identity[name] for name in (*_KNOBS, *_DECIDED) if name in identity}
        if "mixed_precision" in identity:
            state["identity"]["precision"] = identity["mixed_precision"]
        if "pictures" in identity:
            state["identity"]["pictures"] = sorted(Path(name).name for name in identity["pictures"])

    def change_tensors(tensors: dict[str, Any]) -> None:
        lay_weights_by_part(tensors)
        for group in tensors["step"].get("optimizer", {}).get("param_groups", []):
            group["fused"] = bool(group["fused"])

    rewrite_tensors(directory, change_tensors)
    rewrite_state(directory, change)
