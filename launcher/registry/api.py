"""``Job.register``: from a trained model to a version in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.serving.report import REPORT
from dreambooth_sm.storage import S3Uri, get_object
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.endpoints.made import tags_of
from launcher.endpoints.models import Served
from launcher.endpoints.prepare import look_at
from launcher.registry.groups import make_group
from launcher.registry.packages import ModelPackage
from launcher.registry.requests import PENDING, package_requests


class Described(Protocol):
    """A job that has ended."""

    name: str

    @property
    def model_uri(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...


def register(
    job: Described,
    group: str,
    clients: Clients,
    *,
    approval: str = PENDING,
    base_model: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> ModelPackage:
    """See :meth:`launcher.Job.register`."""
    model, description = job.model_uri, job.describe()
    if not model.startswith("s3://") or model.endswith(".tar.gz"):
        raise UserError(
            f"{job.name}: the registry takes models that lie in S3 as plain files, and this one is {model}; train with "
            "instance_type='ml....' and compression=False"
        )
    place = S3Uri.parse(model)
    problems = Problems()
    look_at(Served(model, base_model), clients, problems)
    problems.raise_any()
    report = get_object(place / REPORT, client=clients("s3"))
    if report is None:
        raise UserError(f"{model}: {REPORT}, which says what the model is, is missing; train it with this project")
    sagemaker = clients("sagemaker")
    if tags is None:
        tags = tags_of(description["TrainingJobArn"], sagemaker)
    requests = package_requests(
        group,
        report,
        model=model,
        image_uri=description["AlgorithmSpecification"]["TrainingImage"],
        job_arn=description["TrainingJobArn"],
        datasets=_datasets(description),
        approval=approval,
        base_model=base_model,
        tags=tags,
    )
    make_group(requests["create_model_package_group"], sagemaker)
    try:
        with asking(f"{job.name} was not registered"):
            made = sagemaker.create_model_package(**requests["create_model_package"])
    except ServiceError as error:
        if error.kind is not Kind.OTHER:
            raise
        raise UserError(f"SageMaker refuses to register {job.name}: {error.reason}") from error
    return ModelPackage(made["ModelPackageArn"], clients)


def _datasets(description: Mapping[str, Any]) -> list[str]:
    sources = [each["DataSource"].get("S3DataSource", {}) for each in description.get("InputDataConfig", ())]
    return [source["S3Uri"] for source in sources if source.get("S3Uri", "").startswith("s3://")]
