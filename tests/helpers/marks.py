"""Marks of single parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(quick: Iterable[object], values: Iterable[Any]) -> list[Any]:
    """Parameters; all but the quick ones are marked ``slow``: `make check` keeps a few of an area that takes long.

    Raises:
        ValueError: a quick one is not among the values.
    """
    values, quick = list(values), list(quick)
    if strangers := [value for value in quick if value not in values]:
        raise ValueError(f"not among the parameters: {strangers}")
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = [() if value in quick else pytest.mark.slow for value in values]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]
