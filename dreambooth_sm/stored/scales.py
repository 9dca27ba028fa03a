"""Weights that are stored with scales, as fp8 files have them: a weight is the product of both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dreambooth_sm.stored.files import Stored

# What the scale of a layer's `weight` is called: one number, or one for each row.
_SCALES = ("scale_weight", "weight_scale")
# For computing in fp8, which is not done here: they scale inputs, or say that there are scales.
_NEEDLESS = re.compile(r"(.*\.)?(scale_input|input_scale|scaled_fp8)")
# What else layers and their normalisation consist of.
_OWN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def with_scales(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """A file's tensors, weights multiplied by their scales; what else belongs to a weight becomes its companion."""
    found = {name: tensor for name, tensor in tensors.items() if not _NEEDLESS.fullmatch(name)}
    for name, scale in list(found.items()):
        stem, _, last = name.rpartition(".")
        weight = f"{stem}.weight"
        if last in _SCALES and weight in found and _fits(scale, found[weight]):
            found[weight] = _multiplied(found[weight], scale.read().flatten().float())
            del found[name]
    companions: dict[str, list[str]] = {}
    for name in found:
        if owner := _owner(name, found):
            companions.setdefault(owner, []).append(name)
    return found | {name: replace(found[name], companions=tuple(others)) for name, others in companions.items()}


def _fits(scale: Stored, weight: Stored) -> bool:
    rows = weight.shape[0] if weight.shape else 1
    by_row = scale.numel == rows and scale.shape[:1] == (rows,)
    return scale.dtype.is_floating_point and (scale.numel == 1 or by_row)


def _multiplied(weight: Stored, scales: Tensor) -> Stored:
    """A weight in full precision."""
    row = max(1, weight.numel // len(scales))

    def piece(start: int, stop: int) -> Tensor:
        factors = scales[torch.arange(start, stop) // row] if len(scales) > 1 else scales
        return weight.piece(start, stop).float() * factors

    return weight.of_pieces(piece, dtype=torch.float32)


def _owner(name: str, tensors: Mapping[str, Stored]) -> str | None:
    """The weight that a tensor belongs to by its name, such as ``X.weight`` for ``X.weight.absmax`` and ``X.SCB``."""
    whole = re.fullmatch(r"(.*weight)_\w+", name)  # in_proj_weight_scale
    if whole and whole[1] in tensors:
        return whole[1]
    for dot in re.finditer(r"\.", name):
        stem, rest = name[: dot.start()], name[dot.end() :]
        if stem in tensors and stem.endswith("weight"):
            return stem
        if f"{stem}.weight" in tensors and rest not in _OWN:
            return f"{stem}.weight"
    return None
