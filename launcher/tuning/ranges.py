"""What is searched over: ranges of hyperparameters, by their own declarations or as they are given."""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.declare import Tunable, meaning
from dreambooth_sm.knobs.takes import alternatives, choices

# Names, for ranges as they are declared; or names to a range: two numbers (and ``"log"`` or ``"linear"``) as a tuple, a
# list of values, or None for that of the declaration.
Ranges = Sequence[str] | Mapping[str, Any]

_SCALES = {"log": True, "linear": False}
# The limits of CreateHyperParameterTuningJob.
MAX_RANGES, MAX_CHOICES = 30, 30
# Settings at the ends of all ranges that are checked together; of more, those at the ends of one range at a time.
_MOST_SETTINGS = 256
_FIELDS = Hyperparameters.model_fields


@dataclass(frozen=True)
class Range:
    """A range of one hyperparameter.

    Attributes:
        values: the least and the greatest of numbers, or all of a few values.
        kind: as SageMaker calls it.
        logarithmic: whether numbers are evenly spread on a logarithmic scale.
    """

    name: str
    values: tuple[Any, ...]
    kind: Literal["Continuous", "Integer", "Categorical"]
    logarithmic: bool = False

    @property
    def words(self) -> str:
        """For people: ``learning_rate 2.5e-05 to 0.0005, logarithmic``."""
        if self.kind == "Categorical":
            return f"{self.name} {', '.join(map(_text, self.values))}"
        least, most = self.values
        return f"{self.name} {least:g} to {most:g}{', logarithmic' if self.logarithmic else ''}"

    @property
    def request(self) -> dict[str, Any]:
        """An entry of ParameterRanges."""
        if self.kind == "Categorical":
            return {"Name": self.name, "Values": [_text(value) for value in self.values]}
        least, most = map(_text, self.values)
        scaling = "Logarithmic" if self.logarithmic else "Linear"
        return {"Name": self.name, "MinValue": least, "MaxValue": most, "ScalingType": scaling}


def parameter_ranges(ranges: Sequence[Range]) -> dict[str, list[dict[str, Any]]]:
    """SageMaker's ParameterRanges."""
    kinds = ("Integer", "Continuous", "Categorical")
    return {f"{kind}ParameterRanges": [each.request for each in ranges if each.kind == kind] for kind in kinds}


def parse_ranges(words: Sequence[str]) -> dict[str, Any]:
    """Reads ranges as a command line has them: ``NAME``, ``NAME=1e-5..1e-3``, ``NAME=4..64:linear``, ``NAME=a,b,c``.

    Raises:
        UserError: for ends that are not numbers, and names that are given twice.

    Examples:
        >>> parse_ranges(["lora_rank", "learning_rate=1e-5..1e-3", "lora_targets=attention,linear"])
        {'lora_rank': None, 'learning_rate': (1e-05, 0.001), 'lora_targets': ['attention', 'linear']}
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    for word in words:
        name, equals, text = word.partition("=")
        if name in found:
            problems.append(f"ranges: {name} is given twice; keep one")
        ends, _, scale = text.partition(":")
        least, dots, most = ends.partition("..")
        if not equals:
            found[name] = None
        elif not dots:
            found[name] = text.split(",")
        else:
            try:
                found[name] = (_read_number(least), _read_number(most), *([scale] if scale else []))
            except ValueError:
                problems.append(f"ranges: {word}: set two numbers, as {name}=1e-5..1e-3, or values, as {name}=a,b")
    if problems:
        raise UserError(problems)
    return found


def _read_number(text: str) -> float:
    return int(text) if text.strip().isdecimal() else float(text)


def read_ranges(ranges: Ranges | None, h: Hyperparameters) -> list[Range]:
    """Reads ranges, and checks each by itself.

    Args:
        ranges: None: those that are declared of what is not set, and matters to the job.
        h: what all trials have.

    Raises:
        UserError: with everything that is wrong with them.
    """
    if isinstance(ranges, str):
        ranges = [ranges]
    given = dict.fromkeys(_declared(h)) if ranges is None else ranges
    named: dict[str, Any] = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given)
    problems, found = Problems(), list[Range]()
    if not named:
        problems.found.append("ranges is empty; name hyperparameters to search over, such as learning_rate")
    if len(named) > MAX_RANGES:
        problems.found.append(f"ranges: SageMaker searches over at most {MAX_RANGES}, and these are {len(named)}")
    for name, value in named.items():
        with problems.collected():
            _check_name(name, h)
            found.append(_read(name, value, h))
    problems.raise_any()
    return found


def settings(ranges: Sequence[Range]) -> Iterator[dict[str, Any]]:
    """Values at the ends of ranges: all together where they are few, else those of one range at a time."""
    if math.prod(len(each.values) for each in ranges) <= _MOST_SETTINGS:
        for values in itertools.product(*(each.values for each in ranges)):
            yield {each.name: value for each, value in zip(ranges, values, strict=True)}
        return
    first = {each.name: each.values[0] for each in ranges}
    for each in ranges:
        for value in each.values:
            yield {**first, each.name: value}


def _declared(h: Hyperparameters) -> list[str]:
    """Names of what may be searched over and is not set, where it matters to the job."""
    names = Hyperparameters.names_where(
        lambda said: said.tunable is not None and (not said.methods or h.method in said.methods)
    )
    return [name for name in names if name not in h.model_fields_set and not _without_effect(name, h)]


def _without_effect(name: str, h: Hyperparameters) -> str | None:
    """Why other values of a hyperparameter would change nothing, or nothing that is worth a search."""
    if name == "prior_loss_weight" and not h.prior_preservation:
        return "this job trains on no class"
    if name == "learning_rate" and h.optimizer == "prodigy":
        return "optimizer=prodigy finds the learning rate"
    return None


def _check_name(name: str, h: Hyperparameters) -> None:
    """Raises UserError for what can't be searched over."""
    if name not in _FIELDS:
        near = difflib.get_close_matches(str(name), _FIELDS, n=1, cutoff=0.6)
        raise UserError(f"ranges: {name} is not a hyperparameter{f'; did you mean {near[0]}?' if near else ''}")
    said, kinds = meaning(_FIELDS[name]), alternatives(_FIELDS[name].annotation)
    if said.methods and h.method not in said.methods:
        owners = " or ".join(said.methods)
        raise UserError(
            f"ranges: {name} belongs to method={owners}, and this job's is {h.method}; leave {name} out of ranges"
        )
    if said.path or said.text or (not {int, float, bool} & {*kinds} and not choices(_FIELDS[name].annotation)):
        raise UserError(f"ranges: {name} is not a number or one of a few values, which alone can be searched over")
    if said.resume == "free" and not said.tunable:
        raise UserError(f"ranges: {name} changes nothing of what is learned; leave it out of ranges")
    if name in h.model_fields_set:
        raise UserError(f"ranges: {name} is set, and searched over as well; leave one of the two out")
    if why := _without_effect(name, h):
        raise UserError(f"ranges: {name} would change nothing, as {why}; leave it out of ranges")


