"""The requests that put a model into the registry, without any account: as pure as those of jobs and endpoints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dreambooth_sm.errors import Problems
from dreambooth_sm.evaluation import properties_of
from dreambooth_sm.serving.report import REPORT
from dreambooth_sm.storage import S3Uri
from launcher.endpoints.requests import container_of
from launcher.registry.card import card_content
from launcher.training_request import refused_tags

PENDING, APPROVED, REJECTED = "PendingManualApproval", "Approved", "Rejected"
_GROUP = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
# What a description can't hold.
_ODD = re.compile(r"[^\w .:/=+@,;'\"()-]")
_LONGEST_CARD = 100_000
_ASKED, _ANSWERED = ["application/json"], ["application/json", "image/png", "image/jpeg"]


def package_requests(
    group: str,
    report: bytes,
    *,
    model: str,
    image_uri: str,
    job_arn: str,
    datasets: list[str],
    approval: str = PENDING,
    base_model: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """The requests of one version in a group, by the names that boto3's client of SageMaker has for them.

    Args:
        group: its name.
        report: the job's ``report.json``.
        model: ``s3://`` prefix that the model lies below, as plain files.
        image_uri: that trained it, and serves it.
        job_arn: of the training job.
        datasets: ``s3://`` locations of the pictures.
        approval: ``PendingManualApproval``, ``Approved`` or ``Rejected``.
        base_model: that an adapter lies beside: an ``s3://`` prefix, or a hub id.
        tags: of the group, where it is made: versions have those of their group.

    Returns:
        of ``create_model_package_group``, for a group that is missing, and ``create_model_package``.

    Raises:
        UserError: with everything that SageMaker would refuse.
    """
    problems = Problems()
    problems.found += refused_version(group, approval, tags or {})
    container = container_of(model, image_uri, problems, base_model=base_model)
    problems.raise_any()
    place, facts = S3Uri.parse(model), json.loads(report)
    card = card_content(facts, place, image_uri=image_uri, job_arn=job_arn, datasets=datasets)
    while len(text := json.dumps(card)) > _LONGEST_CARD:
        card["training_details"]["training_job_details"]["hyper_parameters"].pop()
    described = f"{facts['model_name']}: {card['intended_uses']['purpose_of_model']}"
    version = version_request(
        group,
        described,
        container=container,
        approval=approval,
        report=str(place / REPORT),
        properties=properties_of(facts),
        job_arn=job_arn,
    )
    version["ModelMetrics"]["ModelQuality"]["Statistics"]["ContentDigest"] = (
        f"sha256:{hashlib.sha256(report).hexdigest()}"
    )
    return {
        "create_model_package_group": group_request(group, tags or {}),
        "create_model_package": {**version, "ModelCard": {"ModelCardContent": text, "ModelCardStatus": "Draft"}},
    }


def refused_version(group: str, approval: str, tags: Mapping[str, str]) -> Iterator[str]:
    """Finds what SageMaker would refuse of a version, whatever the model is."""
    if not _GROUP.fullmatch(group) or len(group) > 63:
        yield f"group: {group!r} is not valid; set 1 to 63 letters, digits and single hyphens"
    if approval not in (PENDING, APPROVED, REJECTED):
        yield f"approval: {approval!r} is not valid; set {PENDING}, {APPROVED} or {REJECTED}"
    yield from refused_tags(tags)


def group_request(group: str, tags: Mapping[str, str]) -> dict[str, Any]:
    """For ``create_model_package_group``."""
    return {
        "ModelPackageGroupName": group,
        "ModelPackageGroupDescription": "Models that dreambooth-sm has trained",
        **({"Tags": [{"Key": key, "Value": value} for key, value in tags.items()]} if tags else {}),
    }


def version_request(
    group: str,
    description: str,
    *,
    container: Mapping[str, Any],
    approval: str,
    report: str,
    properties: Mapping[str, Any],
    job_arn: str,
) -> dict[str, Any]:
    """For ``create_model_package``, without a model card.

    Args:
        container: that serves the model.
        report: where the job's ``report.json`` lies.
        properties: what versions are told apart by in lists.
        job_arn: of the training job.
    """
    return {
        "ModelPackageGroupName": group,
        "ModelPackageDescription": _ODD.sub(" ", description)[:1024],
        "ModelApprovalStatus": approval,
        "InferenceSpecification": {
            "Containers": [dict(container)],
            "SupportedContentTypes": _ASKED,
            "SupportedResponseMIMETypes": _ANSWERED,
        },
        "ModelMetrics": {"ModelQuality": {"Statistics": {"ContentType": "application/json", "S3Uri": report}}},
        "CustomerMetadataProperties": dict(properties),
        "Domain": "COMPUTER_VISION",
        "SourceUri": job_arn,
        "MetadataProperties": {"GeneratedBy": job_arn},
        "SkipModelValidation": "All",
    }
