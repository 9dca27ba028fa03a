"""Starts jobs on this machine, on embedded services that this process runs."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dreambooth_sm.errors import UserError
from launcher.aws.clients import Clients
from launcher.jobs.job import Job
from launcher.local.answers import RequestError
from launcher.local.program import CONTAINER, ENTRYPOINT, docker
from launcher.local.services import EmbeddedServices, embedded_services


def run_locally(
    hyperparameters: Mapping[str, str],
    channels: Mapping[str, Mapping[str, str]],
    *,
    image: str | None = None,
    directory: str | Path | None = None,
    log: Callable[[str], None] | None = print,
    wait: bool = True,
) -> Job:
    """Runs a job on this machine and follows it.

    Args:
        hyperparameters: as the request to SageMaker would hold them: every value a string.
        channels: names to S3DataSources, at ``s3://`` or ``file://`` locations.
        image: that Docker runs; None runs the entrypoint as a process.
        directory: root of the ``/opt/ml`` tree; a new temporary directory if None.
        log: gets each line of the job's log.
        wait: follow it until it has ended; otherwise it is only started.

    Raises:
        UserError: where the entrypoint, or Docker, is not here.
        JobFailed: with the job's reason.
    """
    name = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    job = submit_locally(local_request(name, hyperparameters, channels, image), directory)
    return job.wait(log) if wait else job


def local_request(
    name: str,
    hyperparameters: Mapping[str, str],
    channels: Mapping[str, Mapping[str, str]],
    image: str | None = None,
) -> dict[str, Any]:
    """The request of a training job for this machine; see :func:`run_locally`.

    Args:
        name: of the job.
    """
    return {
        "TrainingJobName": name,
        "AlgorithmSpecification": {"TrainingImage": image or "none", "TrainingInputMode": "File"},
        "RoleArn": "arn:aws:iam::123456789012:role/local",
        "HyperParameters": dict(hyperparameters),
        "InputDataConfig": [
            {"ChannelName": name, "DataSource": {"S3DataSource": dict(source)}} for name, source in channels.items()
        ],
        "OutputDataConfig": {"S3OutputPath": "file:///", "CompressionType": "NONE"},
        "ResourceConfig": {"InstanceType": CONTAINER if image else "local", "InstanceCount": 1, "VolumeSizeInGB": 1},
        "StoppingCondition": {"MaxRuntimeInSeconds": 28 * 86400},
    }


def submit_locally(request: Mapping[str, Any], directory: str | Path | None = None) -> Job:
    """Starts a job on this machine, on the services of :func:`local_services` or, without, on some of its own, which
    use the S3 of the standard AWS settings. The job ends with this process.

    Args:
        request: of CreateTrainingJob; ``file://`` locations serve as well, and InstanceType ``local-container`` runs
            the image.
        directory: root of the ``/opt/ml`` tree, which is kept; a new temporary directory if None.

    Raises:
        UserError: for a request that SageMaker would refuse, or where the entrypoint is not here.
    """
    _check_programs(request["ResourceConfig"].get("InstanceType"))
    base = Path(directory or tempfile.mkdtemp(prefix="dreambooth-sm-")).resolve()
    services = _services()
    try:
        services.sagemaker.create(dict(request), directory=base, own=True)
    except RequestError as error:
        raise UserError(str(error)) from error
    return Job(request["TrainingJobName"], services.clients(), directory=base)


def tune_locally(request: Mapping[str, Any], directory: Path) -> Clients:
    """Starts a tuning job on this machine, as :func:`submit_locally` starts a training job.

    Args:
        request: of CreateHyperParameterTuningJob.
        directory: that holds the tree of each trial, below its name.

    Returns:
        clients of the services that run it.

    Raises:
        UserError: for a request that SageMaker would refuse, or where the entrypoint is not here.
    """
    definition = request["TrainingJobDefinition"]
    _check_programs(definition["HyperParameterTuningResourceConfig"].get("InstanceType"))
    services = _services()
    try:
        services.sagemaker.tuning.create(dict(request), directory=directory, own=True)
    except RequestError as error:
        raise UserError(str(error)) from error
    return services.clients()


def _check_programs(instance_type: str | None) -> None:
    if not ENTRYPOINT.is_file():
        raise UserError(f"{ENTRYPOINT} is missing: local jobs need a checkout of the project (pip install -e .)")
    if instance_type == CONTAINER and not shutil.which(docker()):
        raise UserError(f"instance_type={CONTAINER!r} needs Docker: there is no {docker()!r} on PATH")


def local_tuning(name: str) -> tuple[Clients, Path | None] | None:
    """Clients of a tuning job that this process runs, and the directory of its trials' trees where it is kept."""
    for services in _running:
        with suppress(KeyError):
            tuning = services.sagemaker.tuning.named(name)
            return services.clients(tuning.region), tuning.directory
    return None


def local_job(name: str) -> Job | None:
    """A job that this process runs, by its name."""
    for services in _running:
        with suppress(KeyError):
            job = services.sagemaker.named(name)
            return Job(name, services.clients(job.region), directory=job.tree)
    return None


@contextmanager
def local_services() -> Iterator[EmbeddedServices]:
    """SageMaker, S3, CloudWatch Logs and more on this machine; inside the context boto3, both SageMaker SDKs and the
    launcher use them. Training jobs really run: as processes, whatever instance type they ask for. An execution role
    (``services.role``), the image and a bucket are there.

    Raises:
        UserError: moto is not installed.
    """
    with embedded_services(with_account=True) as services, _environment_of(services):
        _running.append(services)
        try:
            yield services
        finally:
            _running.remove(services)


@contextmanager
def _environment_of(services: EmbeddedServices) -> Iterator[None]:
    """The services' AWS settings instead of the user's own, whose credentials must not reach them."""
    own = services.environment()
    for name in ("NO_PROXY", "no_proxy"):
        own[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # boto3's default session would keep the credentials that it was made with.
    with patch.dict(os.environ, {**kept, **own}, clear=True), patch("boto3.DEFAULT_SESSION", None):
        yield


# The embedded services of this process; jobs go to the last.
_running: list[EmbeddedServices] = []


def _services() -> EmbeddedServices:
    if not _running:
        stack = ExitStack()
        atexit.register(stack.close)
        _running.append(stack.enter_context(embedded_services(with_s3=False)))
    return _running[-1]
