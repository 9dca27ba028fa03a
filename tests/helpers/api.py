"""SageMaker's own word on a request: botocore's model of its API."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import botocore.session
import regex
from botocore.model import Shape
from botocore.validate import ParamValidator


@cache
def shape_of(operation: str, service: str = "sagemaker") -> Any:
    return botocore.session.get_session().get_service_model(service).operation_model(operation).input_shape


def refusals(operation: str, request: dict[str, Any], service: str = "sagemaker") -> list[str]:
    """What botocore refuses, and what breaks a length, pattern or list of values that its model only states."""
    shape = shape_of(operation, service)
    report = ParamValidator().validate(request, shape).generate_report()
    return [*report.splitlines(), *_broken(shape, request, operation)]


def _broken(shape: Shape, value: Any, place: str) -> Iterator[str]:
    limits = shape.metadata
    size = len(value) if isinstance(value, str | list | dict) else value
    if isinstance(size, int) and not limits.get("min", size) <= size <= limits.get("max", size):
        yield f"{place}: {size} is not between {limits.get('min')} and {limits.get('max')}"
    if isinstance(value, str):
        # As pairs of surrogates, which Java's patterns have.
        pattern = limits.get("pattern", "").replace(r"\uD800\uDC00-\uDBFF\uDFFF", r"\U00010000-\U0010FFFF")
        if pattern and not regex.fullmatch(pattern, value):
            yield f"{place}: {value!r} does not match {limits['pattern']}"
        if "enum" in limits and value not in limits["enum"]:
            yield f"{place}: {value!r} is not one of its values"
    elif shape.type_name == "structure":
        for name, each in value.items():
            yield from _broken(shape.members[name], each, f"{place}.{name}")  # type: ignore[attr-defined]
    elif shape.type_name == "list":
        for each in value:
            yield from _broken(shape.member, each, place)  # type: ignore[attr-defined]
    elif shape.type_name == "map":
        for key, each in value.items():
            yield from _broken(shape.key, key, place)  # type: ignore[attr-defined]
            yield from _broken(shape.value, each, f"{place}.{key}")  # type: ignore[attr-defined]
