"""A prepared job: checked once, staged once, submitted any number of times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import S3Uri
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError
from launcher.local.s3 import EmbeddedS3
from launcher.prepare import PreparedJob, prepare, prepare_local

ROLE = "arn:aws:iam::123456789012:role/train"
JOB = {"instance_prompt": "photo of zwx toy", "resolution": 64, "max_train_steps": 1}


class SageMaker:
    """Takes requests, or refuses them all."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.refusal: Exception | None = None

    def create_training_job(self, **request: Any) -> None:
        if self.refusal:
            raise self.refusal
        self.requests.append(request)


class Services(Clients):
    """S3 as it is, counted, and a SageMaker that only takes notes."""

    def __init__(self, s3: EmbeddedS3) -> None:
        super().__init__()
        self.sagemaker, self.s3, self.asked = SageMaker(), s3, 0

    def __call__(self, service: str) -> Any:
        if service == "sagemaker":
            return self.sagemaker
        self.asked += 1
        return self.s3.client()


@pytest.fixture
def clients(s3: EmbeddedS3) -> Services:
    return Services(s3)


@pytest.fixture
def prepared(pictures: Path, target: S3Uri, clients: Services) -> PreparedJob:
    options = {"instance_type": "ml.g5.xlarge", "bucket": target.bucket, "role": ROLE, "image_uri": "image:1"}
    described = prepare({"images": pictures, "name": "zwx", **options, **JOB}, None)
    return replace(described, account=Account(clients))


def test_files_are_staged_once_and_jobs_started_as_often_as_one_likes(
    prepared: PreparedJob, clients: Services, s3: EmbeddedS3, target: S3Uri
) -> None:
    said: list[str] = []
    jobs = [prepared.submit(said.append) for _ in range(3)]
    jobs.append(prepared.submit(said.append, name="another"))
    assert [job.name for job in jobs] == ["zwx", "zwx-2", "zwx-3", "another"]
    (line,) = said
    assert line.startswith("files: 2 sent to s3://")
    assert clients.asked == 1
    (place,) = prepared.files
    assert {item["Key"] for item in s3.client().list_objects_v2(Bucket=target.bucket)["Contents"]} == {
        (place / name).prefix for name in (*prepared.files[place], "manifest.json")
    }
    requests = clients.sagemaker.requests
    assert [request["TrainingJobName"] for request in requests] == [job.name for job in jobs]
    for request in requests:
        workspace = f"s3://{target.bucket}/dreambooth-sm"
        assert request["CheckpointConfig"] == {"S3Uri": f"{workspace}/checkpoints/{request['TrainingJobName']}"}
    alike = [{k: v for k, v in r.items() if k not in ("TrainingJobName", "CheckpointConfig")} for r in requests]
    assert all(each == alike[0] for each in alike)
    assert requests[0] == prepared.request


def test_a_job_that_was_refused_keeps_its_name_for_the_next_try(prepared: PreparedJob, clients: Services) -> None:
    clients.sagemaker.refusal = ServiceError("no capacity", Kind.OTHER, "no capacity", None)
    with pytest.raises((UserError, ServiceError)):
        prepared.submit()
    clients.sagemaker.refusal = None
    assert prepared.submit().name == "zwx"


def test_a_numbered_name_is_no_longer_than_sagemaker_takes(prepared: PreparedJob) -> None:
    long = replace(prepared, resources=prepared.resources.model_copy(update={"name": "z" * 63}))
    names = [long.submit().name for _ in range(2)]
    assert names == ["z" * 63, f"{'z' * 61}-2"]


def test_what_was_prepared_without_an_account_is_not_staged(prepared: PreparedJob) -> None:
    described = replace(prepared, account=None)
    assert described.request == prepared.request
    with pytest.raises(ValueError, match="without an account"):
        described.stage()


def test_a_job_of_this_machine_is_prepared_as_well(pictures: Path) -> None:
    prepared = prepare_local({"images": pictures, "instance_type": "local", **JOB})
    assert prepared.pictures == 2
    assert prepared.image is None
    assert all(line.startswith("warning: ") for line in prepared.lines())
    with pytest.raises(UserError, match="spot is for jobs on SageMaker"):
        prepare_local({"images": pictures, "instance_type": "local", "spot": True, **JOB})
