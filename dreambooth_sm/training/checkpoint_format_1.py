"""Checkpoints of earlier versions, in the shape that this one writes.

Format 1 has no number. Its tensors lie by part of the model, then by name, in the order that averages and optimizers
have; so do those of the first jobs with format 2. Its identity holds some of what jobs are compared by.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

_BASE = "pretrained_model_name_or_path"
# What it does not hold, and is known anyway: precision and optimizer stand for two, and there was one method.
_KNOWN = {"mixed_precision", "use_8bit_adam", "method"}


def with_all_fields(state: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state.json``; the first ones had nothing to tell."""
    return {"format": 1, "record": {}, **state}


def by_parameter(tensors: Any) -> Any:
    """Tensors with one name for each parameter; what has that already, or is something else, is left as it is."""
    weights = tensors.get("weights") if isinstance(tensors, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(named, dict) for named in weights.values()):
        return tensors
    flat = {f"{part}.{name}": value for part, named in weights.items() for name, value in named.items()}
    # The first ones had no sums between two metric lines: the next line is about the steps since.
    return {"window": {"sums": {}, "count": 0, "seconds": 0.0}} | tensors | {"weights": flat}


def comparable(was: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """Reduces a present job's identity to what ``was``, one of format 1, holds, in its form; and the method."""
    base = identity.get(_BASE)
    # Paths were those that they had on that machine.
    if isinstance(base, str) and base.startswith("/opt/ml/") and str(was.get(_BASE)).endswith(base[len("/opt/ml") :]):
        base = was[_BASE]
    then = {
        **identity,
        _BASE: base,
        "precision": identity.get("mixed_precision"),
        "pictures": sorted(PurePosixPath(name).name for name in identity.get("pictures", ())),
    }
    return {name: then.get(name) for name in was.keys() | (identity.keys() & {"method"})}


def not_comparable(was: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """The names of what ``was`` does not hold of a job's identity."""
    return sorted(identity.keys() - was.keys() - _KNOWN)
