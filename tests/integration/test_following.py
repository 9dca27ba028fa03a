"""Following a job through all that can go wrong on the follower's side: the job itself never notices."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import EndpointConnectionError, UnauthorizedSSOTokenError

import launcher
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind
from launcher.jobs.job import Job
from launcher.local.services import embedded_services
from tests.helpers.services import Workplace, eventually

# Says three lines, the second when it is let to, and ends.
PROGRAM = """
import os, pathlib, signal, sys, time
base = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("phase=train state=started", flush=True)
while not pathlib.Path(os.environ["GO"]).exists(): time.sleep(0.02)
print(os.environ.get("LINE", "step=1 loss=0.5"), flush=True)
print("step=2 loss=0.25", flush=True)
"""
Fault = Callable[[str, int], Any]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    program = tmp_path_factory.mktemp("program") / "train.py"
    program.write_text(PROGRAM)
    with embedded_services(entrypoint=program) as services:
        yield Workplace(services)


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.aws.clients._ATTEMPTS", 1)
    monkeypatch.setattr("launcher.jobs.job._POLL", 0.05)
    monkeypatch.setattr("launcher.jobs.job._SETTLE", 0.5)
    monkeypatch.setattr("launcher.jobs.job._PATIENCE", 5.0)


class Faulty(Clients):
    """Clients whose requests a fault meets before they are sent; of AWS, as far as the launcher knows.

    Args:
        fault: gets the operation and how often it was asked for; returns an error's code and status, raises, or None.
    """

    def __init__(self, workplace: Workplace, fault: Fault, *, local: bool = False) -> None:
        super().__init__()
        self._workplace, self._fault, self._local = workplace, fault, local
        self.asked: dict[str, int] = {}

    def is_local(self, service: str) -> bool:
        return self._local

    def _make(self, service: str) -> Any:
        client = self._workplace.services.clients()._make(service)
        client.meta.events.register("before-send", self._meet)
        return client

    def _meet(self, request: Any, event_name: str, **_: Any) -> Any:
        operation = event_name.rpartition(".")[2]
        self.asked[operation] = self.asked.get(operation, 0) + 1
        code = self._fault(operation, self.asked[operation])
        if code is None:
            return None
        headers = {"Content-Type": "application/x-amz-json-1.1"}
        response = AWSResponse(request.url, 400, headers, None)
        response._content = json.dumps({"__type": code, "message": f"what {code} says"}).encode()
        return response


def start(workplace: Workplace, go: Path, **environment: str) -> Job:
    return workplace.start(Environment={"GO": str(go), **environment})


def expired(operation: str, count: int) -> str | None:
    return "ExpiredTokenException" if operation == "DescribeTrainingJob" and count > 2 else None


def no_sso(operation: str, count: int) -> None:
    if operation == "DescribeTrainingJob" and count > 2:
        raise UnauthorizedSSOTokenError


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("fault", [expired, no_sso])
def test_when_credentials_expire_the_job_runs_on_and_is_attached_again(
    fault: Fault, local: bool, workplace: Workplace, go: Path
) -> None:
    started = start(workplace, go)
    with pytest.raises(launcher.ServiceError) as caught:
        Job(started.name, Faulty(workplace, fault, local=local)).wait(lambda line: None)
    assert caught.value.kind is Kind.CREDENTIALS
    for words in (
        f"the job {started.name} keeps running",
        "renew your credentials",
        f'launcher.attach("{started.name}")',
    ):
        assert words in str(caught.value)
    assert started.status == "InProgress"
    go.touch()
    assert launcher.attach(started.name, workplace.clients).wait(lambda line: None).status == "Completed"


@pytest.mark.parametrize("operation", ["DescribeLogStreams", "GetLogEvents"])
def test_without_rights_to_the_log_the_status_is_followed(operation: str, workplace: Workplace, go: Path) -> None:
    started = start(workplace, go)
    clients = Faulty(workplace, lambda asked, _: "AccessDeniedException" if asked == operation else None)
    said: list[str] = []
    eventually(started.lines)
    go.touch()
    job = Job(started.name, clients)
    assert job.wait(said.append).status == "Completed"
    (line,) = said
    assert line.startswith("the log can't be read, so this follows the status alone: ")
    assert "AccessDeniedException" in line
    assert clients.asked[operation] == 1
    with pytest.raises(launcher.ServiceError, match="AccessDeniedException"):
        Job(started.name, clients).lines()
    with pytest.raises(launcher.ServiceError, match="AccessDeniedException"):
        Job(started.name, clients).history()


def test_a_network_that_was_away_costs_no_line(workplace: Workplace, go: Path) -> None:
    started = start(workplace, go)

    def away(operation: str, count: int) -> str | None:
        if operation == "DescribeTrainingJob" and 2 < count < 9:
            if count % 2 == 0:
                return "ServiceUnavailable"
            raise EndpointConnectionError(endpoint_url="https://user:a-password@api.sagemaker.example.com")
        if operation == "DescribeTrainingJob" and count > 9:
            go.touch()
        return "ThrottlingException" if operation == "GetLogEvents" and count % 3 == 0 else None

    said: list[str] = []
    Job(started.name, Faulty(workplace, away)).wait(said.append)
    assert [line for line in said if "=" in line] == [
        "phase=train state=started",
        "step=1 loss=0.5",
        "step=2 loss=0.25",
    ]
    (notice,) = [line for line in said if "=" not in line]
    assert notice.startswith("no answer from SageMaker, trying again: ")
    assert "a-password" not in notice


def test_a_network_that_stays_away_ends_following_alone(
    workplace: Workplace, go: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.jobs.job._PATIENCE", 0.2)
    started = start(workplace, go)
    clients = Faulty(workplace, lambda operation, count: "ServiceUnavailable" if count > 1 else None)
    with pytest.raises(launcher.ServiceError, match="keeps running on SageMaker") as caught:
        Job(started.name, clients).wait(lambda line: None)
    assert caught.value.kind is Kind.BUSY
    assert started.status == "InProgress"
    go.touch()


@pytest.mark.parametrize("local", [False, True])
def test_an_error_of_the_display_ends_the_display_alone(local: bool, workplace: Workplace, go: Path) -> None:
    started = start(workplace, go)
    go.touch()

    def log(line: str) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.warns(RuntimeWarning, match="BrokenPipeError: nobody reads") as warned:
        job = Job(started.name, Faulty(workplace, lambda *_: None, local=local)).wait(log)
    assert sum(each.category is RuntimeWarning for each in warned) == 1
    assert job.status == "Completed"


@pytest.mark.parametrize(
    "line",
    [
        "step=one loss=low.png",
        "step= loss=",
        "progress=1 done=x total=0",
        "phase=x state=ended seconds=inf?",
        "\x1b[2J=1",
    ],
)
def test_a_strange_line_is_a_line(line: str, workplace: Workplace, go: Path) -> None:
    started = start(workplace, go, LINE=line)
    go.touch()
    said: list[str] = []
    started.wait(said.append)
    assert said[-1] == "step=2 loss=0.25"


def test_jobs_of_others_are_followed(workplace: Workplace, go: Path) -> None:
    """Another image and other hyperparameters, more than one host, a start whose log does not exist yet."""
    started = workplace.start(
        None,
        {"max_train_steps": '"many"', "epochs": "3", "manual_upload_model_path": '"None"'},
        Environment={"GO": str(go), "LINE": "Epoch 1:  10%|#  | 1/10 [00:01<00:09, loss=0.1]"},
    )
    job = Job(started.name, Faulty(workplace, lambda *_: None))
    job.describe()
    assert job.lines() == [] or job.lines()[0] == "phase=train state=started"
    logs, group = workplace.clients("logs"), "/aws/sagemaker/TrainingJobs"
    eventually(job.lines)
    stream = f"{job.name}/algo-2-1"
    logs.create_log_stream(logGroupName=group, logStreamName=stream)
    event = {"timestamp": int(time.time() * 1000), "message": "of the second host"}
    logs.put_log_events(logGroupName=group, logStreamName=stream, logEvents=[event])
    go.touch()
    said: list[str] = []
    job.wait(said.append)
    assert {"of the second host", "step=2 loss=0.25"} <= set(said)
    assert job._follow_progress().steps is None
    assert job.model_uri.startswith(f"{workplace.bucket}/output/{job.name}/")


def test_a_description_with_nothing_that_is_not_required_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime

    class Bare(Clients):
        def is_local(self, service: str) -> bool:
            return False

        def __call__(self, service: str) -> Any:
            return self

        def describe_training_job(self, **_: Any) -> dict[str, Any]:
            return {"TrainingJobStatus": "Failed", "SecondaryStatus": "Failed", "CreationTime": datetime.now(UTC)}

        def get_paginator(self, operation: str) -> Any:
            return self

        def paginate(self, **_: Any) -> list[Any]:
            return []

        class exceptions:  # noqa: N801 - as boto3 calls it
            ResourceNotFoundException = LookupError

    job = Job("theirs", Bare())
    with pytest.raises(launcher.JobFailed, match="theirs: Failed"):
        job.wait(lambda line: None)
    assert job.cost is None


def test_stopping_what_has_ended_is_no_error_and_what_is_forbidden_is(workplace: Workplace, go: Path) -> None:
    started = start(workplace, go)
    forbidden = Faulty(workplace, lambda asked, _: "AccessDeniedException" if asked == "StopTrainingJob" else None)
    with pytest.raises(launcher.ServiceError, match="can't be stopped: AccessDeniedException"):
        Job(started.name, forbidden).stop()
    assert started.status == "InProgress"
    go.touch()
    started.wait(lambda line: None)
    started.stop()


def test_ctrl_c_on_a_local_job_says_where_its_checkpoint_is(
    workplace: Workplace, tmp_path: Path, go: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = workplace.request(Environment={"GO": str(go)})
    del request["InputDataConfig"]
    workplace.services.sagemaker.create(request, directory=tmp_path / "tree")
    job = Job(request["TrainingJobName"], workplace.clients, directory=tmp_path / "tree")

    def interrupt(line: str) -> None:
        (tmp_path / "tree" / "checkpoints" / "step-4").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.wait(interrupt)
    assert job.status == "Stopped"
    assert f"Its checkpoint is in {tmp_path / 'tree' / 'checkpoints'}" in capsys.readouterr().out
