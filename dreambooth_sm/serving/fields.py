"""The fields of a JSON object, taken one by one; what is wrong with each is one line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dreambooth_sm.knobs.messages import near_name, short

Number = TypeVar("Number", int, None)
_NAME = re.compile(r"[\w][\w.-]{0,99}")
_MOST_ADAPTERS = 4


class Fields:
    """Fields of one request. A field that is null is one that is left out.

    Args:
        values: by name.
        problems: gets a line for each field that can't be used.

    Attributes:
        failed: names of these.
    """

    def __init__(self, values: Mapping[str, Any], problems: list[str]) -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._problems, self._asked = problems, set[str]()
        self.failed = set[str]()

    def _take(self, name: str) -> Any:
        self._asked.add(name)
        return self._values.get(name)

    def _fail(self, name: str, value: object, wanted: str) -> None:
        self.failed.add(name)
        self._problems.append(f"{name}: {short(value)} is not valid; set {wanted}")

    def whole(self, name: str, default: Number, low: int, high: int, multiple: int = 1) -> int | Number:
        """A whole number."""
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and low <= value <= high and value % multiple == 0:
            return value
        of = f" that is a multiple of {multiple}" if multiple > 1 else ""
        self._fail(name, value, f"a whole number from {low} to {high}{of}")
        return default

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number."""
        value = self._take(name)
        if value is None:
            return default
        if _is_number(value) and low <= value <= high:
            return float(value)
        self._fail(name, value, f"a number from {low:g} to {high:g}")
        return default

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._take(name)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self._fail(name, value, "true or false")
        return default

    def text(self, name: str, default: str | None, longest: int) -> str | None:
        """A text that text encoders can read."""
        value = self._take(name)
        if value is None:
            return default
        if _is_text(value, longest):
            return str(value)
        self._fail(name, value, f"a text of at most {longest} characters")
        return default

    def texts(self, name: str, longest: int, most: int) -> list[str] | None:
        """A list of texts."""
        value = self._take(name)
        if value is None:
            return None
        if isinstance(value, list) and 1 <= len(value) <= most and all(_is_text(each, longest) for each in value):
            return value
        self._fail(name, value, f"a list of 1 to {most} texts of at most {longest} characters")
        return None

    def text_or_texts(self, name: str, longest: int, most: int) -> list[str] | None:
        """A text, or a list of texts."""
        if isinstance(self._values.get(name), list):
            return self.texts(name, longest, most)
        text = self.text(name, None, longest)
        return None if text is None else [text]

    def choice(self, name: str, choices: Sequence[str], others: Mapping[str, str], shown: str | None = None) -> str:
        """One of some words; the first where nothing is said.

        Args:
            others: that stand for one of them.
            shown: what messages call the first.
        """
        value = self._take(name)
        if value is None:
            return choices[0]
        if isinstance(value, str) and (found := others.get(value, value)) in choices:
            return found
        words = dict.fromkeys([shown or choices[0], *choices[1:]])
        self._fail(name, value, f"one of {', '.join(words)}")
        return choices[0]

    def seeds(self, name: str, count: int) -> tuple[int, ...] | None:
        """A list of seeds, one for each picture."""
        value = self._take(name)
        if value is None:
            return None
        if isinstance(value, list) and len(value) == count and all(_is_seed(each) for each in value):
            return tuple(value)
        self._fail(name, value, f"a list of {count} whole numbers from 0, one for each picture")
        return (0,) * count

    def strengths(self, name: str) -> dict[str, float]:
        """Names of adapters, each with its strength: a name, a list of names, or an object of names and numbers."""
        value = self._take(name)
        if value is None:
            return {}
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            value = dict.fromkeys(value, 1.0)
        if (
            isinstance(value, dict)
            and len(value) <= _MOST_ADAPTERS
            and all(_NAME.fullmatch(each) for each in value)
            and all(_is_number(each) and abs(each) <= 10 for each in value.values())
        ):
            return {each: float(strength) for each, strength in value.items()}
        self._fail(name, value, f'at most {_MOST_ADAPTERS} names with strengths from -10 to 10, such as {{"zwx": 0.8}}')
        return {}

    def check_all_taken(self) -> None:
        """Fields that nobody asked for are problems."""
        for name in self._values.keys() - self._asked:
            near = near_name(name, sorted(self._asked - self._values.keys()))
            self._problems.append(
                f"{short(name)}: unknown field; {f'did you mean {near}?' if near else 'leave it out'}"
            )


def is_adapter_name(name: str) -> bool:
    """Whether a text may be the name of an adapter: a file's name, and no path."""
    return _NAME.fullmatch(name) is not None


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_seed(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: object, longest: int) -> bool:
    if not isinstance(value, str) or len(value) > longest:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
