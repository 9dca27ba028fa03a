"""The three ways to send a job: what goes over the wire is the same, and jobs run, with both SageMaker SDKs.

The SDKs can't be installed together: each runs in an environment of its own, which `make test` sets up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.embedded import EmbeddedS3
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri
from launcher.training_request import Resources, training_job
from tests.helpers.api import refusals

ROOT = Path(__file__).parents[2]
SENDER = ROOT / "tests" / "helpers" / "sdk_request.py"
PYTHONS = {
    "boto3": Path(sys.executable),
    "estimator": ROOT / ".venv-sdk2" / "bin" / "python",
    "model_trainer": ROOT / ".venv-sdk3" / "bin" / "python",
}
NO_TELEMETRY = "SchemaVersion: '1.0'\nSageMaker:\n  PythonSDK:\n    Modules:\n      TelemetryOptOut: true\n"
PLAIN: dict[str, Any] = {
    "instance_type": "ml.g5.xlarge",
    "name": "zwx",
    "bucket": "models",
    "role": "arn:aws:iam::123456789012:role/service-role/train",
    "image_uri": "123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:1",
}
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "spot": {"spot": True, "max_minutes": 60, "checkpoint": "s3://models/earlier", "instance_count": 2},
    "closed": {
        "instance_type": "ml.p3.2xlarge",
        "network_isolation": True,
        "kms": "1234abcd",
        "vpc": ["subnet-0a", "subnet-0b", "sg-0c"],
        "volume_gb": 80,
        "output": "s3://models/zwx",
    },
    "marked": {
        "keep_alive": 600,
        "compression": True,
        "tags": {"team": "toys", "cost centre": "7"},
        "environment": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32"},
    },
}
VALUES = {
    "instance_prompt": "photo of zwx toy",
    "class_prompt": "photo of a toy",
    "train_text_encoder": False,
    "learning_rate": 2e-6,
    "max_train_steps": 300,
    "pretrained_model_name_or_path": "/opt/ml/input/data/model",
}

Send = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture
def send(s3: EmbeddedS3, tmp_path: Path) -> Send:
    """Sends a request with a backend, and returns what went over the wire."""

    def send(backend: str, request: dict[str, Any]) -> dict[str, Any]:
        python = PYTHONS[backend]
        if not python.exists():
            pytest.skip(f"{python.parents[1].name} is missing: `make {python.parents[1].name}/.installed` makes it")
        (tmp_path / "config.yaml").write_text(NO_TELEMETRY)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            **s3.environment(),
            "PYTHONPATH": str(ROOT),
            "SAGEMAKER_USER_CONFIG_OVERRIDE": str(tmp_path / "config.yaml"),
            "SAGEMAKER_VALIDATE_ROLE": "false",
        }
        ended = subprocess.run(
            [python, SENDER, backend],
            input=json.dumps(request),
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        (sent,) = json.loads(ended.stdout.splitlines()[-1])
        return sent

    return send


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("backend", PYTHONS)
def test_what_goes_over_the_wire_is_the_request(backend: str, job: str, send: Send) -> None:
    resources = Resources.parse({**PLAIN, **JOBS[job], "name": f"{job}-{backend.replace('_', '-')}"})
    channels = {"images": S3Uri("models", "pictures"), "model": S3Uri("models", "base/model.safetensors")}
    request = training_job(Hyperparameters.parse(VALUES), resources, channels)
    assert refusals("CreateTrainingJob", request) == []
    sent = send(backend, request)
    if backend == "model_trainer":  # which adds the time to every name
        assert sent["TrainingJobName"].startswith(f"{request['TrainingJobName']}-")
        sent["TrainingJobName"] = request["TrainingJobName"]
    assert sent == request
