"""Python environments with one SageMaker SDK each, which `make test` sets up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.patience import PATIENCE

ROOT = Path(__file__).parents[2]
PYTHONS = {
    "boto3": Path(sys.executable),
    "estimator": ROOT / ".venv-sdk2" / "bin" / "python",
    "model_trainer": ROOT / ".venv-sdk3" / "bin" / "python",
}
_WITH_SDK = Path(__file__).parent / "with_sdk"
NO_TELEMETRY = "SchemaVersion: '1.0'\nSageMaker:\n  PythonSDK:\n    Modules:\n      TelemetryOptOut: true\n"


def send(
    backend: str, requests: Sequence[dict[str, Any]], directory: Path, services: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Sends requests with the Python that has the backend's SDK; for the arguments see :func:`run_script`."""
    return run_script(backend, "sdk_request.py", [backend, "send"], directory, services, standard_input=requests)


def run_script(
    backend: str,
    script: str,
    arguments: Sequence[str],
    directory: Path,
    services: Mapping[str, str],
    *,
    standard_input: object = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder with the Python that has the backend's SDK.

    Args:
        directory: to run in.
        services: the variables that lead to the embedded services.
        standard_input: goes to it as JSON.
    """
    process = start_script(backend, script, arguments, directory, services, standard_input=standard_input)
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start_script(
    backend: str,
    script: str,
    arguments: Sequence[str],
    directory: Path,
    services: Mapping[str, str],
    *,
    standard_input: object = None,
) -> subprocess.Popen[str]:
    """As :func:`run_script`, without waiting for its end."""
    python = PYTHONS[backend]
    if not python.exists():
        pytest.skip(f"{python.parents[1].name} is missing: `make {python.parents[1].name}/.installed` makes it")
    config = directory / "config.yaml"
    config.write_text(NO_TELEMETRY)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        **services,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([] if backend == "boto3" else [str(_WITH_SDK)])]),
        "SAGEMAKER_USER_CONFIG_OVERRIDE": str(config),
        "SAGEMAKER_VALIDATE_ROLE": "false",
    }
    given = directory / "input.json"
    given.write_text(json.dumps(standard_input))
    with given.open() as file:
        return subprocess.Popen(
            [python, ROOT / "tests" / "helpers" / script, *arguments],
            env=environment,
            cwd=directory,
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
