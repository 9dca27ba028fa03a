"""Whether the loss of a training rose: single losses are noise, means over some steps are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Steps that a mean is taken over, at both ends.
_SPAN = 20
_FACTOR = 3.0
# A model that predicts nothing has a loss of about 1; one step's loss may be as high by chance, a mean over 20 may not.
_FLOOR, _FLOOR_OF_FEW = 0.5, 2.0


def find_rise(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Says that the loss is well above its start; None where it is not.

    Args:
        rows: metric lines of training with ``step`` and ``loss``, each the mean since the one before.
    """
    if len(rows) < 2:
        return None
    steps = rows[-1]["step"]
    span = max(1, min(_SPAN, steps // 2))
    begins = [0, *(row["step"] for row in rows[:-1])]
    first = _mean([(row, begin) for row, begin in zip(rows, begins, strict=True) if begin < span])
    last = _mean([(row, begin) for row, begin in zip(rows, begins, strict=True) if row["step"] > steps - span])
    floor = _FLOOR if steps >= 2 * _SPAN else _FLOOR_OF_FEW
    if last > floor and last > _FACTOR * first:
        return f"the loss rose from {first:.3g} at the start to {last:.3g} by step {steps}; lower learning_rate"
    return None


def _mean(rows: Sequence[tuple[Mapping[str, Any], int]]) -> float:
    """Averages the losses, each as many times as it has steps."""
    weights = [max(1, row["step"] - begin) for row, begin in rows]
    return sum(row["loss"] * weight for (row, _), weight in zip(rows, weights, strict=True)) / sum(weights)
