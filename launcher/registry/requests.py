"""The requests that put a model into the registry, without any account: as pure as those of jobs and endpoints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from dreambooth_sm.errors import Problems
from dreambooth_sm.serving.report import REPORT
from dreambooth_sm.storage import S3Uri
from launcher.endpoints.requests import container_of
from launcher.registry.card import card_content
from launcher.training_request import refused_tags

PENDING, APPROVED, REJECTED = "PendingManualApproval", "Approved", "Rejected"
_GROUP = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
# What a property's text can't hold, nor a description.
_REFUSED, _ODD = re.compile(r"[^\w .:/=+@-]"), re.compile(r"[^\w .:/=+@,;'\"()-]")
# Of properties, and of a card.
_LONGEST_TEXT, _LONGEST_CARD = 256, 100_000
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
    if not _GROUP.fullmatch(group) or len(group) > 63:
        problems.found.append(f"group: {group!r} is not valid; set 1 to 63 letters, digits and single hyphens")
    if approval not in (PENDING, APPROVED, REJECTED):
        problems.found.append(f"approval: {approval!r} is not valid; set {PENDING}, {APPROVED} or {REJECTED}")
    problems.found += refused_tags(tags or {})
    container = container_of(model, image_uri, problems, base_model=base_model)
    problems.raise_any()
    place, facts = S3Uri.parse(model), json.loads(report)
    card = card_content(facts, place, image_uri=image_uri, job_arn=job_arn, datasets=datasets)
    while len(text := json.dumps(card)) > _LONGEST_CARD:
        card["training_details"]["training_job_details"]["hyper_parameters"].pop()
    statistics = {
        "ContentType": "application/json",
        "S3Uri": str(place / REPORT),
        "ContentDigest": f"sha256:{hashlib.sha256(report).hexdigest()}",
    }
    described = f"{facts['model_name']}: {card['intended_uses']['purpose_of_model']}"
    return {
        "create_model_package_group": {
            "ModelPackageGroupName": group,
            "ModelPackageGroupDescription": "Models that dreambooth-sm has trained",
            **({"Tags": [{"Key": key, "Value": value} for key, value in tags.items()]} if tags else {}),
        },
        "create_model_package": {
            "ModelPackageGroupName": group,
            "ModelPackageDescription": _ODD.sub(" ", described)[:1024],
            "ModelApprovalStatus": approval,
            "InferenceSpecification": {
                "Containers": [container],
                "SupportedContentTypes": _ASKED,
                "SupportedResponseMIMETypes": _ANSWERED,
            },
            "ModelMetrics": {"ModelQuality": {"Statistics": statistics}},
            "CustomerMetadataProperties": _properties(facts),
            "Domain": "COMPUTER_VISION",
            "SourceUri": job_arn,
            "MetadataProperties": {"GeneratedBy": job_arn},
            "ModelCard": {"ModelCardContent": text, "ModelCardStatus": "Draft"},
            "SkipModelValidation": "All",
        },
    }


def _properties(facts: Mapping[str, Any]) -> dict[str, str]:
    """What versions are told apart by in lists."""
    last = facts["candidates"][-1] if facts["candidates"] else {}
    said = {
        "instance_prompt": " | ".join(str(subject["instance_prompt"]) for subject in facts["subjects"]),
        "base_model": facts["base_model"],
        "method": facts["hyperparameters"]["method"],
        "steps": facts["attempts"][-1]["last_step"],
        "score": last.get("score"),
        "verdict": " ".join(facts["verdicts"]),
        "image": facts["versions"].get("image"),
        "dreambooth-sm": facts["versions"].get("dreambooth-sm"),
    }
    texts = {name: str(value) for name, value in said.items() if value not in (None, "")}
    return {name: _REFUSED.sub(" ", text)[:_LONGEST_TEXT] for name, text in texts.items()}
