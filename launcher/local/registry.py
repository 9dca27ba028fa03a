"""The registry of the embedded SageMaker: groups of model packages."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from launcher.local.answers import Operation, RequestError, arn_of

_GROUP, _PACKAGE = "ModelPackageGroup", "ModelPackage"
_LISTED = {
    _GROUP: (f"{_GROUP}Name", f"{_GROUP}Arn", f"{_GROUP}Description", f"{_GROUP}Status", "CreationTime"),
    _PACKAGE: (
        *(f"{_PACKAGE}{what}" for what in ("Name", "GroupName", "Version", "Arn", "Description", "Status")),
        *("CreationTime", "ModelApprovalStatus"),
    ),
}

# What a card of a package has.
_CARD = {
    "additional_information",
    "business_details",
    "evaluation_details",
    "intended_uses",
    "model_overview",
    "training_details",
}


class EmbeddedRegistry:
    """Groups and their versions, each of the region that its request is signed for.

    Args:
        tags: of everything, by ARN.
    """

    def __init__(self, tags: dict[str, dict[str, str]]) -> None:
        self._tags = tags
        self._groups: dict[str, dict[str, Any]] = {}
        self._packages: dict[str, dict[str, Any]] = {}
        self.operations: dict[str, Operation] = {
            "CreateModelPackageGroup": self._create_group,
            "DescribeModelPackageGroup": lambda request, region: dict(self._group(request[f"{_GROUP}Name"], region)),
            "ListModelPackageGroups": self._list_groups,
            "DeleteModelPackageGroup": self._delete_group,
            "CreateModelPackage": self._create,
            "DescribeModelPackage": lambda request, region: dict(self._package(request[f"{_PACKAGE}Name"], region)),
            "UpdateModelPackage": self._update,
            "ListModelPackages": self._list,
            "DeleteModelPackage": self._delete,
        }

    def _create_group(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        arn = arn_of("model-package-group", request[f"{_GROUP}Name"], region)
        if arn in self._groups:
            raise RequestError(f"Model Package Group already exists: {arn}")
        kept = {name: value for name, value in request.items() if name != "Tags"}
        self._groups[arn] = {
            **kept,
            f"{_GROUP}Arn": arn,
            f"{_GROUP}Status": "Completed",
            "CreationTime": time.time(),
            "CreatedBy": {},
        }
        self._tags[arn] = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        return {f"{_GROUP}Arn": arn}

    def _group(self, name: str, region: str) -> dict[str, Any]:
        arn = name if name.startswith("arn:") else arn_of("model-package-group", name, region)
        if arn not in self._groups:
            raise RequestError(f"ModelPackageGroup {arn} does not exist.")
        return self._groups[arn]

    def _list_groups(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        found = [each for arn, each in self._groups.items() if arn.split(":")[3] == region]
        return {f"{_GROUP}SummaryList": [_summary(_GROUP, each) for each in found]}

    def _delete_group(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        group = self._group(request[f"{_GROUP}Name"], region)
        if self._versions(group):
            raise RequestError(f"Model Package Group {group[f'{_GROUP}Arn']} contains Model Packages.")
        del self._groups[group[f"{_GROUP}Arn"]]
        self._tags.pop(group[f"{_GROUP}Arn"], None)
        return {}

    def _create(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        _check(request)
        group = self._group(request[f"{_PACKAGE}GroupName"], region)
        name = group[f"{_GROUP}Name"]
        version = max((each[f"{_PACKAGE}Version"] for each in self._versions(group)), default=0) + 1
        arn = arn_of("model-package", f"{name}/{version}", region)
        kept = {key: value for key, value in request.items() if key != "ClientToken"}
        self._packages[arn] = {
            "ModelApprovalStatus": "PendingManualApproval",
            **kept,
            f"{_PACKAGE}GroupName": name,
            f"{_PACKAGE}Name": name,
            f"{_PACKAGE}Version": version,
            f"{_PACKAGE}Arn": arn,
            f"{_PACKAGE}Status": "Completed",
            f"{_PACKAGE}StatusDetails": {"ValidationStatuses": []},
            "CreationTime": time.time(),
        }
        return {f"{_PACKAGE}Arn": arn}

    def _versions(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        start = f"{group[f'{_GROUP}Arn'].replace(':model-package-group/', ':model-package/')}/"
        return [each for arn, each in self._packages.items() if arn.startswith(start)]

    def _package(self, name: str, region: str) -> dict[str, Any]:
        if name not in self._packages:
            raise RequestError(f"ModelPackage {name} does not exist.")
        return self._packages[name]

    def _update(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        package = self._package(request[f"{_PACKAGE}Arn"], region)
        names = ("ModelApprovalStatus", "ApprovalDescription", "CustomerMetadataProperties", "ModelCard")
        package |= {name: request[name] for name in names if name in request}
        package["LastModifiedTime"] = time.time()
        return {f"{_PACKAGE}Arn": package[f"{_PACKAGE}Arn"]}

    def _list(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        if f"{_PACKAGE}GroupName" in request:
            found = self._versions(self._group(request[f"{_PACKAGE}GroupName"], region))
        else:
            found = [each for arn, each in self._packages.items() if arn.split(":")[3] == region]
        wanted = request.get("ModelApprovalStatus")
        found = [each for each in found if wanted in (None, each["ModelApprovalStatus"])]
        if request.get("SortOrder", "Descending") == "Descending":
            found.reverse()
        return {f"{_PACKAGE}SummaryList": [_summary(_PACKAGE, each) for each in found]}

    def _delete(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        del self._packages[self._package(request[f"{_PACKAGE}Name"], region)[f"{_PACKAGE}Arn"]]
        return {}


def _summary(kind: str, description: Mapping[str, Any]) -> dict[str, Any]:
    return {name: description[name] for name in _LISTED[kind] if name in description}


def _check(request: Mapping[str, Any]) -> None:
    """Raises RequestError for what SageMaker refuses beside what breaks its API's model."""
    if f"{_PACKAGE}GroupName" not in request:
        raise RequestError("the embedded SageMaker keeps versions of groups; set ModelPackageGroupName")
    if request.get("Tags"):
        raise RequestError("Tags are not allowed for versioned model packages; tag the group")
    try:
        card = json.loads(request.get("ModelCard", {}).get("ModelCardContent", "{}"))
    except ValueError as error:
        raise RequestError(f"ModelCardContent is not JSON: {error}") from None
    if unknown := card.keys() - _CARD:
        raise RequestError(f"ModelCardContent: {', '.join(sorted(unknown))}: not of the schema")
