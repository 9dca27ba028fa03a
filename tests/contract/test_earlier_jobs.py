"""What is asked about an account's last jobs and warm pools, and what is made of SageMaker's answers."""

from __future__ import annotations

import io
import json
import threading
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri
from launcher.aws.clients import Clients
from launcher.aws.service_errors import ServiceError
from launcher.jobs.times import own_times
from launcher.jobs.warm_pools import find_warm_pools
from launcher.resources import Resources
from launcher.training_request import training_request
from tests.helpers.api import refusals

NOON = 1_800_000_000
RESOURCES = {
    "instance_type": "ml.g5.xlarge",
    "bucket": "models",
    "role": "arn:aws:iam::123456789012:role/train",
    "image_uri": "123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm@sha256:0a",
}


class Account(Clients):
    """Answers for jobs as SageMaker and CloudWatch Logs would, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(boto3.Session("key", "secret", region_name="us-west-2"))
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, list[tuple[float, str]]] = {}
        self.refused: str | None = None
        self._lock = threading.Lock()
        for service in ("sagemaker", "logs"):
            self(service).meta.events.register("before-send", self._answer)

    def add(self, name: str, *, waited: float = 200, lines: list[tuple[float, str]] = [], **more: Any) -> None:  # noqa: B006 - not kept
        """A completed job; ``lines`` with their seconds after its start."""
        started = NOON + waited
        self.jobs[name] = {
            **request(name=name),
            "TrainingJobStatus": "Completed",
            "CreationTime": NOON,
            "TrainingStartTime": started,
            "TrainingEndTime": started + 500,
            "SecondaryStatusTransitions": [{"Status": "Starting", "StartTime": NOON}],
            **more,
        }
        self.logs[name] = [(started + seconds, text) for seconds, text in lines]

    def _answer(self, request: Any, **_: Any) -> AWSResponse:
        operation = request.headers["X-Amz-Target"].decode().partition(".")[2]
        body = json.loads(request.body)
        with self._lock:
            self.asked.append((operation, body))
        status, answer = 200, self._body(operation, body)
        if operation == self.refused:
            status, answer = 400, {"__type": "AccessDeniedException", "message": "not you"}
        response = AWSResponse(request.url, status, {"Content-Type": "application/x-amz-json-1.1"}, io.BytesIO())
        response._content = json.dumps(answer).encode()
        return response

    def _body(self, operation: str, body: dict[str, Any]) -> dict[str, Any]:
        if operation == "ListTrainingJobs":
            pools = body.get("WarmPoolStatusEquals")
            names = [
                name for name, job in self.jobs.items() if pools in (None, job.get("WarmPoolStatus", {}).get("Status"))
            ]
            return {"TrainingJobSummaries": [{"TrainingJobName": name} for name in names]}
        if operation == "DescribeTrainingJob":
            return self.jobs[body["TrainingJobName"]]
        name = body["logStreamNamePrefix"].removesuffix("/")
        events = [{"timestamp": round(1000 * time), "message": text} for time, text in self.logs[name]]
        return {"events": [each for each in events if body["filterPattern"].strip('"') in str(each["message"])]}


def request(values: dict[str, Any] = {}, **options: Any) -> dict[str, Any]:  # noqa: B006 - not changed
    h = Hyperparameters.parse({"instance_prompt": "photo of zwx toy", **values})
    channels = {"images": S3Uri("models", "pictures")}
    return training_request(h, Resources.parse({"name": "next", **RESOURCES, **options}), channels)


def phases(load: float, train: float) -> list[tuple[float, str]]:
    """The lines of a job that starts to speak after 70 seconds, and ends 30 seconds before SageMaker says so."""
    return [
        (70, "phase=check state=started"),
        (75, "phase=check state=ended seconds=5"),
        (75, "a line that says nothing"),
        (80, f"phase=load_base state=ended seconds={load}"),
        (470, f"phase=train state=ended seconds={train}"),
        (485, "phase=save state=ended seconds=15"),
    ]


def test_the_last_jobs_that_are_alike_say_what_parts_take() -> None:
    account = Account()
    for number, (waited, load) in enumerate([(100, 20), (300, 40), (150, 30)]):
        account.add(f"job-{number}", waited=waited, lines=phases(load, 350))
    account.add("another-model", waited=120, lines=phases(90, 350), **{"HyperParameters": {"method": "lora"}})
    account.add("another-type", waited=1, **{"ResourceConfig": request(instance_type="ml.g6.xlarge")["ResourceConfig"]})
    account.add("spot", waited=1, EnableManagedSpotTraining=True)
    account.add("warm", waited=1)
    account.add(
        "pool", waited=1, WarmPoolStatus={"Status": "Reused", "ReusedByJob": "warm"}, EnableManagedSpotTraining=True
    )
    again = [{"Status": "Starting", "StartTime": NOON}, {"Status": "Interrupted", "StartTime": NOON}]
    account.add("interrupted", waited=1, SecondaryStatusTransitions=again)
    account.add("no-log", waited=200)
    found = own_times(account, request())
    assert found.waiting is not None
    assert (found.waiting.value, found.waiting.jobs) == (150, 5)
    assert found.start is not None
    assert (found.start.value, found.start.jobs) == (70, 4)
    assert found.base_model is not None
    assert (found.base_model.value, found.base_model.jobs) == (30, 3)
    assert found.end is not None
    assert found.end.value == 30
    assert [seconds for _, seconds in found.trained] == [350] * 4
    operations = [operation for operation, _ in account.asked]
    assert operations[0] == "ListTrainingJobs"
    assert operations.count("DescribeTrainingJob") == len(account.jobs)
    assert operations.count("FilterLogEvents") == 5
    for operation, body in account.asked:
        assert refusals(operation, body, "logs" if operation == "FilterLogEvents" else "sagemaker") == []


def test_an_account_without_jobs_is_asked_once() -> None:
    account = Account()
    found = own_times(account, request())
    assert (found.waiting, found.start, found.base_model, found.end, found.trained) == (None, None, None, None, ())
    assert [operation for operation, _ in account.asked] == ["ListTrainingJobs"]


@pytest.mark.parametrize("operation", ["ListTrainingJobs", "DescribeTrainingJob", "FilterLogEvents"])
def test_a_role_that_may_not_look_says_so(operation: str) -> None:
    account = Account()
    account.add("job", lines=phases(20, 350))
    account.refused = operation
    with pytest.raises(ServiceError, match="your last jobs can't be looked at: AccessDeniedException"):
        own_times(account, request())


CONDITIONS = ("ResourceConfig", "RoleArn", "VpcConfig", "EnableNetworkIsolation", "AlgorithmSpecification")


def kept(values: dict[str, Any] = {}, **options: Any) -> dict[str, Any]:  # noqa: B006 - not changed
    """What a job is described by that keeps its instance."""
    described = request(values, keep_alive=600, **options)
    return {"WarmPoolStatus": {"Status": "Available"}} | {k: v for k, v in described.items() if k in CONDITIONS}


def test_a_warm_pool_is_found_with_what_it_has() -> None:
    account = Account()
    account.add("other-image", **kept(image_uri="image:2"))
    account.add("same", **kept())
    account.add("gone", WarmPoolStatus={"Status": "Terminated"})
    pools = find_warm_pools(account, request(keep_alive=600))
    assert [(pool.job, pool.has_image, pool.has_model, pool.differences) for pool in pools] == [
        ("same", True, True, ()),
        ("other-image", False, True, ()),
    ]
    assert pools[0].until.timestamp() == NOON + 200 + 500 + 600
    assert not find_warm_pools(account, request({"pretrained_model_name_or_path": "me/other"}))[0].has_model
    assert [operation for operation, _ in account.asked[:3]] == [
        "ListTrainingJobs",
        "DescribeTrainingJob",
        "DescribeTrainingJob",
    ]
    for operation, body in account.asked:
        assert refusals(operation, body) == []


def test_a_warm_pool_that_nearly_matches_says_why_not() -> None:
    account = Account()
    options: dict[str, dict[str, Any]] = {
        "role": {"role": "arn:aws:iam::123456789012:role/another"},
        "number of instances": {"instance_count": 2},
        "subnets": {"vpc": ["subnet-0a", "sg-0c"]},
        "network isolation": {"network_isolation": True},
        "volume size": {"volume_gb": 80},
        "key of the volume": {"kms": "1234abcd"},
    }
    wanted = {"instance_type": "ml.p3.2xlarge"}
    values = {"pretrained_model_name_or_path": "/opt/ml/input/data/model"}
    for name, option in options.items():
        account.jobs.clear()
        account.add("near", **kept(values, **wanted, **option))
        (pool,) = find_warm_pools(account, request(values, **wanted))
        assert any(each.startswith(f"{name}: ") for each in pool.differences), (name, pool.differences)
    assert pool.differences == ("key of the volume: 1234abcd, and the job's is none",)
    assert find_warm_pools(account, request(instance_type="ml.g5.xlarge")) == []  # another instance type


def test_a_spot_job_runs_in_no_warm_pool_and_an_account_without_is_asked_once() -> None:
    account = Account()
    assert find_warm_pools(account, request()) == []
    assert [operation for operation, _ in account.asked] == ["ListTrainingJobs"]
    assert find_warm_pools(account, request(spot=True)) == []
    assert len(account.asked) == 1