def _read(name: str, value: Any, h: Hyperparameters) -> Range:
    said, annotation = meaning(_FIELDS[name]), _FIELDS[name].annotation
    kinds = {*alternatives(annotation)}
    if value is None and said.tunable:
        return _interval(name, *_moved(name, said.tunable, h), said.tunable.logarithmic)
    if value is None and not {int, float} & kinds:
        return _choice(name, [True, False] if bool in kinds else choices(annotation))
    if isinstance(value, list | set | frozenset):
        return _choice(name, list(value))
    match value:
        case (int() | float() as least, int() | float() as most) if {int, float} & kinds:
            return _interval(name, least, most, bool(said.tunable and said.tunable.logarithmic))
        case (int() | float() as least, int() | float() as most, str() as scale) if scale in _SCALES:
            return _interval(name, least, most, _SCALES[scale])
    wrong = f"{name} has no range of its own" if value is None else f"{name}: {value!r} is not a range"
    raise UserError(f"ranges: {wrong}; set (least, most), (least, most, 'log'), or a list of values")


def _interval(name: str, least: float, most: float, logarithmic: bool) -> Range:
    whole = int in alternatives(_FIELDS[name].annotation)
    if not math.isfinite(least) or not math.isfinite(most) or least >= most:
        raise UserError(f"ranges: {name}: {least:g} to {most:g} is not a range; set the least value first")
    if logarithmic and least <= 0:
        raise UserError(f"ranges: {name}: a logarithmic range begins above 0; set a greater least value, or 'linear'")
    if not whole:
        return Range(name, (float(least), float(most)), "Continuous", logarithmic)
    if least != int(least) or most != int(most):
        raise UserError(f"ranges: {name} takes whole numbers; set {int(least)} to {int(most)}")
    return Range(name, (int(least), int(most)), "Integer", logarithmic)


def _choice(name: str, values: list[Any]) -> Range:
    if not values or len(values) > MAX_CHOICES or len({_text(value) for value in values}) < len(values):
        raise UserError(f"ranges: {name}: set 1 to {MAX_CHOICES} values, each once")
    return Range(name, tuple(values), "Categorical")


def _moved(name: str, tunable: Tunable, h: Hyperparameters) -> tuple[float, float]:
    """The declared range, moved to the default that the method, the model or the optimizer has instead."""
    declared, default = _FIELDS[name].default, getattr(h, name)
    if not tunable.logarithmic or not declared or not default:
        return tunable.least, tunable.most
    factor = default / declared
    return float(f"{tunable.least * factor:.4g}"), float(f"{tunable.most * factor:.4g}")


def _text(value: Any) -> str:
    """As hyperparameters are sent: :meth:`Hyperparameters.to_sagemaker`."""
    return value if isinstance(value, str) else json.dumps(value)
