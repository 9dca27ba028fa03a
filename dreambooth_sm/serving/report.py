"""What a job's report says to whoever serves its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreambooth_sm.hyperparameters import Hyperparameters

REPORT = "report.json"


def trained_with(report: Mapping[str, Any]) -> Hyperparameters | None:
    """The job's hyperparameters; None where its report has none that this version knows."""
    said = report.get("hyperparameters")
    if not isinstance(said, dict):
        return None
    try:
        return Hyperparameters.model_validate(said)
    except ValueError:
        return None
