"""What a job needs for its trackers, and what it tells them; the trackers themselves are in tests/integration."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import pytest

from dreambooth_sm.context import Context
from dreambooth_sm.distributed import World
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import CPU
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.preflight import check_trackers
from dreambooth_sm.report import Record, Reporter, ValidationPicture
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.trackers import told
from dreambooth_sm.trackers.kinds import TrackedRun, Tracker
from dreambooth_sm.trackers.needs import find_missing_packages, find_missing_settings
from dreambooth_sm.trackers.told import measures_of, run_of, settings_of, told_trackers
from launcher.local.s3 import EmbeddedS3

SERVER = "arn:aws:sagemaker:us-west-2:123456789012:mlflow-tracking-server/toys"


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({"instance_prompt": "photo of zwx toy", **values})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"report_to": "comet"}, "set one or more of them"),
        ({"report_to": "mlflow", "mlflow_tracking_uri": "https://me:xyzzy-1@mlflow"}, "tracker_secret"),
        ({"report_to": "mlflow", "mlflow_tracking_uri": "mlruns"}, "set https://host"),
        ({"report_to": "wandb", "mlflow_tracking_uri": "https://mlflow"}, "add mlflow to report_to"),
        ({"report_to": "tensorboard", "tracker_secret": "keys"}, "add one of them"),
        ({"report_to": "wandb", "tracker_secret": "0123456789abcdef" * 3}, "revoke it"),
        ({"report_to": "wandb", "tracking_project": "a/b"}, "is not a name"),
    ],
)
def test_what_no_tracker_could_take_is_refused(values: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse(**values)
    assert "xyzzy" not in str(caught.value)
    assert "0123456789abcdef" not in str(caught.value)


def test_several_trackers_are_named_with_commas() -> None:
    assert parse(report_to=" tensorboard,mlflow, tensorboard").trackers == ("tensorboard", "mlflow")
    assert parse().trackers == ()


@pytest.mark.parametrize(
    ("values", "environment", "needed"),
    [
        ({"report_to": "tensorboard"}, {}, []),
        ({"report_to": "mlflow,wandb"}, {}, ["mlflow_tracking_uri", "tracker_secret"]),
        ({"report_to": "mlflow,wandb"}, {"MLFLOW_TRACKING_URI": "https://m", "WANDB_MODE": "offline"}, []),
        ({"report_to": "mlflow,wandb", "mlflow_tracking_uri": SERVER, "tracker_secret": "keys"}, {}, []),
        ({"report_to": "wandb"}, {"WANDB_API_KEY": "of this machine"}, []),
    ],
)
def test_what_a_tracker_needs_is_said(
    values: dict[str, str], environment: dict[str, str], needed: Sequence[str]
) -> None:
    found = list(find_missing_settings(parse(**values), environment))
    assert len(found) == len(needed)
    assert all(name in line for name, line in zip(needed, found, strict=True))


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as W&B leaves it where it ran; that is not a package
    monkeypatch.syspath_prepend(tmp_path)
    if any(found and found.origin for found in map(find_spec, ("mlflow", "wandb", "sagemaker_mlflow"))):
        pytest.skip("trackers are installed here")
    h = parse(report_to="tensorboard,mlflow,wandb", mlflow_tracking_uri=SERVER, tracker_secret="keys")
    found = list(find_missing_packages(h, {}))
    assert [line.split()[1] for line in found] == ["mlflow", "wandb", "sagemaker-mlflow"]
    assert "WITH_WANDB=1" in found[1]
    assert "dreambooth-sm[mlflow]" in found[2]


def test_keys_come_from_secrets_manager_alone(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    client = boto3.client("secretsmanager")
    client.create_secret(Name="plain-key", SecretString="a-key-of-wandb\n")
    both = {"WANDB_API_KEY": "another-key-of-wandb", "MLFLOW_TRACKING_TOKEN": "a-token-of-mlflow", "PATH": "/nowhere"}
    client.create_secret(Name="both", SecretString=json.dumps(both))
    client.create_secret(Name="neither", SecretString='{"KEY": "of something else"}')
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "before")
    path = os.environ["PATH"]
    for secret, key in (("plain-key", "a-key-of-wandb"), ("both", both["WANDB_API_KEY"])):
        with pytest.raises(UserError, match="wandb is not installed") if not find_spec("wandb") else ExitStack():
            check_trackers(parse(report_to="wandb", tracker_secret=secret), World())
        assert os.environ["WANDB_API_KEY"] == key
    assert os.environ["MLFLOW_TRACKING_TOKEN"] == both["MLFLOW_TRACKING_TOKEN"]
    assert os.environ["PATH"] == path
    report = Reporter(io.StringIO())
    report.warn(f"the server says: {both['WANDB_API_KEY']}")
    assert both["WANDB_API_KEY"] not in report.stream.getvalue()  # type: ignore[attr-defined]
    for secret, said in (("neither", "WANDB_API_KEY"), ("missing", "GetSecretValue")):
        with pytest.raises(UserError, match=said) as caught:
            check_trackers(parse(report_to="wandb", tracker_secret=secret), World())
        assert "something else" not in str(caught.value)


def test_measures_are_told_with_their_steps() -> None:
    row = {"step": 20, "loss": 0.5, "lr": 1e-4, "steps_per_s": 3.0, "vram_gb": 7}
    told_row = {"train/loss": 0.5, "train/lr": 1e-4, "train/steps_per_s": 3.0, "train/vram_gb": 7.0}
    assert measures_of(row) == (20, told_row)
    assert measures_of({"candidate": 20, "score": 0.25}) == (20, {"fidelity/score": 0.25})
    for other in ({"checkpoint": "/opt/ml", "step": 20}, {"progress": "steps", "done": 1}, {"best": 20, "score": 0.5}):
        assert measures_of(other) == (0, {})


class Noted(Tracker):
    """Notes what it is told."""

    name = "tensorboard"

    def __init__(self) -> None:
        self.said: list[Any] = []

    def start(self, run: TrackedRun, settings: Mapping[str, bool | float | str]) -> str:
        self.said.append(("start", run.id, run.step))
        return run.id or run.name

    def measure(self, values: Mapping[str, float], step: int) -> None:
        self.said.append((step, dict(values)))

    def show(self, pictures: Sequence[ValidationPicture]) -> None:
        self.said.append([picture.prompt for picture in pictures])

    def report(self, facts: Mapping[str, Any], directory: Path) -> None:
        self.said.append(facts)

    def finish(self, code: int) -> None:
        self.said.append(("finish", code))


def job(tmp_path: Path, report: Reporter | None = None, **values: object) -> Context:
    h = parse(report_to="tensorboard", **values)
    report = report or Reporter(io.StringIO())
    return Context(h, h, Contract(tmp_path), World(), report, threading.Event(), ExitStack())


def tell(job: Context, step: int = 0, stop: bool = False) -> None:
    with told_trackers(job, make_plan(job.h, CPU), step):
        job.report.metrics(step=step + 1, loss=0.5)
        job.report.drew([ValidationPicture(step + 1, "a toy", 0, Path("picture.png"))])
        if stop:
            raise StopRequested("as asked")
        job.report.finish({"verdicts": []}, Path())


def test_a_tracker_is_told_everything_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted()
    monkeypatch.setitem(told.TRACKERS, "tensorboard", lambda: noted)
    first = job(tmp_path)
    with pytest.raises(StopRequested):
        tell(first, stop=True)
    name = "aws-trained-dreambooth-model"
    assert noted.said == [("start", None, 0), (1, {"train/loss": 0.5}), ["a toy"], ("finish", 143)]
    assert first.report.runs == {"tensorboard": name}
    assert not first.report.listeners
    # The next attempt continues the run that the checkpoint names.
    record = first.report.record(1) | {"samples": []}
    assert Record.model_validate_json(json.dumps(record)).runs == {"tensorboard": name}
    second = job(tmp_path, Reporter(io.StringIO()))
    second.report.resume(record, 1, tmp_path)
    noted.said.clear()
    tell(second, 1)
    assert noted.said == [("start", name, 1), (2, {"train/loss": 0.5}), ["a toy"], {"verdicts": []}, ("finish", 0)]


@pytest.mark.parametrize("where", ["__init__", "start", "measure", "show", "report", "finish"])
def test_a_tracker_that_fails_costs_one_warning(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Noted):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to\nthe server")

    setattr(Failing, where, fail)
    monkeypatch.setitem(told.TRACKERS, "tensorboard", Failing)
    failing = job(tmp_path)
    tell(failing)
    tell(failing, 1)
    lines = failing.report.stream.getvalue().splitlines()  # type: ignore[attr-defined]
    warnings = [line for line in lines if "ConnectionError" in line]
    assert len(warnings) == 2, "one an attempt"
    assert all(line.startswith("warning: tensorboard is") for line in warnings)
    assert sum(line.startswith("step=") for line in lines) == 2


def test_a_tracker_that_hangs_does_not_keep_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    class Hanging(Noted):
        def measure(self, values: Mapping[str, float], step: int) -> None:
            released.wait()

    monkeypatch.setattr(told, "_LONGEST_WAIT", 0.1)
    monkeypatch.setitem(told.TRACKERS, "tensorboard", Hanging)
    hanging = job(tmp_path)
    tell(hanging)
    assert "before the job's end" in hanging.report.stream.getvalue()  # type: ignore[attr-defined]
    released.set()


def test_other_processes_than_the_main_one_tell_nobody(tmp_path: Path) -> None:
    other = replace(job(tmp_path), world=World(rank=1, size=2))
    with told_trackers(other, make_plan(other.h, CPU), 0):
        assert not other.report.listeners


def test_ids_that_a_checkpoint_could_not_hold_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Noted):
        def start(self, run: TrackedRun, settings: Mapping[str, bool | float | str]) -> str:
            return "../odd id"

    monkeypatch.setitem(told.TRACKERS, "tensorboard", Odd)
    odd = job(tmp_path)
    tell(odd)
    assert odd.report.runs == {}
    assert "runs" not in odd.report.record(1)


def test_runs_are_named_by_job_subject_or_model(tmp_path: Path) -> None:
    plain = job(tmp_path, model_name="My Toy: red/blue")
    assert run_of(plain, "tensorboard", 0, tmp_path).name == "My-Toy-red-blue"
    assert run_of(plain, "tensorboard", 0, tmp_path).events == tmp_path / "output" / "tensorboard"
    plain.contract = replace(plain.contract, job_name="toy-1")
    assert run_of(plain, "tensorboard", 0, tmp_path).name == "toy-1"
    plain.contract = replace(plain.contract, subject="duck")
    assert run_of(plain, "tensorboard", 0, tmp_path).name == "duck"
    plain.contract = replace(plain.contract, base=tmp_path / "missing")
    plain.h = plain.h.moved({"models_path": str(tmp_path / "out" / "model")})
    assert run_of(plain, "tensorboard", 0, tmp_path).events == tmp_path / "out" / "tensorboard"


def test_settings_are_numbers_and_texts_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a secret of this machine")
    told_job = job(tmp_path, class_prompt="a secret of this machine", learning_rate=1e-4, seed=3)
    settings = settings_of(told_job, make_plan(told_job.h, CPU))
    assert (settings["learning_rate"], settings["seed"], settings["instance_prompt"]) == (1e-4, 3, "photo of zwx toy")
    assert settings["class_prompt"] == "***"
    assert settings["plan.device"] == "cpu"
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())
    assert "lora_rank" not in settings, "of another method"
