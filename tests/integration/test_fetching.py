"""Base models that are fetched while the job imports and checks: by processes that end with the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_STOPPED, UserError
from dreambooth_sm.fetching import WantedBase, fetch, fetching
from dreambooth_sm.storage import S3Uri
from tests.helpers.hub import Hub
from tests.helpers.jobs import JobTree, end, read_until
from tests.helpers.patience import PATIENCE
from tests.helpers.training import hyperparameters

ROOT = Path(__file__).parents[2]
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
VAE = "vae/diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def home(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "home"


def unfinished(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.suffix in (".incomplete", ".unchecked", ".partial")]


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_model_is_on_its_way_before_somebody_waits_for_it(hub: Hub, home: Path, tiny_base: Path) -> None:
    h = hyperparameters(pretrained_model_name_or_path="owner/model")
    with fetching(h):
        wait_for(lambda: UNET in hub.sent)
        found = fetch(WantedBase.of(h).model)
    assert found.is_relative_to(home)
    assert (found / UNET).read_bytes() == (tiny_base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert len(hub.sent) == len(set(hub.sent))


def test_what_is_wrong_is_told_where_it_is_waited_for(hub: Hub, home: Path) -> None:
    h = hyperparameters(pretrained_model_name_or_path="owner/model", variant="ema")
    with fetching(h), pytest.raises(UserError) as ahead:
        fetch(WantedBase.of(h).model)
    assert "variant=ema" in str(ahead.value)
    other = hyperparameters(pretrained_model_name_or_path="owner/model", pretrained_vae_name_or_path="owner/no-vae")
    vae = WantedBase.of(other).vae
    assert vae
    with (
        fetching(other),
        pytest.raises(UserError, match=r"owner/no-vae can't be loaded .*HF_TOKEN"),
    ):
        fetch(vae)


def test_what_nobody_waits_for_is_stopped_and_leaves_nothing_unfinished(hub: Hub, home: Path) -> None:
    hub.stuck.add(UNET)
    h = hyperparameters(pretrained_model_name_or_path="owner/model")
    with fetching(h):
        wait_for(lambda: unfinished(home) and [*home.rglob(VAE)])
    assert not unfinished(home)
    hub.moves.set()
    with fetching(h):
        assert (fetch(WantedBase.of(h).model) / UNET).is_file()
    assert hub.sent.count(VAE) == 1  # what was whole is kept


@pytest.fixture
def slow_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Uri]:
    """A model that takes minutes to come, on a server of its own."""
    file = tmp_path / "bucket" / "model" / "model.safetensors"
    file.parent.mkdir(parents=True)
    with file.open("wb") as stream:
        stream.truncate(200 * 2**20)
    (file.parent / "notes.txt").write_text("small, and whole at once")
    command = [sys.executable, "-m", "benchmarks.null_s3", "--directory", str(tmp_path), "--mb-per-s", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        for name, value in {
            "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tmp_path / "warm"),
        }.items():
            monkeypatch.setenv(name, value)
        yield S3Uri.parse("s3://bucket/model")
        server.terminate()


def test_a_model_from_s3_that_nobody_waits_for_leaves_nothing(slow_s3: S3Uri, tmp_path: Path) -> None:
    with fetching(hyperparameters(pretrained_model_name_or_path=str(slow_s3))):
        wait_for(lambda: [path for path in unfinished(tmp_path / "warm") if path.is_file() and path.stat().st_blocks])
    assert not unfinished(tmp_path / "warm")


@pytest.mark.slow
def test_a_job_with_bad_input_waits_for_no_model(hub: Hub, home: Path, tmp_path: Path) -> None:
    hub.stuck.add(UNET)
    (tmp_path / "empty").mkdir()
    job = JobTree.lay_out(
        tmp_path / "opt-ml",
        {"pretrained_model_name_or_path": "owner/model"},
        {"images": tmp_path / "empty"},
        {name: os.environ[name] for name in hub.environment(home)},
    )
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert job.failure
    assert "instance_data_dir" in job.failure
    assert not unfinished(home)
    assert not hub.moves.is_set()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_that_is_stopped_waits_for_no_model(
    slow_s3: S3Uri, tmp_path: Path, pictures: Path, processes: int
) -> None:
    job = JobTree.lay_out(
        tmp_path / "opt-ml",
        {"pretrained_model_name_or_path": str(slow_s3), "num_processes": str(processes)},
        {"images": pictures},
        {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "SAGEMAKER_"))},
    )
    process = job.start("train")
    log = read_until(process, r"^phase=load_base state=started")
    wait_for(lambda: unfinished(tmp_path / "warm"))
    process.send_signal(signal.SIGTERM)
    ended = end(process, log)  # of a file that takes three minutes
    assert ended.code == EXIT_STOPPED, ended.log
    assert "stopped: before training began" in ended.log
    assert job.failure is None
    assert not unfinished(tmp_path / "warm")
