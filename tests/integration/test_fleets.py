"""``launcher.fit_many``: fleets on the embedded SageMaker, on this machine, and on a platform that only takes time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import launcher
from benchmarks.fleet_simulation import simulate
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, UserError
from dreambooth_sm.fleet.outcome import FAILURE_NAME
from dreambooth_sm.manifest import MANIFEST_NAME
from dreambooth_sm.storage import S3Uri, list_objects, read_manifest, upload_directory
from launcher.aws.account import Account
from launcher.aws.lookup import Lookup
from launcher.cli import main
from launcher.fleets import fleet as fleets
from launcher.fleets.fleet import Fleet
from launcher.fleets.queue import Queue
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
def test_a_fleet_that_is_stopped_starts_nothing_whoever_follows_it_until_it_is_retried(
    services: EmbeddedServices, tiny_base: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("duck", "cat")):
        paint_pictures(tmp_path / name, 2, seed=number)
    options = {**OPTIONS, "base_model": tiny_base, "max_train_steps": 100_000, "subjects_per_job": 1, "parallel": 1}
    lines: list[str] = []
    fleet = launcher.fit_many(
        tmp_path, instance_type="ml.g5.xlarge", name="stopped-toys", wait=False, log=lines.append, **options
    )
    other = launcher.attach_fleet("stopped-toys", services.clients())
    assert isinstance(fleet, Fleet)
    assert isinstance(other, Fleet)
    other.stop(lines.append)
    assert lines[-1] == "stopped: stopped-toys-0001"
    fleet.wait(lines.append)
    status = fleet.status()
    assert status.jobs == {"stopped-toys-0001": "Stopped"}
    assert {*status.remaining} == {"cat", "duck"}
    other.advance(lines.append)
    assert other.status().jobs == status.jobs
    fleet.retry(lines.append)
    assert lines[-1].startswith("started: stopped-toys-0002")
    assert main(["attach_fleet", "stopped-toys", "--stop"]) == EXIT_OK
    assert {*fleet.status().jobs.values()} == {"Stopped"}


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
    assert isinstance(fleet, launcher.Fleet)
    for ask in (fleet.samples, fleet.job):
        with pytest.raises(UserError, match=r"toys has no subject 'cow'; status\(\) lists"):
            ask("cow")
    fleet.wait(lines.append)
    status = fleet.status()
    assert status.done == ("cat", "duck")
    assert "s3://toys-of-many/pictures/bad/00.png is not a picture" in status.failed["bad"]
    assert (status.running, status.remaining) == ((), ())
    assert status.jobs.keys() == {"toys-0001", "toys-0002"}
    assert status.latest in status.done
    assert fleet.job("cat").status == "Completed"
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


def test_all_subjects_end_and_none_twice_whatever_the_platform_does() -> None:
    """Throttling, quotas, lost and interrupted jobs, subjects that fail, processes that follow one after another."""
    simulated = simulate(2000, 40, seed=1, lost_jobs=0.1)
    assert (simulated["done"], simulated["trained_twice"]) == (2000, 0)
    assert min(simulated[each] for each in ("interruptions", "jobs_lost", "failed_at_first")) > 0
    assert simulated["processes"] > 1
    assert simulated["requests_a_subject"] <= 0.5
    # What the fleet says that it cost, against what the platform has billed.
    assert simulated["dollars"] == pytest.approx(simulated["dollars_billed"], rel=0.02)


def test_a_small_fleet_is_looked_at_now_and_then_and_soon_after_its_end() -> None:
    """In an account without trouble: few more than half as many looks as minutes; the end is seen in two of them."""
    calm = {"short": 0.0, "lost_jobs": 0.0, "failing": 0.0, "throttled": 0.0, "hours_to_interruption": 1e9}
    simulated = simulate(100, 10, seed=1, **calm)
    minutes = 60 * simulated["hours"]
    assert simulated["done"] == 100
    assert simulated["requests"]["s3.ListObjectsV2"] < 0.6 * minutes
    assert minutes < 60 * simulated["hours_without_trouble"] + 3


def test_an_account_that_is_short_of_instances_ends_them_as_well() -> None:
    """Each type has no capacity in 40 of 100 hours."""
    simulated = simulate(600, 20, seed=3, short=0.4)
    assert (simulated["done"], simulated["trained_twice"]) == (600, 0)
    assert simulated["jobs_without_capacity"] > 10


def test_a_fleet_all_of_whose_jobs_end_at_once_is_followed_until_it_is_known_why() -> None:
    """Throttled, the launcher learns a little later that there was no capacity."""
    simulated = simulate(300, 10, seed=8, short=0.4)
    assert (simulated["done"], simulated["trained_twice"]) == (300, 0)


def test_a_queue_ends_them_as_well() -> None:
    simulated = simulate(2000, 40, seed=1, queue=Queue("toys", "toys", attempts=3), lost_jobs=0.1)
    assert (simulated["done"], simulated["trained_twice"]) == (2000, 0)
    assert simulated["jobs_lost"] > 0
    assert simulated["jobs_without_capacity"] > 0
    assert simulated["requests_a_subject"] <= 0.5
    assert simulated["requests"]["batch.SubmitServiceJob"] < 1.2 * simulated["planned_jobs"]
    assert "sagemaker.CreateTrainingJob" not in simulated["requests"]


def test_folders_of_many_subjects_are_checked_by_few_requests(target: S3Uri, s3: EmbeddedS3) -> None:
    client, requests = s3.client(), list[str]()
    client.meta.events.register("before-call.s3", lambda model, **_: requests.append(model.name))
    for number in range(30):
        for name in ("1.png", "manifest.json") if number else ("manifest.json",):
            client.put_object(Bucket=target.bucket, Key=(target / f"toys/{number}/{name}").prefix, Body=b"x")
    places = [str(target / "toys" / str(number)) for number in range(30)]
    del requests[:]
    look = Lookup(lambda: client)
    look.look_ahead(places)
    assert len(requests) == 1
    assert all(look.find([place]).objects == ("1.png",) for place in places[1:])
    assert len(requests) == 1
    assert not look.find([places[0]]).objects
    with pytest.raises(UserError, match="there is nothing below"):
        look.find([str(target / "toys" / "30")])
    few = Lookup(lambda: client)
    few.look_ahead(places[:3])
    assert few.find(places[1:2]) == look.find(places[1:2])


def test_no_more_jobs_run_than_the_quota_allows(
    services: EmbeddedServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quotas = {f"ml.{each}.xlarge for training job usage": 2.0 for each in ("g5", "g6")}
    monkeypatch.setattr(Account, "_list_quotas", lambda self: quotas)
    paint_pictures(tmp_path / "duck", 4)
    how = {"instance_type": "ml.g5.xlarge", "base_model": "toybox", "parallel": 8, **OPTIONS}
    lines: list[str] = []
    launcher.check_many(tmp_path, alternatives=["ml.g6.xlarge"], log=lines.append, **how)
    assert any(line.startswith("or: ml.g6.xlarge (L4): a job of one subject about ") for line in lines)
    assert "quota: 4 jobs on ml.g5.xlarge and ml.g6.xlarge at a time, and not 8" in lines
    assert any(line.startswith("fleet: 1 subjects in 1 job of 1, 4 at a time") for line in lines)
    for wrong, words in (
        (["ml.g5.xlarge"], "is the instance type itself"),
        (["ml.g5.12xlarge"], "another number of cards"),
        (["ml.nothing"], "ml.nothing"),
        (["ml.g6.xlarge"] * 2, "each once"),
    ):
        with pytest.raises(UserError, match=words):
            launcher.check_many(tmp_path, alternatives=wrong, **how)
    with pytest.raises(UserError, match="for a fleet on SageMaker"):
        launcher.check_many(tmp_path, alternatives=["ml.g6.xlarge"], **OPTIONS)
