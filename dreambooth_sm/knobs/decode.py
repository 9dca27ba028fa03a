"""Undoes what SageMaker, its SDKs, notebooks and command lines make of a value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.concepts import decode_concepts
from dreambooth_sm.knobs.declare import Knobs, meaning, translated_aliases
from dreambooth_sm.knobs.escapes import is_text, texts, unescape_prompt, unquote
from dreambooth_sm.knobs.messages import not_valid, short, unknown
from dreambooth_sm.knobs.takes import alternatives, choices

# Keys that SageMaker and its SDKs add by themselves.
_PLATFORM_KEY = re.compile(r"sagemaker_\w+|_tuning_\w+")
# Unknown names that get a line of their own.
_MOST_UNKNOWN = 20


@dataclass
class Reading:
    """Raw values, as far as they could be read.

    Attributes:
        values: decoded, by the knobs' own names; their types are not checked.
        refused: knobs that were given a value that is not one of theirs.
    """

    values: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)


def read_values(knobs: type[Knobs], raw: Mapping[str, object]) -> Reading:
    """Raw values, decoded and by the knobs' own names; keys of the platform are left out."""
    found = Reading()
    origins: dict[str, str] = {}
    aliases, translated = knobs.aliases(), translated_aliases(knobs.model_fields)
    own = {key: value for key, value in raw.items() if not _PLATFORM_KEY.fullmatch(key)}
    strangers = [key for key in own if key not in knobs.model_fields and key not in aliases]
    for key, value in own.items():
        name = aliases.get(key, key)
        if name not in knobs.model_fields or key in translated:
            continue
        decoded = decode(value, knobs.model_fields[name])
        if name in found.values and found.values[name] != decoded:
            found.problems.append(f"{key} and {origins[name]} mean the same and have different values; keep one")
        elif not all(is_text(text) for text in texts(decoded)):
            found.problems.append(f"{key}: {short(decoded)} holds characters that are not text; set it again")
            found.refused.add(name)
        else:
            found.values[name] = decoded
            origins[name] = key
    for key in [key for key in own if key in translated]:
        _translate(key, decode(own[key], translated[key]), translated[key], knobs, found)
    known = [*knobs.model_fields, *aliases]
    found.problems += [unknown(key, known) for key in strangers[:_MOST_UNKNOWN]]
    if len(strangers) > _MOST_UNKNOWN:
        found.problems.append(f"{len(strangers) - _MOST_UNKNOWN} more unknown hyperparameters")
    return found


def _translate(key: str, value: object, takes: FieldInfo, knobs: type[Knobs], found: Reading) -> None:
    """Reads the value of an alias as one of its knob's, unless the knob has a value that agrees with it."""
    name = knobs.aliases()[key]
    field = knobs.model_fields[name]
    (alias,) = (alias for alias in meaning(field).aliases if alias.name == key)
    try:
        given = TypeAdapter(alias.takes).validate_python(value)
    except ValidationError:
        found.problems.append(not_valid(key, value, takes))
        found.refused.add(name)
        return
    agreeing = alias.means[given]
    own = found.values.get(name, "auto")
    if agreeing and own == "auto":  # or left out
        found.values[name] = agreeing[0]
    elif agreeing and own not in agreeing and own in choices(field.annotation):
        found.problems.append(f"{key}={str(given).lower()} and {name}={own} contradict each other; keep one of them")
        found.refused.add(name)


def platform_keys(raw: Mapping[str, object]) -> dict[str, object]:
    """SageMaker's own entries among the hyperparameters: ``sagemaker_*`` and ``_tuning_*``."""
    return {key: value for key, value in raw.items() if _PLATFORM_KEY.fullmatch(key)}


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
            problems.append(f"{argument!r} is not an option; options are given as --name value")
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
