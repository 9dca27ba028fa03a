"""Messages about input that can't be used."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dreambooth_sm.knobs.concepts import Concept
from dreambooth_sm.knobs.takes import expected

_PLAIN = re.compile(r"[\w.-]{1,100}")
_LONGEST_NAME = 64


def short(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]} … ({len(text):,} characters)"


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def unknown(key: str, known: Sequence[str]) -> str:
    near = near_name(key.lower().replace("-", "_"), known)
    hint = f"did you mean {near}?" if near else "`python -m dreambooth_sm.hyperparameters` lists those that exist"
    return f"{key if re.fullmatch(_PLAIN, key) else short(key)}: unknown hyperparameter; {hint}"


def near_name(name: str, known: Sequence[str]) -> str | None:
    """The known name that somebody who wrote ``name`` probably meant. Longer texts are not misspelled names."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) <= _LONGEST_NAME else []
    return near[0] if near else None


def readable(error: ValidationError, model: type[BaseModel], values: Mapping[str, object]) -> list[str]:
    """One line for each field that pydantic refused, in the reader's words."""
    lines: dict[str, str] = {}
    for detail in error.errors():
        name = str(detail["loc"][0])
        if name == "concepts_list":
            where = ".".join(
                str(part) for part in detail["loc"] if part in Concept.model_fields or isinstance(part, int)
            )
            if detail["type"] == "extra_forbidden":
                key = str(detail["loc"][-1])
                lines[name] = f"concepts_list: {key!r} is not a key of a concept; set {', '.join(Concept.model_fields)}"
            else:
                lines.setdefault(
                    name,
                    f"concepts_list: item {short(where or values[name])} is not valid; set a JSON list of "
                    f"{{{', '.join(Concept.model_fields)}}}, or the path of a file that holds one",
                )
            continue
        lines[name] = not_valid(name, values.get(name), model.model_fields[name])
    return list(lines.values())


def not_valid(name: str, value: object, field: FieldInfo) -> str:
    """Says that a value is not one of its type's."""
    shown = "no value" if value is None else short(value)
    return f"{name}: {shown} is not valid; set {expected(field)}"
