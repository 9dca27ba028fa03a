"""Trackers, for real: TensorBoard's events by its own reader, an MLflow server, W&B without a network."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.context import Context
from dreambooth_sm.distributed import World
from dreambooth_sm.errors import EXIT_BAD_INPUT
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import CPU
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.sagemaker import Contract
from dreambooth_sm.storage import download_directory
from dreambooth_sm.trackers.told import told_trackers
from launcher.local.services import embedded_services
from tests.helpers.jobs import JobTree
from tests.helpers.services import Workplace, eventually

ROOT = Path(__file__).parents[2]
# `make test` makes this environment.
BIN = ROOT / ".venv-trackers" / "bin"
STEPS = 24


def events_of(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.fixture
def workplace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with embedded_services() as services:
        yield Workplace(services)


def test_tensorboards_events_are_in_s3_while_a_job_runs_and_go_on_after_an_interruption(
    workplace: Workplace, pictures: Path, tiny_base: Path, tmp_path: Path
) -> None:
    told = {"class_prompt": "None", "report_to": "tensorboard", "validation_prompt": "a toy|a red toy"}
    job = workplace.train(
        pictures,
        tiny_base,
        {**told, "validation_guidance_scale": "1", "max_train_steps": str(STEPS), "save_steps": "4"},
        EnableManagedSpotTraining=True,
        StoppingCondition={"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 900},
        CheckpointConfig={"S3Uri": str(workplace.bucket / "checkpoints")},
        TensorBoardOutputConfig={"S3OutputPath": str(workplace.bucket / "events")},
    )
    lines = job.logs(follow=True)
    next(line for line in lines if line.startswith("checkpoint="))
    eventually(lambda: workplace.keys("checkpoints") and workplace.keys("events"))
    assert job.status == "InProgress"
    workplace.services.sagemaker.interrupt(job.name)
    rest = list(lines)
    assert any(line.startswith("resumed after step") for line in rest)
    assert not [line for line in rest if line.startswith("warning: tensorboard")]
    assert job.events_uri == str(workplace.bucket / "events" / job.name / "tensorboard-output")
    download_directory(workplace.bucket / "events" / job.name, tmp_path, client=workplace.clients("s3"))
    events = events_of(tmp_path / "tensorboard-output" / job.name)
    assert len(list((tmp_path / "tensorboard-output" / job.name).iterdir())) == 2, "a file an attempt"
    logged = {entry["step"]: entry for entry in job.history()}
    for name in ("loss", "lr", "steps_per_s", "vram_gb"):
        points = events.Scalars(f"train/{name}")
        assert [point.step for point in points] == list(range(1, STEPS + 1)), name
        last = [float(f"{point.value:.4g}") for point in points]
        assert name == "steps_per_s" or last == pytest.approx([logged[step][name] for step in logged], rel=1e-3)
    for prompt in ("a toy", "a red toy"):
        assert [picture.step for picture in events.Images(f"samples/{prompt}")] == [0, STEPS]
    (card,) = events.Tensors("report/text_summary")
    assert b"aws-trained-dreambooth-model" in card.tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


def test_a_job_that_is_interrupted_before_its_first_checkpoint_replaces_what_it_told(tmp_path: Path) -> None:
    h = Hyperparameters.parse({"instance_prompt": "photo of zwx toy", "report_to": "tensorboard"})
    for factor, last in ((1.0, 2), (10.0, 3)):
        report = Reporter(io.StringIO())
        job = Context(h, h, Contract(tmp_path, job_name="toy"), World(), report, threading.Event(), ExitStack())
        with told_trackers(job, make_plan(h, CPU), 0):
            for step in range(1, last + 1):
                report.metrics(step=step, loss=factor * step)
    points = events_of(tmp_path / "output" / "tensorboard" / "toy").Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 10.0), (2, 20.0), (3, 30.0)]


def test_a_tracker_that_is_missing_ends_the_job_before_anything_else(lay_out_job: Callable[..., JobTree]) -> None:
    if (found := find_spec("wandb")) and found.origin:
        pytest.skip("wandb is installed here")
    tree = lay_out_job(report_to="wandb")
    ended = replace(tree, environment={**tree.environment, "WANDB_MODE": "offline"}).run()
    assert ended.code == EXIT_BAD_INPUT
    assert "report_to=wandb: wandb is not installed here; build the image with --build-arg WITH_WANDB=1" in ended.log
    assert "load_base" not in ended.log


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An MLflow server with a database of its own, and its process."""
    if not (BIN / "mlflow").exists():
        pytest.skip(f"{BIN.parent.name} is missing: `make {BIN.parent.name}/.installed` makes it")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    places = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [BIN / "mlflow", "server", *places, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            env={**os.environ, **quiet},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            process_group=0,
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: server.poll() is not None or _answers(f"{uri}/health"))
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        yield uri, server
    finally:
        _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, 9)
    server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(uri: str, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{uri}/api/2.0/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_mlflow_and_wandb_have_what_a_job_tells(
    mlflow_server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    uri, server = mlflow_server
    directory = tmp_path / "job"
    directory.mkdir()
    more = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    script = ROOT / "tests" / "helpers" / "tell_trackers.py"
    telling = subprocess.Popen(
        [BIN / "python", script, directory, uri],
        env={**os.environ, **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert telling.stdin is not None
    assert telling.stdout is not None
    try:
        line = telling.stdout.readline()
        assert line == "told\n", (line, telling.communicate())
        _mlflow_has_it(uri)
        _end(server)
        output, errors = telling.communicate("gone\n")
    finally:
        telling.kill()
    assert telling.returncode == 0, errors
    assert "warning" not in errors, errors
    answer = json.loads(output.splitlines()[-1])
    assert answer["runs"][0] == answer["runs"][1]
    (warned,) = answer["warned"]
    assert warned.startswith("warning: mlflow is not told everything: ")
    _wandb_has_it(answer["wandb"], answer["runs"][0]["wandb"])


def _mlflow_has_it(uri: str) -> None:
    (experiment,) = [
        each
        for each in ask(uri, "mlflow/experiments/search?max_results=10")["experiments"]
        if each["name"] == "dreambooth-sm"
    ]
    (run,) = ask(uri, "mlflow/runs/search", {"experiment_ids": [experiment["experiment_id"]]})["runs"]
    assert (run["info"]["run_name"], run["info"]["status"]) == ("toy-1", "FINISHED")
    settings = {each["key"]: each["value"] for each in run["data"]["params"]}
    assert (settings["instance_prompt"], settings["seed"], settings["plan.device"]) == ("photo of zwx toy", "3", "cpu")
    assert {"key": "verdict_1", "value": "good"} in run["data"]["tags"]
    identity = f"run_id={run['info']['run_id']}"
    points = ask(uri, f"mlflow/metrics/get-history?{identity}&metric_key=train/loss")["metrics"]
    assert {(point["step"], round(point["value"], 4)) for point in points} == {
        (n, round(1 / n, 4)) for n in (1, 2, 3, 4)
    }
    (score,) = ask(uri, f"mlflow/metrics/get-history?{identity}&metric_key=fidelity/score")["metrics"]
    assert (score["step"], score["value"]) == (4, 0.5)
    files = {
        file["path"]
        for folder in ("samples", "report")
        for file in ask(uri, f"mlflow/artifacts/list?{identity}&path={folder}")["files"]
    }
    assert {Path(file).name for file in files if file.startswith("report/")} == {"report.html", "report.json"}
    steps = [re.match(r"samples/step-(\d+)-", file) for file in sorted(files) if file.startswith("samples/")]
    assert [int(found[1]) for found in steps if found] == [0, 4]


def _wandb_has_it(kept: list[dict[str, Any]], run: str) -> None:
    first, second = kept
    assert {(each["id"], each["project"]) for each in kept} == {(run, "dreambooth-sm")}
    assert first["name"] == "toy-1"
    assert (first["exit"], second["exit"]) == (143, 0)
    assert first["config"]["instance_prompt"] == "photo of zwx toy"
    losses = [[(row["step"], row["train/loss"]) for row in each["history"] if "train/loss" in row] for each in kept]
    assert losses == [[(n, 1 / n) for n in (1, 2, 3)], [(n, 1 / n) for n in (3, 4)]]
    for each, step in ((first, 0), (second, 4)):
        (shown,) = [row for row in each["history"] if any(name.startswith("samples/a toy") for name in row)]
        assert shown["step"] == step
        assert "a toy" in json.dumps(shown)
    assert [row["step"] for row in second["history"] if any(name.startswith("report") for name in row)] == [4]
