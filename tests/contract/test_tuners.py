"""The tuners of both SDKs send the launcher's request of a tuning job.

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
from launcher.tuning.search import Search, tuning_request
from launcher.tuning.trials import plan_trials
from tests.helpers.api import refusals
from tests.helpers.sdks import run_script

pytestmark = pytest.mark.slow

VALUES = {
    "instance_prompt": "photo of zwx toy",
    "class_prompt": "photo of a toy",
    "method": "lora",
    "max_train_steps": 300,
    "pretrained_model_name_or_path": "/opt/ml/input/data/model",
}
RESOURCES: dict[str, Any] = {
    "instance_type": "ml.g5.xlarge",
    "bucket": "models",
    "role": "arn:aws:iam::123456789012:role/service-role/train",
    "image_uri": "123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:1",
}
RANGES = {
    "learning_rate": None,
    "lora_rank": (4, 32),
    "lora_targets": ["attention", "linear"],
    "use_ema": [True, False],
}
SEARCHES: dict[str, tuple[Search, dict[str, Any]]] = {
    "plain": (Search(), {}),
    "spot": (
        Search(early_stopping=True, max_trials=20, parallel=4, search_seed=7, max_total_minutes=600),
        {"spot": True, "max_minutes": 60, "max_retry_attempts": 3, "tags": {"team": "toys"}},
    ),
    "hyperband": (
        Search(strategy="hyperband", objective="subject"),
        {"vpc": ["subnet-0a", "sg-0c"], "environment": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32"}},
    ),
    "warm": (
        Search(
            objective="prior",
            warm_start=("before",),
            target=0.1,
            patience=4,
            until_convergence=True,
            same_data=True,
        ),
        {},
    ),
}


@pytest.mark.parametrize("backend", ["estimator", "model_trainer"])
def test_a_tuner_sends_the_request(backend: str, s3: EmbeddedS3, tmp_path: Path) -> None:
    channels = {"images": S3Uri("models", "pictures"), "model": S3Uri("models", "base/model.safetensors")}
    requests = []
    for kind, (search, options) in SEARCHES.items():
        name = f"{kind}-{backend.replace('_', '-')}"
        trials = plan_trials(Hyperparameters.parse(VALUES), RANGES, search, pictures=5)
        resources = Resources.parse({**RESOURCES, **options, "name": name})
        training = training_request(trials.hyperparameters, resources, channels)
        requests.append(tuning_request(training, name, trials.ranges, search, trials.measures))
        assert refusals("CreateHyperParameterTuningJob", requests[-1]) == []
    ended = run_script(backend, "sdk_tuning.py", [backend], tmp_path, s3.environment(), standard_input=requests)
    sent = json.loads(ended.stdout.splitlines()[-1]) if ended.stdout else []
    assert len(sent) == len(requests), ended.stderr
    for body, request in zip(sent, requests, strict=True):
        definition = body["TrainingJobDefinition"]
        if backend == "model_trainer":  # which calls the same by another name
            definition["HyperParameterTuningResourceConfig"] = definition.pop("ResourceConfig")
        assert body == request
