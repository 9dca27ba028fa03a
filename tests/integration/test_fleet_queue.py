"""Fleets through a queue of AWS Batch: its requests, and the embedded queue that shares instances fairly."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.session
import pytest
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

import launcher
from dreambooth_sm.errors import UserError
from dreambooth_sm.fleet.subjects import parse_subject
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Options, S3Uri, read_manifest
from launcher.aws.clients import Clients
from launcher.channels import Channel
from launcher.fleets.clock import Clock
from launcher.fleets.fleet import Fleet
from launcher.fleets.queue import MAX_PAYLOAD, Queue, QueuedJobs
from launcher.fleets.state import write_state
from launcher.local.s3 import EmbeddedS3
from launcher.local.sagemaker import EmbeddedSageMaker
from launcher.local.services import EmbeddedServices, embedded_services
from launcher.resources import Resources
from launcher.training_request import training_request
from tests.helpers.services import eventually
from tests.helpers.training import paint_pictures


def make_queue(batch: Any, name: str, instances: int, weights: dict[str, float] | None = None) -> None:
    limits = [{"maxCapacity": instances, "capacityUnit": "NUM_INSTANCES"}]
    batch.create_service_environment(
        serviceEnvironmentName=name, serviceEnvironmentType="SAGEMAKER_TRAINING", capacityLimits=limits
    )
    shares = [{"shareIdentifier": share, "weightFactor": weight} for share, weight in (weights or {}).items()]
    policy = batch.create_scheduling_policy(name=name, fairsharePolicy={"shareDistribution": shares})["arn"]
    batch.create_job_queue(
        jobQueueName=name,
        priority=1,
        jobQueueType="SAGEMAKER_TRAINING",
        serviceEnvironmentOrder=[{"order": 1, "serviceEnvironment": name}],
        **({"schedulingPolicyArn": policy} if weights else {}),
    )


@pytest.mark.slow
def test_a_fleet_waits_in_a_queue_and_its_jobs_are_found_by_their_attempts(
    services: EmbeddedServices, tiny_base: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("duck", "cat", "dog")):
        paint_pictures(tmp_path / name, 2, seed=number)
    make_queue(services.clients()("batch"), "toys", 1, {"people": 1.0})
    how: dict[str, Any] = {
        "instance_type": "ml.g5.xlarge",
        "instance_prompt": "photo of zwx toy",
        "base_model": tiny_base,
        "method": "lora",
        "lora_rank": 2,
        "resolution": 64,
        "max_train_steps": 1,
        "subjects_per_job": 2,
    }
    for wrong, words in (
        ({"queue": "other"}, "job queue 'other' was not found"),
        ({"queue": "toys"}, "set share to one"),
        ({"queue": "toys", "share": "people", "priority": 10_000}, "set 0 to 9999"),
        ({"priority": 1}, "set queue"),
    ):
        with pytest.raises(UserError, match=words):
            launcher.check_many(tmp_path, **how, **wrong)
    lines: list[str] = []
    fleet = launcher.fit_many(
        tmp_path, queue="toys", share="people", priority=7, attempts=2, name="queued", log=lines.append, **how
    )
    assert isinstance(fleet, Fleet)
    status = fleet.status()
    assert status.done == ("cat", "dog", "duck")
    assert status.jobs == {"queued-0001": "Completed", "queued-0002": "Completed"}
    assert fleet.job("cat").name.startswith("AWSBatchqueued-0001")
    assert read_manifest(S3Uri.parse(fleet.models()["dog"])).step == 1
    again = launcher.attach_fleet("queued", services.clients())
    assert again.status() == status


class Jobs:
    """Training jobs that end when they are told to."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: dict[str, str] = {}
        self._lock = threading.Lock()

    def create(self, request: dict[str, Any], *, region: str) -> dict[str, Any]:
        with self._lock:
            self.started.append(request["TrainingJobName"])
        return {}

    def named(self, name: str) -> Any:
        reason = self.ended.get(name)
        known = {"TrainingJobStatus": "InProgress"}
        if reason is not None:
            known = {
                "TrainingJobStatus": "Failed" if reason else "Completed",
                **({"FailureReason": reason} if reason else {}),
            }
        return SimpleNamespace(describe=lambda: known, stop=lambda: self.ended.setdefault(name, "stopped"))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Jobs]]:
    """A client of an embedded Batch, and the jobs that it starts."""
    jobs = Jobs()
    monkeypatch.setattr(
        EmbeddedSageMaker, "create", lambda self, request, *, region: jobs.create(request, region=region)
    )
    monkeypatch.setattr(EmbeddedSageMaker, "named", lambda self, name: jobs.named(name))
    with embedded_services() as services:
        yield services.clients()("batch"), jobs


