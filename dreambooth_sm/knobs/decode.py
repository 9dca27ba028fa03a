"""What SageMaker, its SDKs, notebooks and command lines make of a value, undone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import get_origin

from pydantic.fields import FieldInfo

from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.concepts import decode_concepts
from dreambooth_sm.knobs.declare import meaning
from dreambooth_sm.knobs.escapes import unescape_prompt, unquote
from dreambooth_sm.knobs.takes import alternatives, choices

PLATFORM_KEY = re.compile(r"sagemaker_\w+|_tuning_\w+")


def platform_keys(raw: Mapping[str, object]) -> dict[str, object]:
    """SageMaker's own entries among the hyperparameters: ``sagemaker_*`` and ``_tuning_*``."""
    return {key: value for key, value in raw.items() if PLATFORM_KEY.fullmatch(key)}


def split_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """``["--a", "1", "--b=x y"]`` as ``{"a": "1", "b": "x y"}``.

    Raises:
        UserError: for words before the first ``--key`` and for keys given twice.
    """
    words: dict[str, list[str]] = {}
    problems: list[str] = []
    current: list[str] | None = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            key, equals, value = argument[2:].partition("=")
            if key in words:
                problems.append(f"--{key} is given twice; keep one")
            current = words[key] = [value] if equals else []
        elif current is None:
            problems.append(f"{argument!r} is no option; write --name value")
        else:
            current.append(argument)
    if problems:
        raise UserError(problems)
    return {key: " ".join(value) if value else "true" for key, value in words.items()}


def decode(value: object, field: FieldInfo) -> object:
    """Undoes what SageMaker and its SDKs did to a value on the way."""
    if isinstance(value, str):
        value = unquote(value)
        if type(None) in alternatives(field.annotation) and value.lower() in {"", "none", "null"}:
            return None
        if any(get_origin(each) is tuple for each in alternatives(field.annotation)):
            return decode_concepts(value)
        if meaning(field).text:
            return unescape_prompt(value) or None
        return _from_list(value, field)
    if isinstance(value, bool) and bool not in alternatives(field.annotation):
        return str(value)  # or pydantic would take True for the number 1
    return value


def _from_list(value: str, field: FieldInfo) -> object:
    """``FP16`` as ``fp16`` and ``"75"`` as 75: a value from a fixed list is matched as text, in small letters."""
    listed = {str(choice).lower(): choice for choice in choices(field.annotation)}
    return listed.get(value.lower(), value)
