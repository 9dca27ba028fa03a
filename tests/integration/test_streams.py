"""A job whose output goes nowhere, or to a reader of ASCII alone, is a job like any other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_STOPPED
from launcher.local.program import ENTRYPOINT
from tests.helpers.jobs import JobTree, end, read_until

NO_CLASS = {"class_prompt": "None", "train_text_encoder": "false"}


def test_a_log_reader_that_goes_away_does_not_end_the_job(lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job(**NO_CLASS, max_train_steps="20")
    process = job.start("train")
    read_until(process, "^step=1 ")
    assert process.stdout is not None
    process.stdout.close()  # both streams of the job: whatever it writes from now on is EPIPE
    assert process.wait(120) == EXIT_OK
    assert (job.model / "model_index.json").is_file()
    assert job.failure is None


def test_a_full_disk_under_the_log_does_not_end_the_job(lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job(**NO_CLASS)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "SAGEMAKER_BASE_DIR": str(job.base), **job.environment}
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run([sys.executable, ENTRYPOINT, "train"], env=environment, stdout=full, stderr=full)
    assert ended.returncode == EXIT_OK
    assert (job.model / "model_index.json").is_file()


@pytest.mark.parametrize("bad", [False, True])
def test_streams_of_ascii(lay_out_job: Callable[..., JobTree], bad: bool) -> None:
    job = lay_out_job(
        **NO_CLASS,
        instance_prompt="фото zwx игрушки 🦆",
        model_name="café",
        learning_rate="schnell ü" if bad else "1e-3",
    )
    job.environment["PYTHONIOENCODING"] = "ascii"  # type: ignore[index]
    job.environment["LC_ALL"] = "C"  # type: ignore[index]
    ended = job.run("train")
    assert ended.code == (EXIT_BAD_INPUT if bad else EXIT_OK), ended.log
    assert ended.log.isascii()
    if bad:
        assert "schnell ü" in (job.failure or "")
    else:
        assert "model_name=caf\\xe9" in ended.log


@pytest.mark.usefixtures("terminal")
def test_a_closed_terminal_leaves_a_checkpoint(lay_out_job: Callable[..., JobTree]) -> None:
    job = lay_out_job(**NO_CLASS, max_train_steps="1000")
    process = job.start("train")
    log = read_until(process, "^step=2 ")
    process.send_signal(signal.SIGHUP)
    ended = end(process, log)
    assert ended.code == EXIT_STOPPED, ended.log
    (checkpoint,) = job.checkpoints
    (line,) = (line for line in ended.log.splitlines() if line.startswith("stopped: "))
    assert checkpoint in line