def test_jobs_of_a_fleet_that_is_stopped_leave_the_queue(
    jobs: tuple[Any, Jobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, training = jobs
    make_queue(batch, "stopped", 1)
    clients = Clients()
    monkeypatch.setattr(Clients, "__call__", lambda self, name: batch)
    queued = QueuedJobs(Queue("stopped"), "toys", clients, Clock(), "ml.g5.xlarge")
    for number in (1, 2):
        queued.send(request_of(f"toys-000{number}", checkpoint=f"s3://models/{number}"))
    eventually(lambda: training.started)
    queued.look()
    for name in sorted(queued.states):
        queued.stop(name)
    eventually(lambda: queued.look() and not queued.states["toys-0002"].is_open)
    assert queued.states["toys-0002"].reason == "the fleet was stopped"
    assert queued.why_again("toys-0002") == ""


def request_of(name: str, **more: Any) -> dict[str, Any]:
    resources = Resources(
        instance_type="ml.g5.xlarge",
        name=name,
        bucket="models",
        image_uri="123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:1",
        role="arn:aws:iam::123456789012:role/dreambooth-sm",
        **more,
    )
    h = Hyperparameters.parse({"instance_prompt": "zwx toy", "method": "lora", "fleet": "/opt/ml/input/data/fleet/f"})
    return training_request(h, resources, {"fleet": Channel(S3Uri("models", "list"))})


def test_shares_get_instances_by_their_weights_and_priorities(jobs: tuple[Any, Jobs]) -> None:
    """A share with a quarter of the weight factor gets four times as many; the more urgent job of a share is first."""
    batch, started = jobs
    make_queue(batch, "toys", 2, {"paid": 0.25, "free": 1.0})
    for number in range(10):
        for share in ("free", "paid"):
            queue = Queue("toys", share, priority=5 if number == 9 else 0)
            request = request_of(f"{share}-{number}")
            for _ in range(2):  # the same job once, whoever submits it
                batch.submit_service_job(**queue.submission(request, f"{share}-{number}"))
    for ended in range(20):
        eventually(lambda: len(started.started) >= min(20, ended + 2))  # noqa: B023 - called at once
        started.ended[started.started[ended]] = ""
    order = [name.removeprefix("AWSBatch") for name in started.started]
    assert len(order) == 20
    assert sum(name.startswith("paid") for name in order[2:12]) == 8
    for share in ("paid", "free"):
        its = [name for name in order if name.startswith(share)]
        assert any(name.startswith(f"{share}-9") for name in its[:2])
    eventually(lambda: {each["status"] for each in summaries(batch, "*")} == {"SUCCEEDED"})


def summaries(batch: Any, name: str) -> list[dict[str, Any]]:
    found = batch.list_service_jobs(jobQueue="toys", filters=[{"name": "JOB_NAME", "values": [name]}])
    return list(found["jobSummaryList"])


def test_faults_of_the_service_are_tried_again_and_those_of_the_job_are_not(jobs: tuple[Any, Jobs]) -> None:
    batch, started = jobs
    make_queue(batch, "toys", 1)
    batch.submit_service_job(**Queue("toys", attempts=2).submission(request_of("one"), "one"))
    for count in (1, 2):
        eventually(lambda: len(started.started) == count)  # noqa: B023 - called at once
        started.ended[started.started[-1]] = "InternalServerError: We encountered an internal error."
    (ended,) = eventually(lambda: [each for each in summaries(batch, "one") if each["status"] == "FAILED"])
    assert ended["statusReason"].startswith("Received status from SageMaker: InternalServerError")
    assert ended["latestAttempt"]["serviceResourceId"]["value"].endswith(started.started[1])
    batch.submit_service_job(**Queue("toys", attempts=2).submission(request_of("two"), "two"))
    eventually(lambda: len(started.started) == 3)
    started.ended[started.started[-1]] = "AlgorithmError: 1 of 2 subjects failed"
    eventually(lambda: summaries(batch, "two")[0]["status"] == "FAILED")
    assert len(started.started) == 3
    with pytest.raises(ClientError, match="scheduling policy"):
        batch.submit_service_job(**Queue("toys", "share").submission(request_of("three"), "three"))


class Recorded(Clients):
    """Services that take everything, and remember it."""

    def __init__(self, s3: Any) -> None:
        super().__init__()
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self._s3 = s3

    def __call__(self, service: str) -> Any:
        return self._s3 if service == "s3" else self

    def get_paginator(self, operation: str) -> Any:
        return SimpleNamespace(paginate=lambda **named: [{"TrainingJobSummaries": []}])

    def list_service_jobs(self, **request: Any) -> dict[str, Any]:
        self.sent.append(("ListServiceJobs", request))
        return {"jobSummaryList": []}

    def submit_service_job(self, **request: Any) -> dict[str, Any]:
        self.sent.append(("SubmitServiceJob", request))
        return {}

    def create_training_job(self, **request: Any) -> dict[str, Any]:
        self.sent.append(("CreateTrainingJob", request))
        return {}

    def is_local(self, service: str) -> bool:
        return True


def problems_of(service: str, operation: str, request: dict[str, Any]) -> str:
    model = botocore.session.get_session().get_service_model(service)
    return str(ParamValidator().validate(request, model.operation_model(operation).input_shape).generate_report())


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("queue", [None, Queue("toys", "people", 3, 4)])
def test_requests_are_what_the_services_take(s3: EmbeddedS3, target: S3Uri, queue: Queue | None, spot: bool) -> None:
    root, clients = target / "fleets" / "toys", Recorded(s3.client())
    facts = {
        "name": "toys",
        "parallel": 1,
        "models": str(root / "models"),
        "alternatives": ["ml.g6.xlarge", "ml.g6e.xlarge"],
        "queue": queue.facts() if queue else None,
        "request": request_of("toys", spot=spot, tags={"team": "toys"}),
    }
    subject = {"id": "duck", "images": "s3://pictures/duck"}
    write_state(root, facts, {"toys-0001": (parse_subject(subject, "1"),)}, S3Options(), clients)
    Fleet(root, clients).advance()
    name, request = clients.sent[-1]
    service = "batch" if queue else "sagemaker"
    assert not problems_of(service, name, request)
    if queue:
        assert all(not problems_of("batch", each, sent) for each, sent in clients.sent)
        assert (request["shareIdentifier"], request["schedulingPriority"]) == ("people", 3)
        assert request["retryStrategy"]["attempts"] == 4
        assert request["tags"] == {"team": "toys"}
        assert len(request["serviceRequestPayload"].encode()) < 10 * 1024
        request = json.loads(request["serviceRequestPayload"])
        assert not problems_of("sagemaker", "CreateTrainingJob", request)
    resources = request["ResourceConfig"]
    if spot:  # botocore's text: InstancePreferences can't be had with InstanceType or managed spot training
        assert resources["InstanceType"] == "ml.g5.xlarge"
        assert "InstancePreferences" not in resources
    else:
        assert "InstanceType" not in resources
        types = [each["InstanceType"] for each in resources["InstancePreferences"]]
        assert types == ["ml.g5.xlarge", "ml.g6.xlarge", "ml.g6e.xlarge"]
    assert request["InputDataConfig"][0]["DataSource"]["S3DataSource"]["S3Uri"] == f"{root}/jobs/toys-0001/list/"
    assert request["HyperParameters"]["fleet_outcomes"] == f"{root}/jobs/toys-0001/outcomes"


def test_a_request_that_is_too_long_for_a_queue_is_refused_before() -> None:
    request = request_of("toys", environment={f"NAME_{number}": "x" * 400 for number in range(30)})
    with pytest.raises(UserError, match=f"AWS Batch takes {MAX_PAYLOAD:,}"):
        Queue("toys").submission(request, "token")
