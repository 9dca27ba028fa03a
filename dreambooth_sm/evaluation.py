"""What pipelines decide by: the measures of a trained model, and what its version is told apart by, from its report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.report import MEASURES
from dreambooth_sm.serving.report import REPORT

EVALUATION = "evaluation.json"
# In the place of what a report does not say.
UNKNOWN = "unknown"
# Texts that versions are told apart by in lists.
PROPERTIES = ("instance_prompt", "base_model", "method", "steps", "score", "verdict", "image", "dreambooth-sm")
# Below what SageMaker mounts for a processing job.
REPORT_DIRECTORY, EVALUATION_DIRECTORY = Path("input", "report"), Path("output")
# What a property's text can't hold, and how long it may be.
_REFUSED, _LONGEST = re.compile(r"[^\w .:/=+@-]"), 256


def measures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The measures of the model that was exported, by their names; empty where it was not measured.

    Args:
        report: the job's ``report.json``.
    """
    rows = [row for row in report["candidates"] if int(row["candidate"])]
    if not rows:
        return {}
    chosen = rows[-1]
    if report["hyperparameters"].get("select_best"):
        chosen = max(rows, key=lambda row: (float(row["score"]), int(row["candidate"])))
    return {name: float(chosen[name]) for name in MEASURES if chosen.get(name) is not None}


def properties_of(report: Mapping[str, Any]) -> dict[str, str]:
    """What :data:`PROPERTIES` names, as far as it is known."""
    said = {
        "instance_prompt": " | ".join(str(subject["instance_prompt"]) for subject in report["subjects"]),
        "base_model": report["base_model"],
        "method": report["hyperparameters"]["method"],
        "steps": report["attempts"][-1]["last_step"],
        "score": measures_of(report).get("score"),
        "verdict": " ".join(report["verdicts"]),
        "image": report["versions"].get("image"),
        "dreambooth-sm": report["versions"].get("dreambooth-sm"),
    }
    return {name: _REFUSED.sub(" ", str(said[name]))[:_LONGEST] for name in PROPERTIES if said[name] not in (None, "")}


def key_of(name: str) -> str:
    """How the evaluation calls a property: its paths have no hyphens."""
    return name.replace("-", "_")


def write_evaluation(base: Path, wanted: Sequence[str]) -> str:
    """Writes measures and properties as JSON, which a pipeline's conditions read.

    Args:
        base: directory that SageMaker mounts, with the report in it.
        wanted: measures that have to be there.

    Returns:
        what was written.

    Raises:
        UserError: the report is missing, or some of the measures are.
    """
    path = base / REPORT_DIRECTORY / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the training has left no report") from None
    measures = measures_of(report)
    if missing := [name for name in wanted if name not in measures]:
        raise UserError(
            f"{', '.join(missing)}: the model was not measured by it; set fidelity_encoders, and class_prompt for prior"
        )
    known = properties_of(report)
    properties = {key_of(name): known.get(name, UNKNOWN) for name in PROPERTIES}
    text = json.dumps({**measures, "properties": properties}, indent=1)
    directory = base / EVALUATION_DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    (directory / EVALUATION).write_text(text, encoding="utf-8")
    return text
