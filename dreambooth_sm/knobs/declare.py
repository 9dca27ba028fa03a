"""How a knob is declared: its default, its help text and what it means beyond its value."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

Resume = Literal["same", "free"]


@dataclass(frozen=True)
class Meaning:
    """What a knob means beyond its value.

    Attributes:
        resume: whether a job that is resumed from a checkpoint must have the value of the one that wrote it. ``free``
            is for what leaves the weights as they would have been (places, names, logs, memory and speed), and for
            what is compared otherwise (pictures by their content, the number of steps by the schedule).
    """

    resume: Resume = "same"

    def __call__(self, schema: JsonDict) -> None:
        """Tells the JSON schema of the field, as pydantic asks for it."""
        schema["resume"] = self.resume


def knob(default: Any, help: str, *, resume: Resume = "same") -> Any:
    """A field of a group of knobs.

    Args:
        default: its value where it is left out.
        help: a sentence or two, in Markdown.
        resume: see :class:`Meaning`.
    """
    return Field(default, description=help, json_schema_extra=Meaning(resume))


def meaning(field: FieldInfo) -> Meaning:
    """What the declaration of a field says; the usual for a field that is no knob."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, Meaning) else Meaning()


class Knobs(BaseModel):
    """A group of knobs. It builds on the groups whose knobs it has to know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    # Heading of the knobs that a class declares, in the docs and in help texts.
    group: ClassVar[str]

    @classmethod
    def group_of(cls, name: str) -> str:
        """The heading that a knob is listed under."""
        classes = (each for each in cls.__mro__ if issubclass(each, Knobs))
        return next(each.group for each in classes if name in inspect.get_annotations(each))
