"""The values that a field's type takes: its alternatives, its choices, its limits, and all of that in words."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, without their constraints."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(a for member in get_args(annotation) for a in alternatives(member))
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    return (annotation,)


def choices(annotation: Any) -> list[object]:
    return [choice for a in alternatives(annotation) if get_origin(a) is Literal for choice in get_args(a)]


def _bounds(annotation: Any) -> list[str]:
    """The limits that a type's constraints set, in words."""
    words = {Ge: "at least {}", Gt: "more than {}", Le: "at most {}", Lt: "less than {}"}
    limits: list[str] = []
    if get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            limits += _bounds(member)
    elif get_origin(annotation) is Annotated:
        for constraint in get_args(annotation)[1:]:
            for kind, text in words.items():
                if isinstance(constraint, kind):
                    limits.append(text.format(getattr(constraint, kind.__name__.lower())))
    return limits


def expected(field: FieldInfo) -> str:
    """Says what a field takes: ``a whole number, at least 1, or auto``."""
    annotation = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]  # type: ignore[assignment]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    parts = [names[a] for a in alternatives(annotation) if a in names]
    if any(get_origin(a) is tuple for a in alternatives(annotation)):
        parts = ["a path of a JSON file", "a list of concepts in JSON"]
    text = ", ".join([" or ".join(parts), *_bounds(annotation)]).strip(", ")
    listed = [str(choice) for choice in choices(annotation)]
    if type(None) in alternatives(annotation):
        listed.append("None")
    if not listed:
        return text
    return f"{text}, or {' or '.join(listed)}" if text else f"one of {', '.join(listed)}"
