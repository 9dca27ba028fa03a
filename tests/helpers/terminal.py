"""A terminal in place of this process's standard output."""

from __future__ import annotations

import io
import re
import sys

import pytest


class Terminal(io.StringIO):
    """What is written to it, for :attr:`shown` to read."""

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        """Without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*\w", "", self.getvalue())


def open_terminal(monkeypatch: pytest.MonkeyPatch, columns: int | None = None) -> Terminal:
    """Puts one there for a test."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    return screen
