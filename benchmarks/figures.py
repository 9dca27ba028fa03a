"""Writes what a benchmark measured where the plan and the launcher read it: ``dreambooth_sm/planning/measured``."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dreambooth_sm.planning.figures import MEASURED, Figure, read_figures


def add_write_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help=f"updates the figures in this folder, as {MEASURED} is one"
    )


def step_figures(method: str, name: str, measured: Mapping[str, Any]) -> dict[str, float]:
    """Keys and values of a step's figures.

    Args:
        name: of the rung, or of what else was trained.
        measured: with ``precision``, and what :func:`benchmarks.common.measure_steps` found.
    """
    keys = {"steps_per_s": "steps_per_s", "peak_gb": "peak_allocated_gb", "gpu_busy_ms": "gpu_busy_ms"}
    prefix = f"{method}.{name}.{measured['precision']}"
    return {f"{prefix}.{key}": float(measured[found]) for key, found in keys.items() if found in measured}


def write_figures(folder: Path, name: str, values: Mapping[str, float], *, by: str) -> None:
    """Puts figures into ``NAME.json`` of a folder, in place of those with the same keys; the others stay.

    Args:
        by: the command that measures them.

    Raises:
        FigureError: where the file is there and can't be read.
    """
    path = folder / f"{name}.json"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    source = {"by": by, "card": card, "commit": _commit(), "date": datetime.date.today().isoformat()}
    figures = read_figures(path) if path.exists() else {}
    figures |= {key: Figure(value, **source) for key, value in values.items()}
    # A line a figure: a new measurement is a line in the diff.
    lines = [f"  {json.dumps(key)}: {json.dumps(dataclasses.asdict(found))}" for key, found in figures.items()]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _commit() -> str:
    """The commit of this checkout, ``-dirty`` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
