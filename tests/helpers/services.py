"""Training jobs on the embedded SageMaker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dreambooth_sm.storage import S3Uri, list_objects, upload_directory
from launcher.jobs.job import Job
from launcher.local.services import EmbeddedServices
from tests.helpers.jobs import SMALL
from tests.helpers.patience import PATIENCE

ROLE = "arn:aws:iam::123456789012:role/dreambooth-sm"


class Workplace:
    """A bucket of its own on embedded services, and jobs whose data and results lie there."""

    def __init__(self, services: EmbeddedServices) -> None:
        self.services = services
        self.clients = services.clients()
        self.bucket = S3Uri(f"work-{uuid.uuid4().hex}")
        self.clients("s3").create_bucket(Bucket=self.bucket.bucket)

    def upload(self, directory: Path, name: str) -> str:
        upload_directory(directory, self.bucket / name, client=self.clients("s3"))
        return str(self.bucket / name)

    def keys(self, prefix: str) -> set[str]:
        return set(list_objects(self.bucket / prefix, client=self.clients("s3")))

    def body(self, key: str) -> bytes:
        return self.clients("s3").get_object(Bucket=self.bucket.bucket, Key=key)["Body"].read()

    def request(
        self, channels: Mapping[str, str] | None = None, hyperparameters: Mapping[str, str] | None = None, **more: Any
    ) -> dict[str, Any]:
        """A CreateTrainingJob request with what it must have, and ``more`` on top."""
        sources = {name: {"S3DataType": "S3Prefix", "S3Uri": uri} for name, uri in (channels or {}).items()}
        return {
            "TrainingJobName": f"job-{uuid.uuid4().hex}",
            "AlgorithmSpecification": {"TrainingImage": "dreambooth-sm:test", "TrainingInputMode": "File"},
            "RoleArn": ROLE,
            "HyperParameters": dict(hyperparameters or {}),
            "InputDataConfig": [
                {"ChannelName": name, "DataSource": {"S3DataSource": source}} for name, source in sources.items()
            ],
            "OutputDataConfig": {"S3OutputPath": str(self.bucket / "output"), "CompressionType": "NONE"},
            "ResourceConfig": {"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
            "StoppingCondition": {"MaxRuntimeInSeconds": 600},
            **more,
        }

    def start(self, *arguments: Any, **more: Any) -> Job:
        request = self.request(*arguments, **more)
        if not request["InputDataConfig"]:
            del request["InputDataConfig"]
        self.clients("sagemaker").create_training_job(**request)
        return Job(request["TrainingJobName"], self.clients)

    def train(self, pictures: Path, base: Path, hyperparameters: Mapping[str, str], **more: Any) -> Job:
        """Starts a small job of ours."""
        channels = {"images": self.upload(pictures, "images"), "model": base.as_uri()}
        return self.start(channels, {**SMALL, **hyperparameters}, **more)


def eventually(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)
    return value
