"""Jobs as a process of this machine: the container's entrypoint on an ``/opt/ml`` tree of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from dreambooth_sm.errors import UserError
from dreambooth_sm.report import parse_metrics

if TYPE_CHECKING:
    from dreambooth_sm.embedded import EmbeddedS3

ENTRYPOINT = Path(__file__).parents[1] / "container" / "train.py"


class JobFailed(RuntimeError):  # noqa: N818 - what the caller wants to catch reads like this
    """A job that ended without a model; the message is the reason that the job gave."""


@dataclass(frozen=True)
class TrainingJob:
    """A finished job.

    Attributes:
        model: where the trained pipeline lies: ``s3://...`` or a local directory.
        directory: the job's ``/opt/ml`` tree.
        metrics: one entry for each metric line of training, names to numbers.
        seconds: wall-clock seconds of each phase, in order.
    """

    model: str
    directory: Path
    metrics: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run_locally(
    hyperparameters: Mapping[str, str],
    channels: Mapping[str, str],
    *,
    directory: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> TrainingJob:
    """Lays out the tree that SageMaker mounts, runs the entrypoint on it and follows its log.

    Args:
        hyperparameters: as the request to SageMaker would hold them: every value a string.
        channels: name to ``s3://`` prefix or local folder.
        directory: root of the tree; a new temporary directory if None.

    Raises:
        UserError: where the entrypoint is not here, or a channel can't be read.
        JobFailed: with the job's reason.
    """
    if not ENTRYPOINT.is_file():
        raise UserError(f"{ENTRYPOINT} is missing: local jobs need a checkout of the project (pip install -e .)")
    base = Path(directory) if directory else Path(tempfile.mkdtemp(prefix="dreambooth-sm-"))
    base = base.resolve()
    lay_out(base, hyperparameters, channels)
    metrics: list[dict[str, float]] = []
    seconds: dict[str, float] = {}
    process = subprocess.Popen(
        [sys.executable, "-u", str(ENTRYPOINT), "train"],
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(base), "TRAINING_JOB_NAME": base.name},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log(line.rstrip("\n"))
            pairs = parse_metrics(line)
            if "step" in pairs and "loss" in pairs:
                metrics.append({name: float(value) for name, value in pairs.items()})
            elif pairs.get("state") == "ended":
                seconds[pairs["phase"]] = float(pairs["seconds"])
        code = process.wait()
    finally:
        if process.poll() is None:  # interrupted here: the job saves a checkpoint and ends
            process.terminate()
            process.communicate()  # reads what it still says: a full pipe would keep it from ending
    if code != 0:
        failure = base / "output" / "failure"
        raise JobFailed(failure.read_text() if failure.is_file() else f"the job ended with exit code {code}")
    model = hyperparameters.get("manual_upload_model_path") or str(base / "model")
    return TrainingJob(model=model, directory=base, metrics=metrics, seconds=seconds)


def lay_out(base: Path, hyperparameters: Mapping[str, str], channels: Mapping[str, str]) -> None:
    """Writes the ``/opt/ml`` tree of one job below ``base``, as SageMaker does before it starts a container."""
    config = base / "input" / "config"
    (base / "output" / "failure").unlink(missing_ok=True)
    for folder in (config, base / "model", base / "output", base / "checkpoints", base / "input" / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, source in channels.items():
        target = base / "input" / "data" / name
        if source.startswith("s3://"):
            from dreambooth_sm.storage import S3Uri, download_directory

            download_directory(S3Uri.parse(source), target)
        else:
            shutil.rmtree(target, ignore_errors=True)  # of an earlier job in this tree
            shutil.copytree(source, target, copy_function=_link_or_copy)
    files: dict[str, object] = {
        "hyperparameters.json": dict(hyperparameters),
        "inputdataconfig.json": {
            name: {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
            for name in channels
        },
        "resourceconfig.json": {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "lo"},
    }
    for name, content in files.items():
        (config / name).write_text(json.dumps(content, indent=1))


def _link_or_copy(source: str, target: str) -> None:
    """A base model is gigabytes: link its files where the file system can."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def local_s3() -> Iterator[EmbeddedS3]:
    """An S3 server of this process on loopback; inside the context, boto3 and local jobs use it."""
    from dreambooth_sm.embedded import embedded_s3

    with embedded_s3() as server, patch.dict(os.environ, server.environment()):
        yield server
