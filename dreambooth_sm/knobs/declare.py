"""The declaration of a knob: its default, its help text and what it means beyond its value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

Resume = Literal["same", "free"]
Check = TypeVar("Check", bound=Callable[[Any], Iterable[str]])


@dataclass(frozen=True)
class Alias:
    """Another name that a knob is accepted by.

    Attributes:
        takes: type of its values; None where they are the knob's own.
        means: to each of its values, those of the knob that agree with it. The first is meant where the knob is left
            out; none says nothing about the knob.
    """

    name: str
    takes: Any = None
    means: Mapping[Any, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tunable:
    """The range that a search for good values goes over, as it is for the declared default.

    Attributes:
        logarithmic: whether the values tried are evenly spread on a logarithmic scale. Where a method or a model
            has another default, the range moves with it, by the same factor.
    """

    least: float
    most: float
    logarithmic: bool = False


@dataclass(frozen=True)
class Meaning:
    """The meaning of a knob beyond its value.

    Attributes:
        resume: whether a job that is resumed from a checkpoint must have the value of the one that wrote it. ``free``
            is for what leaves the weights as they would have been (places, names, logs, memory and speed), and for
            what is compared otherwise (pictures by their content, the number of steps by the schedule).
        path: whether the value may be a path in the container, which lies elsewhere where the job runs without one.
        text: whether the value is a prompt, whose blanks may be escaped.
        common: whether people set it; short help texts show it.
        per_subject: whether the subjects of a fleet may have values of their own: neither plan nor model depends on it.
        tunable: where a search for good values looks; None where there is nothing to search for.
        methods: those that the knob is one of; all, where none is named.
        aliases: other names that it is accepted by.
    """

    resume: Resume = "same"
    path: bool = False
    text: bool = False
    common: bool = False
    per_subject: bool = False
    tunable: Tunable | None = None
    methods: tuple[str, ...] = ()
    aliases: tuple[Alias, ...] = ()

    def __call__(self, schema: JsonDict) -> None:
        """Tells the JSON schema of the field, as pydantic asks for it."""
        schema["resume"] = self.resume
        schema.update({name: True for name in ("path", "text", "common", "per_subject") if getattr(self, name)})
        if self.tunable:
            schema["tunable"] = asdict(self.tunable)
        if self.methods:
            schema["methods"] = list(self.methods)
        if self.aliases:
            schema["aliases"] = [alias.name for alias in self.aliases]


# Of options that are not knobs.
COMMON = Meaning(common=True)


def knob(
    default: Any,
    help: str,
    *,
    resume: Resume = "same",
    path: bool = False,
    text: bool = False,
    common: bool = False,
    per_subject: bool = False,
    tunable: Tunable | None = None,
    methods: tuple[str, ...] = (),
    aliases: tuple[Alias, ...] = (),
) -> Any:
    """A field of a group of knobs.

    Args:
        default: its value where it is left out.
        help: a sentence or two, in Markdown.
        resume, path, text, common, per_subject, tunable, methods, aliases: see :class:`Meaning`.
    """
    said = Meaning(
        resume=resume,
        path=path,
        text=text,
        common=common,
        per_subject=per_subject,
        tunable=tunable,
        methods=methods,
        aliases=aliases,
    )
    return Field(default, description=help, json_schema_extra=said)


def meaning(field: FieldInfo) -> Meaning:
    """Returns what the declaration of a field says; the usual for a field that is not a knob."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, Meaning) else Meaning()


def rule(*names: str) -> Callable[[Check], Check]:
    """Declares a method of a group as a rule: a line for each thing that is wrong with values that their types allow.

    Args:
        names: all knobs whose values the rule looks at. Where one of them is refused by itself, the rule is not asked:
            what it says would follow from that.

    Examples:
        >>> class Examples(Knobs):
        ...     group = "Examples"
        ...     least: int = knob(0, "Least value.")
        ...     most: int = knob(9, "Greatest value.")
        ...
        ...     @rule("least", "most")
        ...     def _in_order(self) -> Iterator[str]:
        ...         if self.least > self.most:
        ...             yield f"least={self.least} is more than most={self.most}; set most to {self.least} or more"
    """

    def declare(check: Check) -> Check:
        check.knobs = names  # type: ignore[attr-defined]
        return check

    return declare


def spellings(name: str, field: FieldInfo) -> list[str]:
    """The names that a knob's own values are accepted by; its own is the first."""
    return [name, *(alias.name for alias in meaning(field).aliases if alias.takes is None)]


def translated_aliases(fields: Mapping[str, FieldInfo]) -> dict[str, FieldInfo]:
    """The aliases with values of their own, as fields."""
    aliases = [alias for field in fields.values() for alias in meaning(field).aliases]
    return {alias.name: FieldInfo.from_annotation(alias.takes) for alias in aliases if alias.takes is not None}


class Knobs(BaseModel):
    """A group of knobs with the rules that they are under. It builds on the groups whose knobs its rules look at."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    # Heading of the knobs that a class declares, in the docs and in help texts.
    group: ClassVar[str]

    @classmethod
    def group_of(cls, name: str) -> str:
        """The heading that a knob is listed under."""
        classes = (each for each in cls.__mro__ if issubclass(each, Knobs))
        return next(each.group for each in classes if name in inspect.get_annotations(each))

    @classmethod
    def names_where(cls, wanted: Callable[[Meaning], bool]) -> list[str]:
        """Names of the knobs whose meaning is ``wanted``."""
        return [name for name, field in cls.model_fields.items() if wanted(meaning(field))]

    @classmethod
    def aliases(cls) -> dict[str, str]:
        """Other names that knobs are accepted by, to the knobs' own."""
        return {alias.name: name for name, field in cls.model_fields.items() for alias in meaning(field).aliases}

    @classmethod
    def rules(cls) -> dict[str, tuple[str, ...]]:
        """Names of the methods that are rules, to the knobs that each is about; in the groups' order."""
        methods = {name: value for each in reversed(cls.__mro__) for name, value in vars(each).items()}
        return {
            name: method.knobs
            for name, method in methods.items()
            if inspect.isfunction(method) and hasattr(method, "knobs")
        }

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, knobs in cls.rules().items():
            if unknown := set(knobs) - cls.model_fields.keys():
                raise TypeError(f"the rule {name} of {cls.__name__} is about knobs that do not exist: {unknown}")

    def conflicts(self, refused: Set[str] = frozenset()) -> list[str]:
        """Finds what is wrong with values that their types allow.

        Args:
            refused: knobs whose rules are not asked, as what they say would follow from a refused value.
        """
        asked = [name for name, knobs in self.rules().items() if refused.isdisjoint(knobs)]
        return [*self._knobs_of_other_methods(), *(line for name in asked for line in getattr(self, name)())]

    def _knobs_of_other_methods(self) -> Iterator[str]:
        fields, mine = type(self).model_fields, getattr(self, "method", None)
        for name in [name for name in fields if name in self.model_fields_set]:
            methods = meaning(fields[name]).methods
            if methods and mine not in methods:
                owners = " or ".join(methods)
                yield f"{name} belongs to method={owners}, and this job's is {mine}; leave {name} out"
