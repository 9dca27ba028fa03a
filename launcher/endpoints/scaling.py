"""Autoscaling of an endpoint by what is asked of it: requests to Application Auto Scaling and CloudWatch, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.errors import UserError
from launcher.aws.service_errors import ServiceError, asking
from launcher.endpoints.made import variant_of
from launcher.endpoints.requests import VARIANT

_DIMENSION = "sagemaker:variant:DesiredInstanceCount"
_BY_REQUESTS, _FROM_ZERO = "dreambooth-sm-requests", "dreambooth-sm-from-zero"
# Seconds: more instances soon, fewer once it stays quiet.
_OUT_COOLDOWN, _IN_COOLDOWN = 60, 600
# What Application Auto Scaling says of what is not there.
_NOTHING = "No scalable target found"


@dataclass(frozen=True)
class Scaling:
    """How many instances an endpoint may have.

    Attributes:
        least: at any time; 0 for endpoints that are asked by way of S3 alone.
        most: at any time.
        target: requests that one instance is to have: a minute, or, of asynchronous endpoints, waiting.
        asynchronous: whether the endpoint is asked by way of S3.
    """

    least: int
    most: int
    target: float
    asynchronous: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.least == 0 and not self.asynchronous:
            problems.append("min_instances: 0 is for asynchronous endpoints; set 1, or asynchronous='s3://...'")
        elif self.least < 0:
            problems.append(f"min_instances: {self.least} is not valid; set a whole number from 0")
        if self.most < max(1, self.least):
            problems.append(f"max_instances: {self.most} is not valid; set a whole number from {max(1, self.least)}")
        if self.target <= 0:
            problems.append(f"requests_per_instance: {self.target:g} is not valid; set more than 0")
        if problems:
            raise UserError(problems)

    def requests(self, endpoint: str, variant: str = VARIANT) -> list[tuple[str, str, dict[str, Any]]]:
        """The service, operation and request of each step, in their order.

        An alarm, which comes last where there is one, needs the ARN that the step before it answers with as its action.
        """
        scalable = _scalable(endpoint, variant)
        steps: list[tuple[str, str, dict[str, Any]]] = [
            (
                "application-autoscaling",
                "register_scalable_target",
                {**scalable, "MinCapacity": self.least, "MaxCapacity": self.most},
            ),
            (
                "application-autoscaling",
                "put_scaling_policy",
                {
                    **scalable,
                    "PolicyName": _BY_REQUESTS,
                    "PolicyType": "TargetTrackingScaling",
                    "TargetTrackingScalingPolicyConfiguration": {
                        "TargetValue": float(self.target),
                        **self._metric(endpoint),
                        "ScaleOutCooldown": _OUT_COOLDOWN,
                        "ScaleInCooldown": _IN_COOLDOWN,
                    },
                },
            ),
        ]
        return steps + (_from_zero(endpoint, scalable) if self.least == 0 else [])

    def _metric(self, endpoint: str) -> dict[str, Any]:
        if not self.asynchronous:
            known = "SageMakerVariantInvocationsPerInstance"
            return {"PredefinedMetricSpecification": {"PredefinedMetricType": known}}
        return {"CustomizedMetricSpecification": {**_metric("ApproximateBacklogSizePerInstance", endpoint)}}


def _from_zero(endpoint: str, scalable: Mapping[str, str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Steps by which the first request gets an instance: a backlog for each of none is not a number."""
    step = {
        "AdjustmentType": "ChangeInCapacity",
        "MetricAggregationType": "Average",
        "Cooldown": _IN_COOLDOWN,
        "StepAdjustments": [{"MetricIntervalLowerBound": 0.0, "ScalingAdjustment": 1}],
    }
    policy = {**scalable, "PolicyName": _FROM_ZERO, "PolicyType": "StepScaling", "StepScalingPolicyConfiguration": step}
    alarm = {
        "AlarmName": _alarm(endpoint),
        **_metric("HasBacklogWithoutCapacity", endpoint),
        "EvaluationPeriods": 2,
        "DatapointsToAlarm": 2,
        "Threshold": 1.0,
        "ComparisonOperator": "GreaterThanOrEqualToThreshold",
        "TreatMissingData": "missing",
        "Period": 60,
    }
    return [("application-autoscaling", "put_scaling_policy", policy), ("cloudwatch", "put_metric_alarm", alarm)]


def _metric(name: str, endpoint: str) -> dict[str, Any]:
    of_endpoint = [{"Name": "EndpointName", "Value": endpoint}]
    return {"MetricName": name, "Namespace": "AWS/SageMaker", "Dimensions": of_endpoint, "Statistic": "Average"}


def _alarm(endpoint: str) -> str:
    return f"{_FROM_ZERO}-{endpoint}"


def _scalable(endpoint: str, variant: str) -> dict[str, str]:
    where = f"endpoint/{endpoint}/variant/{variant}"
    return {"ServiceNamespace": "sagemaker", "ResourceId": where, "ScalableDimension": _DIMENSION}


def scale(endpoint: str, scaling: Scaling, clients: Any, tags: Sequence[Mapping[str, str]] = ()) -> None:
    """Lets an endpoint that is there have more and fewer instances.

    Args:
        tags: of an alarm that is made, as SageMaker has them.

    Raises:
        ServiceError: AWS refuses it.
    """
    answer: dict[str, Any] = {}
    for service, operation, request in scaling.requests(endpoint, variant_of(endpoint, clients("sagemaker"))):
        acting = {"AlarmActions": [answer["PolicyARN"]], "Tags": list(tags)} if service == "cloudwatch" else {}
        with asking(f"autoscaling of {endpoint} can't be set"):
            answer = getattr(clients(service), operation)(**request, **acting)


def scaling_of(endpoint: str, clients: Any) -> Scaling | None:
    """How many instances an endpoint may have; None where their number is fixed.

    Raises:
        ServiceError: it can't be asked for.
    """
    scalable = _scalable(endpoint, variant_of(endpoint, clients("sagemaker")))
    client = clients("application-autoscaling")
    with asking(f"autoscaling of {endpoint} can't be looked at"):
        found = client.describe_scalable_targets(
            ServiceNamespace="sagemaker", ResourceIds=[scalable["ResourceId"]], ScalableDimension=_DIMENSION
        )["ScalableTargets"]
        policies: Sequence[Mapping[str, Any]] = client.describe_scaling_policies(**scalable)["ScalingPolicies"]
    tracking = [
        each["TargetTrackingScalingPolicyConfiguration"] for each in policies if each["PolicyName"] == _BY_REQUESTS
    ]
    if not found or not tracking:
        return None
    is_asynchronous = "CustomizedMetricSpecification" in tracking[0]
    target = tracking[0]["TargetValue"]
    return Scaling(found[0]["MinCapacity"], found[0]["MaxCapacity"], target, is_asynchronous)


def stop_scaling(endpoint: str, clients: Any) -> None:
    """Leaves the number of instances as it is; does nothing where it is fixed.

    Raises:
        ServiceError: AWS refuses it.
    """
    scalable = _scalable(endpoint, variant_of(endpoint, clients("sagemaker")))
    try:
        with asking(f"autoscaling of {endpoint} can't be removed"):
            clients("application-autoscaling").deregister_scalable_target(**scalable)
    except ServiceError as error:
        if not error.reason.startswith("ObjectNotFoundException") and _NOTHING not in error.reason:
            raise
        return
    with asking(f"the alarm of {endpoint} can't be removed"):
        clients("cloudwatch").delete_alarms(AlarmNames=[_alarm(endpoint)])
