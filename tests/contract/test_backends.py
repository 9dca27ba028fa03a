"""The three ways to send a job: what goes over the wire is the same.

The SDKs can't be installed together: each runs in an environment of its own, which `make test` sets up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri
from launcher.local.s3 import EmbeddedS3
from launcher.resources import Resources
from launcher.training_request import training_request
from tests.helpers.api import refusals
from tests.helpers.sdks import PYTHONS, run_script, send

pytestmark = pytest.mark.slow

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
        "max_retry_attempts": 3,
        "compression": True,
        "tags": {"team": "toys", "cost centre": "7"},
        "environment": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32"},
    },
    "tracked": {},
}
TRACKED = {"report_to": "tensorboard"}
VALUES = {
    "instance_prompt": "photo of zwx toy",
    "class_prompt": "photo of a toy",
    "train_text_encoder": False,
    "learning_rate": 2e-6,
    "max_train_steps": 300,
    "pretrained_model_name_or_path": "/opt/ml/input/data/model",
}


@pytest.mark.parametrize("backend", PYTHONS)
def test_what_goes_over_the_wire_is_the_request(backend: str, s3: EmbeddedS3, tmp_path: Path) -> None:
    channels = {"images": S3Uri("models", "pictures"), "model": S3Uri("models", "base/model.safetensors")}
    requests = []
    for kind, options in JOBS.items():
        resources = Resources.parse({**PLAIN, **options, "name": f"{kind}-{backend.replace('_', '-')}"})
        values = VALUES | (TRACKED if kind == "tracked" else {})
        requests.append(training_request(Hyperparameters.parse(values), resources, channels))
        assert refusals("CreateTrainingJob", requests[-1]) == []
    ended = send(backend, requests, tmp_path, s3.environment())
    assert ended.returncode == 0, ended.stderr
    sent = json.loads(ended.stdout.splitlines()[-1])
    if backend == "model_trainer":  # which adds the time to every name
        for body, request in zip(sent, requests, strict=True):
            assert body["TrainingJobName"].startswith(f"{request['TrainingJobName']}-")
            body["TrainingJobName"] = request["TrainingJobName"]
    assert sent == requests


def test_the_seeds_notebook_says_what_it_means(s3: EmbeddedS3, target: S3Uri, tmp_path: Path) -> None:
    """A raw Estimator turns values into texts: with ``str``, or as JSON before that, as the notebook does it."""
    arguments = [PLAIN["role"], PLAIN["image_uri"], target.bucket]
    ended = run_script("estimator", "seed_notebook.py", arguments, tmp_path, s3.environment())
    assert ended.returncode == 0, ended.stderr
    bodies = json.loads(ended.stdout.splitlines()[-1])
    plain, encoded = (Hyperparameters.parse(body["HyperParameters"]) for body in bodies)
    assert plain == encoded
    assert (plain.instance_prompt, plain.class_prompt) == ("photo of zwx toy", "photo of a cat toy")
    assert (plain.optimizer, plain.train_text_encoder, plain.save_use_epochs) == ("auto16", False, False)
    assert (plain.use_ema, plain.max_train_steps, plain.save_steps) == (True, 300, 100)
    assert plain.manual_upload_model_path == "s3://bucket/dreambooth/trained_models"
