"""Figures that were measured, with what measured them: ``measured/*.json``, written by the benchmarks (``--write``).

A file for each family of models, by its name; ``shared.json`` of what all families share; ``cards.json`` of what the
makers of the cards state.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

MEASURED = Path(__file__).with_name("measured")


class FigureError(ValueError):
    """A figure is missing or malformed; the message names its file and key."""


@dataclass(frozen=True)
class Figure:
    """One figure. What is not recorded is ``unknown``.

    Attributes:
        value: in the unit that the key ends with.
        by: the command that measured it, or how else it was found.
        card: the card that it was measured on.
        commit: of the code that was measured, or ``recorded in`` the one that first names the figure.
        date: of the measurement, or of that record.
    """

    value: float
    by: str
    card: str
    commit: str
    date: str


def figure(name: str, key: str) -> float:
    """The value of one figure.

    Args:
        name: of the file, without its ending: a family, ``shared`` or ``cards``.

    Raises:
        FigureError: where there is no such figure, or it can't be read.
    """
    path = MEASURED / f"{name}.json"
    found = _read_once(path).get(key)
    if found is None:
        raise FigureError(f"{path}: has no figure {key!r}")
    return found.value


def figures_below(name: str, start: str) -> dict[str, float]:
    """The values of all figures of a file whose keys begin so, by the rest of their keys."""
    found = _read_once(MEASURED / f"{name}.json")
    return {key.removeprefix(start): each.value for key, each in found.items() if key.startswith(start)}


def read_figures(path: Path) -> dict[str, Figure]:
    """All figures of a file, by their keys.

    Raises:
        FigureError: where the file or one of its figures can't be read.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FigureError(f"{path}: can't be read: {error}") from error
    if not isinstance(entries, dict):
        raise FigureError(f"{path}: is not an object of figures by their keys")
    return {key: _figure(path, key, entry) for key, entry in entries.items()}


_read_once = functools.cache(read_figures)
_SOURCE = [field.name for field in fields(Figure) if field.name != "value"]


def _figure(path: Path, key: str, entry: object) -> Figure:
    if not isinstance(entry, dict) or set(entry) != {"value", *_SOURCE}:
        raise FigureError(f"{path}: the figure {key!r} is not an object of value, {', '.join(_SOURCE)}")
    value = entry["value"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FigureError(f"{path}: the value of the figure {key!r} is not a number: {value!r}")
    for name in _SOURCE:
        if not isinstance(entry[name], str) or not entry[name]:
            raise FigureError(f"{path}: {name} of the figure {key!r} is not a text: {entry[name]!r}")
    return Figure(float(value), **{name: entry[name] for name in _SOURCE})
