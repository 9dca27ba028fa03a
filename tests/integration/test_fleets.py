"""``launcher.fit_many``: fleets on the embedded SageMaker, on this machine, and on a platform that only takes time."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

import launcher
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from dreambooth_sm.fleet.outcome import FAILURE_NAME, Failure
from dreambooth_sm.manifest import MANIFEST_NAME
from dreambooth_sm.storage import S3Uri, list_objects, put_object, read_manifest, upload_directory
from launcher.aws.clients import Clients
from launcher.cli import main
from launcher.fleets import fleet as fleets
from launcher.local.answers import RequestError
from launcher.local.s3 import EmbeddedS3
from launcher.local.services import EmbeddedServices
from tests.helpers.training import paint_pictures

OPTIONS: dict[str, Any] = {
    "instance_prompt": "photo of zwx toy",
    "resolution": 64,
    "center_crop": True,
    "max_train_steps": 1,
    "method": "lora",
    "lora_rank": 2,
    "seed": 7,
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_FIRST_WAIT", 0.01)


@pytest.mark.slow
def test_a_table_of_subjects_becomes_a_model_of_each(
    services: EmbeddedServices, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = S3Uri("toys-of-many")
    services.client().create_bucket(Bucket=bucket.bucket)
    for number, name in enumerate(("duck", "cat", "bad")):
        paint_pictures(tmp_path / name, 2, seed=number)
    (tmp_path / "bad" / "00.png").write_bytes(b"no picture")
    for name in ("cat", "bad"):
        upload_directory(tmp_path / name, bucket / "pictures" / name)
    with (tmp_path / "toys.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "images", "instance_prompt", "output"])
        rows.writerow(["duck", "duck", "", "s3://toys-of-many/own/duck"])
        rows.writerow(["bad", "s3://toys-of-many/pictures/bad", "photo of zwx bad", ""])
        rows.writerow(["cat", "s3://toys-of-many/pictures/cat", "photo of zwx cat", ""])
    refusals = [RequestError("1 instance of 1", "ResourceLimitExceeded"), RequestError("Rate", "ThrottlingException")]
    create = services.sagemaker.create

    def refusing(*arguments: Any, **named: Any) -> dict[str, Any]:
        if refusals:
            raise refusals.pop()
        return create(*arguments, **named)

    monkeypatch.setattr(services.sagemaker, "create", refusing)
    lines: list[str] = []
    key = "arn:aws:kms:us-east-1:123456789012:key/toys"
    place = {"role": services.role, "bucket": bucket.bucket, "kms": key}
    how = {"instance_type": "ml.g5.xlarge", "base_model": tiny_base, **place}
    started = launcher.fit_many(
        tmp_path / "toys.csv",
        parallel=1,
        subjects_per_job=2,
        name="toys",
        wait=False,
        log=lines.append,
        **how,
        **OPTIONS,
    )
    assert any(line.startswith("fleet: 3 subjects in 2 jobs of 1 or 2, 1 at a time") for line in lines)
    assert any(line.startswith("cost: about $") for line in lines)
    assert any("is not taken now" in line for line in lines)
    assert isinstance(started, launcher.Fleet)

    fleet = launcher.attach_fleet("s3://toys-of-many/dreambooth-sm/fleets/toys", services.clients())
    fleet.wait(lines.append)
    status = fleet.status()
    assert status.done == ("cat", "duck")
    assert "00.png" in status.failed["bad"]
    assert (status.running, status.remaining) == ((), ())
    assert status.jobs.keys() == {"toys-0001", "toys-0002"}
    models = fleet.models()
    assert models["duck"] == "s3://toys-of-many/own/duck"
    for model in models.values():
        assert read_manifest(S3Uri.parse(model)).step == 1
        uri = S3Uri.parse(model) / MANIFEST_NAME
        assert services.client().head_object(Bucket=uri.bucket, Key=uri.prefix)["SSEKMSKeyId"] == key

    paint_pictures(tmp_path / "better", 2, seed=5)
    upload_directory(tmp_path / "better", bucket / "pictures" / "bad")
    assert fleet.retry(lines.append).status().remaining == ()
    assert fleet.status().failed, "the input was wrong, and is tried when it is asked for"
    fleet.retry(lines.append, bad_input=True).wait(lines.append)
    assert set(fleet.status().done) == {"bad", "cat", "duck"}
    assert FAILURE_NAME not in list_objects(S3Uri.parse(fleet.models()["bad"]))


@pytest.mark.slow
def test_folders_become_models_on_this_machine(s3: EmbeddedS3, tiny_base: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("duck", "cat")):
        paint_pictures(tmp_path / "toys" / name, 2, seed=number)
    fleet = launcher.fit_many(
        tmp_path / "toys", base_model=tiny_base, directory=tmp_path / "job", log=lambda line: None, **OPTIONS
    )
    assert fleet.status().done == ("cat", "duck")
    assert sorted(fleet.models()) == ["cat", "duck"]
    again = launcher.attach_fleet(tmp_path / "job")
    assert again.status().done == ("cat", "duck")
    for place in again.models().values():
        assert (Path(place) / MANIFEST_NAME).is_file()


def test_all_that_is_wrong_with_any_subject_is_told_at_once(tmp_path: Path) -> None:
    for name in ("good", "bad", "empty"):
        (tmp_path / name).mkdir()
    paint_pictures(tmp_path / "good", 4)
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    subjects = [
        {"id": "good", "images": tmp_path / "good"},
        {"id": "bad", "images": tmp_path / "bad", "learning_rate": "much"},
        {"id": "empty", "images": tmp_path / "empty"},
        {"id": "gone", "images": tmp_path / "gone"},
    ]
    with pytest.raises(UserError) as caught:
        launcher.fit_many(subjects, resolution_=3, **OPTIONS)
    assert "resolution_" in str(caught.value)
    with pytest.raises(UserError) as caught:
        launcher.fit_many(subjects, directory=tmp_path / "job", **OPTIONS)
    told = caught.value.problems
    for name, words in (("bad", "learning_rate"), ("empty", "pictures"), ("gone", "is not a folder")):
        assert any(problem.startswith(f"{name}: ") and words in problem for problem in told), name
    assert not [problem for problem in told if problem.startswith("good")]
    assert not (tmp_path / "job").exists()
    lines: list[str] = []
    launcher.check_many(subjects, skip_bad=True, log=lines.append, **OPTIONS)
    assert lines[0].startswith("fleet: 1 subjects")
    assert sum(line.startswith("left out: ") for line in lines) >= 3


def test_the_command_line_says_what_a_fleet_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("duck", "cat"):
        paint_pictures(tmp_path / name, 4)
    (tmp_path / "odd").mkdir()
    words = [str(tmp_path), "--instance_prompt", "photo of zwx toy", "--resolution", "64", "--dry_run"]
    assert main(["fleet", *words]) == EXIT_BAD_INPUT
    assert "odd: " in capsys.readouterr().err
    assert main(["fleet", *words, "--skip_bad"]) == EXIT_OK
    assert capsys.readouterr().out.startswith("fleet: 2 subjects")
    assert main(["attach_fleet", str(tmp_path)]) == EXIT_BAD_INPUT


class Platform:
    """SageMaker whose jobs only take time: two looks each. It has room for some at once, and faults."""

    class meta:  # noqa: N801
        region_name = "us-east-1"

    def __init__(self, root: S3Uri, s3: Any, room: int) -> None:
        self.root, self.s3, self.room = root, s3, room
        self.jobs: dict[str, dict[str, Any]] = {}
        self.trained: Counter[str] = Counter()
        self.calls = 0
        self.faults = itertools.cycle(["ThrottlingException", None, None, "ResourceLimitExceeded", None])

    def create_training_job(self, **request: Any) -> dict[str, Any]:
        self.calls += 1
        name = request["TrainingJobName"]
        running = sum(job["TrainingJobStatus"] == "InProgress" for job in self.jobs.values())
        fault = "ResourceLimitExceeded" if running >= self.room else next(self.faults)
        fault = "ResourceInUse" if name in self.jobs else fault
        if fault:
            raise ClientError({"Error": {"Code": fault, "Message": "no"}}, "CreateTrainingJob")
        (channel,) = request["InputDataConfig"]
        uri = S3Uri.parse(channel["DataSource"]["S3DataSource"]["S3Uri"])
        lines = self.s3.get_object(Bucket=uri.bucket, Key=f"{uri.prefix}/fleet.jsonl")["Body"].read().decode()
        subjects = [json.loads(line)["id"] for line in lines.splitlines()]
        self.jobs[name] = {"TrainingJobName": name, "TrainingJobStatus": "InProgress", "subjects": subjects, "age": 0}
        return {}

    def describe_training_job(self, TrainingJobName: str) -> dict[str, Any]:  # noqa: N803
        self.calls += 1
        return self.jobs[TrainingJobName]

    def get_paginator(self, operation: str) -> Any:
        assert operation == "list_training_jobs"
        return self

    def paginate(self, **named: Any) -> Iterator[dict[str, Any]]:
        self.calls += -(-len(self.jobs) // 100) or 1
        for job in self.jobs.values():
            self._look_at(job)
        yield {"TrainingJobSummaries": list(self.jobs.values())}

    def _look_at(self, job: dict[str, Any]) -> None:
        job["age"] += 1
        if job["age"] != 2:
            return
        number = len([1 for each in self.jobs.values() if each["age"] >= 2])
        done = job["subjects"][: 1 if number % 7 == 0 else None]
        for subject in done:
            self.trained[subject] += 1
            if subject.endswith("13") and self.trained[subject] == 1:
                failure = Failure(subject, "a fault", False, job["TrainingJobName"])
                put_object(self.root / "outcomes" / subject / FAILURE_NAME, failure.to_json().encode(), client=self.s3)
            else:
                put_object(self.root / "outcomes" / subject / MANIFEST_NAME, b"{}", client=self.s3)
        whole = len(done) == len(job["subjects"])
        job["TrainingJobStatus"] = "Completed" if whole else "Failed"
        job["FailureReason"] = "" if whole else "CapacityError: Unable to provision requested ML compute capacity"


class PlatformClients(Clients):
    def __init__(self, platform: Platform) -> None:
        super().__init__()
        self.platform = platform

    def __call__(self, service: str) -> Any:
        return self.platform if service == "sagemaker" else self.platform.s3

    def is_local(self, service: str) -> bool:
        return True


def test_all_subjects_end_and_none_twice_whatever_the_platform_does(s3: EmbeddedS3, target: S3Uri) -> None:
    """Throttling, quotas, jobs that lose their capacity, and processes that follow one after another."""
    root = target / "fleets" / "many"
    request = {
        "TrainingJobName": "many",
        "HyperParameters": {"fleet": "/opt/ml/input/data/fleet/fleet.jsonl"},
        "InputDataConfig": [{"ChannelName": "fleet", "DataSource": {"S3DataSource": {"S3Uri": f"{root}/jobs/many/"}}}],
        "CheckpointConfig": {"S3Uri": "s3://x/y"},
    }
    client = s3.client()
    for name, first in zip(fleets.job_names("many", 12), range(0, 240, 20), strict=True):
        lines = [json.dumps({"id": f"s{n:03}", "images": "x"}) for n in range(first, first + 20)]
        put_object(root / "jobs" / name / "fleet.jsonl", "\n".join(lines).encode(), client=client)
    state = {"name": "many", "parallel": 5, "models": str(root / "models"), "request": request}
    put_object(root / "fleet.json", json.dumps(state).encode(), client=client)
    platform = Platform(root, client, room=3)
    for _ in range(3):  # each process looks at it, starts something, and goes away
        launcher.Fleet(root, PlatformClients(platform)).advance()
    lines: list[str] = []
    fleet = launcher.Fleet(root, PlatformClients(platform)).wait(lines.append)
    status = fleet.status()
    assert len(status.done) + len(status.failed) == 240
    assert {*status.failed} == {"s013", "s113", "s213"}
    assert status.failed["s013"] == "a fault"
    assert any(job.startswith("many-r1-") for job in status.jobs), "what was lost with its capacity is tried again"
    assert set(platform.trained.values()) == {1}
    fleet.retry(lines.append).wait(lines.append)
    assert len(fleet.status().done) == 240
    assert {subject for subject, times in platform.trained.items() if times > 1} == {"s013", "s113", "s213"}
    assert platform.calls / 240 <= 0.5
    assert all(job["age"] >= 2 for job in platform.jobs.values())
