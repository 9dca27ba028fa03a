"""Sends a request to SageMaker with boto3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from dreambooth_sm.errors import UserError
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.jobs.job import Job

# As long as all tries of one request may take.
_RECENT = timedelta(minutes=15)


def submit(request: Mapping[str, Any], clients: Clients, *, price: float | None = None) -> Job:
    """Starts the job with boto3.

    Args:
        price: dollars an hour of an instance, for the job's cost.

    Raises:
        UserError: SageMaker refuses the request; its own words follow.
        ServiceError: AWS can't be reached, not with these credentials, or has a fault of its own.
    """
    name, sagemaker = request["TrainingJobName"], clients("sagemaker")
    try:
        with starting(name, "job", f'launcher.attach("{name}")'):
            sagemaker.create_training_job(**request)
    except UserError as error:
        if not _is_there(request, error.__cause__, sagemaker):
            raise
    return Job(name, clients, price=price)


@contextmanager
def starting(name: str, kind: str, follow: str) -> Iterator[None]:
    """Says what became of a job that is asked for inside.

    Args:
        kind: what messages call it.
        follow: the call that looks at it, should it have started.

    Raises:
        UserError: SageMaker refuses the request; its own words follow.
        ServiceError: AWS can't be reached, not with these credentials, or has a fault of its own.
    """
    try:
        with asking(f"{name} was not started"):
            yield
    except ServiceError as error:
        if error.kind is Kind.NETWORK:
            raise ServiceError(
                f"whether {name} was started is not known, as there was no answer ({error.reason}): {error.advice}, "
                f"then see {follow}",
                error.kind,
                error.reason,
                error.advice,
            ) from error
        if error.kind in (Kind.CREDENTIALS, Kind.CLOCK, Kind.BUSY):
            raise
        advice = f"; {error.advice}" if error.advice else ""
        raise UserError(f"SageMaker refuses the {kind}: {error.reason}{advice}") from error


def _is_there(request: Mapping[str, Any], error: BaseException | None, sagemaker: Any) -> bool:
    """Whether a first request, whose answer was lost, started the job, so that the next one found its name taken."""
    answer = getattr(error and error.__cause__, "response", {})
    tries = answer.get("ResponseMetadata", {}).get("RetryAttempts", 0)
    if not tries or answer["Error"]["Code"] != "ResourceInUse":
        return False
    with asking(f"whether {request['TrainingJobName']} was started is not known"):
        found = sagemaker.describe_training_job(TrainingJobName=request["TrainingJobName"])
    recent = datetime.now(UTC) - found["CreationTime"] < _RECENT
    return bool(recent and found.get("HyperParameters") == request["HyperParameters"])
