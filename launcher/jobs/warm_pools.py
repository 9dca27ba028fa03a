"""Finds the warm pool that a job would run in: an instance that an earlier job keeps, with all that it has fetched.

https://docs.aws.amazon.com/sagemaker/latest/dg/train-warm-pools.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from launcher.aws.clients import Clients
from launcher.aws.service_errors import asking
from launcher.jobs.times import base_of

# Pools that are looked at, those of the jobs that were made last.
_LOOKED_AT = 10
# What has to be the same, besides those of the whole request, by what people call it.
_OF_RESOURCES = {
    "InstanceType": "instance type",
    "InstanceCount": "number of instances",
    "VolumeSizeInGB": "volume size",
    "VolumeKmsKeyId": "key of the volume",
}


@dataclass(frozen=True)
class WarmPool:
    """An instance that is kept.

    Attributes:
        job: the last one that ran there.
        until: when it is given back.
        differences: why the next job can't run there; none: it will.
        has_image: whether that job ran the same training image.
        has_model: whether it fetched the same base model.
    """

    job: str
    until: datetime
    differences: tuple[str, ...]
    has_image: bool
    has_model: bool


def conditions(request: Mapping[str, Any]) -> dict[str, object]:
    """What has to be the same of two jobs for the second to run in the first one's warm pool, by what people call it.

    Args:
        request: of CreateTrainingJob, or the description of a job.
    """
    resources, network = request["ResourceConfig"], request.get("VpcConfig", {})
    return {
        "role": request["RoleArn"],
        **{words: resources.get(name) for name, words in _OF_RESOURCES.items()},
        "security groups": sorted(network.get("SecurityGroupIds", ())),
        "subnets": sorted(network.get("Subnets", ())),
        "encryption between instances": bool(request.get("EnableInterContainerTrafficEncryption")),
        "network isolation": bool(request.get("EnableNetworkIsolation")),
        "session tags": bool(request.get("SessionChainingConfig", {}).get("EnableSessionTagChaining")),
    }


def find_warm_pools(clients: Clients, request: Mapping[str, Any]) -> list[WarmPool]:
    """The account's warm pools of a request's instance type, those that it matches first.

    One request lists what is available, and one for each of them describes it.

    Raises:
        ServiceError: they may not be listed, or AWS can't be reached.
    """
    if request.get("EnableManagedSpotTraining"):  # which never runs in one
        return []
    sagemaker = clients("sagemaker")
    with asking("warm pools can't be looked for"):
        listed = sagemaker.list_training_jobs(
            WarmPoolStatusEquals="Available", SortBy="CreationTime", SortOrder="Descending", MaxResults=_LOOKED_AT
        )["TrainingJobSummaries"]
        if not listed:
            return []
        with ThreadPoolExecutor(_LOOKED_AT) as pool:
            names = [each["TrainingJobName"] for each in listed]
            described = list(pool.map(lambda name: sagemaker.describe_training_job(TrainingJobName=name), names))
    found = [_compare(each, request) for each in described if "TrainingEndTime" in each]
    return sorted(
        (pool for pool in found if pool is not None),
        key=lambda pool: (len(pool.differences), not pool.has_image, not pool.has_model),
    )


def _compare(job: Mapping[str, Any], request: Mapping[str, Any]) -> WarmPool | None:
    """None for a pool of another instance type."""
    kept, wanted = conditions(job), conditions(request)
    if kept["instance type"] != wanted["instance type"]:
        return None
    end: datetime = job["TrainingEndTime"]
    return WarmPool(
        job["TrainingJobName"],
        end + timedelta(seconds=job["ResourceConfig"].get("KeepAlivePeriodInSeconds", 0)),
        tuple(_differences(kept, wanted)),
        job["AlgorithmSpecification"].get("TrainingImage") == request["AlgorithmSpecification"]["TrainingImage"],
        base_of(job) == base_of(request),
    )


def _differences(kept: Mapping[str, object], wanted: Mapping[str, object]) -> Iterator[str]:
    for words, value in wanted.items():
        if kept[words] != value:
            yield f"{words}: {_shown(kept[words])}, and the job's is {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else str(value)
