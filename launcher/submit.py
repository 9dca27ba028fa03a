"""Sends a request to SageMaker with boto3."""

from __future__ import annotations

from collections.abc import Mapping
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
        with asking(f"{name} was not started"):
            sagemaker.create_training_job(**request)
    except ServiceError as error:
        if error.kind is Kind.NETWORK:
            raise ServiceError(
                f"whether {name} was started is not known, as there was no answer ({error.reason}): {error.advice}, "
                f'then see launcher.attach("{name}")',
                error.kind,
                error.reason,
                error.advice,
            ) from error
        if error.kind in (Kind.CREDENTIALS, Kind.CLOCK, Kind.BUSY):
            raise
        if not _is_there(request, error, sagemaker):
            advice = f"; {error.advice}" if error.advice else ""
            raise UserError(f"SageMaker refuses the job: {error.reason}{advice}") from error
    return Job(name, clients, price=price)


def _is_there(request: Mapping[str, Any], error: ServiceError, sagemaker: Any) -> bool:
    """Whether a first request, whose answer was lost, started the job, so that the next one found its name taken."""
    answer = getattr(error.__cause__, "response", {})
    tries = answer.get("ResponseMetadata", {}).get("RetryAttempts", 0)
    if not tries or answer["Error"]["Code"] != "ResourceInUse":
        return False
    with asking(f"whether {request['TrainingJobName']} was started is not known"):
        found = sagemaker.describe_training_job(TrainingJobName=request["TrainingJobName"])
    recent = datetime.now(UTC) - found["CreationTime"] < _RECENT
    return bool(recent and found.get("HyperParameters") == request["HyperParameters"])
