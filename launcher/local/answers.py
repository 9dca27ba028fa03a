"""Answers of embedded services, as AWS's JSON protocol has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from botocore.model import ServiceModel

ACCOUNT = "123456789012"  # moto's
# What answers a request that is signed for a region.
Operation = Callable[[dict[str, Any], str], dict[str, Any]]


class RequestError(Exception):
    """The API refuses a request; ``code`` is the error's name."""

    def __init__(self, message: str, code: str = "ValidationException") -> None:
        super().__init__(message)
        self.code = code

    def answer(self) -> dict[str, str]:
        """As AWS's JSON protocol has it."""
        return {"__type": self.code, "message": str(self)}


def respond(
    start_response: Callable[..., Any], handler: Operation, request: dict[str, Any], region: str
) -> list[bytes]:
    try:
        return send(start_response, "200 OK", handler(request, region))
    except RequestError as error:
        return send(start_response, "400 Bad Request", error.answer())


def send(start_response: Callable[..., Any], status: str, answer: dict[str, Any]) -> list[bytes]:
    body = json.dumps(answer).encode()
    start_response(status, [("Content-Type", "application/x-amz-json-1.1"), ("Content-Length", str(len(body)))])
    return [body]


@cache
def _model(service: str) -> ServiceModel:
    """botocore's model of a service, megabytes that are read once."""
    import botocore.session

    return botocore.session.get_session().get_service_model(service)


def check_shape(operation: str, request: dict[str, Any], service: str = "sagemaker") -> None:
    """Raises RequestError for what botocore's model of the service does not know."""
    from botocore.validate import ParamValidator

    shape = _model(service).operation_model(operation).input_shape
    assert shape is not None
    report = ParamValidator().validate(request, shape)
    if report.has_errors():
        raise RequestError(report.generate_report())


def arn_of(kind: str, name: str, region: str) -> str:
    """The ARN of something of SageMaker's."""
    partition = "aws-cn" if region.startswith("cn-") else "aws-us-gov" if region.startswith("us-gov-") else "aws"
    return f"arn:{partition}:sagemaker:{region}:{ACCOUNT}:{kind}/{name}"


def pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]
