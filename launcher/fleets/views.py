"""Views of a followed fleet: plain lines, or a live table in a terminal or a notebook."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Callable
from html import escape
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import TransferError
from launcher.fleets.jobs import WAITING
from launcher.fleets.status import FleetStatus
from launcher.jobs.views import LiveView, Pictures, clock_text, in_notebook

# Reasons of failures that are shown, the commonest first.
_REASONS = 5
# Seconds between two subjects whose pictures are fetched: each takes some requests.
_PICTURES_PAUSE = 600.0
Draw = Callable[[str], Pictures]


def rows(status: FleetStatus) -> list[tuple[str, str]]:
    """What a table shows: words, and what is known."""
    count = status.jobs_at_work
    waiting = sum(each == WAITING for each in status.jobs.values())
    queued = f", {waiting} jobs in the queue" if waiting else ""
    left = "not known yet" if status.seconds_left is None else f"about {clock_text(status.seconds_left)}"
    return [
        ("done", str(len(status.done))),
        ("running", f"{len(status.running)} in {count} job{'s' * (count != 1)}"),
        ("remaining", f"{len(status.remaining)}{queued}"),
        ("failed", str(len(status.failed))),
        *((f"  {number} x", reason) for reason, number in reasons(status)),
        *([("cost so far", f"${status.dollars:.2f}")] if status.dollars is not None else []),
        *([("time left", left)] if status.running or status.remaining else []),
    ]


def reasons(status: FleetStatus) -> list[tuple[str, int]]:
    """The first lines of what subjects have failed with, and how many with each; the commonest first."""
    found: dict[str, int] = {}
    for reason in status.failed.values():
        line = (reason.splitlines() or [""])[0]
        found[line] = found.get(line, 0) + 1
    return sorted(found.items(), key=lambda entry: -entry[1])[:_REASONS]


class FleetLines(LiveView[FleetStatus]):
    """A line whenever something has changed.

    Args:
        name: of the fleet.
    """

    def __init__(self, name: str, write: Callable[[str], None]) -> None:
        super().__init__(write)
        self._name, self._told = name, ""

    def show(self, standing: FleetStatus) -> None:
        if (line := standing.line()) != self._told:
            self._told = line
            cost = f", ${standing.dollars:.2f} so far" if standing.dollars is not None else ""
            left = standing.seconds_left if standing.running or standing.remaining else None
            self._write(f"{self._name}: {line}{cost}{f', about {clock_text(left)} left' if left is not None else ''}")


class FleetTable(LiveView[FleetStatus]):
    """A table that stays at the bottom of the terminal, below the lines."""

    def __init__(self, name: str) -> None:
        from rich.live import Live

        self._name = name
        self._live = Live(auto_refresh=False)

    def __enter__(self) -> FleetTable:
        self._live.start()
        return self

    def say(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, standing: FleetStatus) -> None:
        from rich.markup import escape as plain
        from rich.table import Table

        table = Table(title=plain(self._name), show_header=False)
        for words, known in rows(standing):
            table.add_row(words, plain(known))
        self._live.update(table, refresh=True)

    def __exit__(self, *_: object) -> None:
        self._live.stop()


class FleetPage(LiveView[FleetStatus]):
    """One output below the cell, replaced as the fleet advances, with pictures of a subject that was done last.

    Args:
        name: of the fleet.
        draw: pictures of a subject.
    """

    def __init__(self, name: str, draw: Draw) -> None:
        self._name, self._draw = name, draw
        self._line, self._pictures = "", ""
        self._latest: str | None = None
        self._due = 0.0
        self._handle: Any = None

    def say(self, line: str) -> None:
        self._line = line

    def show(self, standing: FleetStatus) -> None:
        import IPython.display

        notebook: Any = IPython.display
        if standing.latest not in (None, self._latest) and time.monotonic() >= self._due:
            self._latest, self._due = standing.latest, time.monotonic() + _PICTURES_PAUSE
            self._pictures = self._pictures_of(standing.latest)
        html = notebook.HTML(fleet_html(self._name, standing, self._line) + self._pictures)
        if self._handle is None:
            self._handle = notebook.display(html, display_id=True)
        else:
            self._handle.update(html)

    def _pictures_of(self, subject: str) -> str:
        try:
            sheet = self._draw(subject)._repr_png_()
        except (UserError, TransferError) as error:  # the table is worth more
            return f"<div>{escape(f'{subject}: no pictures: {error}')}</div>"
        return _image(sheet, subject) if sheet else ""


def fleet_html(name: str, status: FleetStatus, line: str = "") -> str:
    """A fleet as a piece of HTML: its name, the table, and the last line of its log."""
    cells = "".join(
        f'<tr><td style="text-align:left">{escape(words)}</td><td style="text-align:left">{escape(known)}</td></tr>'
        for words, known in rows(status)
    )
    return (
        f'<div style="font-family:sans-serif"><b>{escape(name)}</b><table>{cells}</table>'
        f"<div>{escape(line)}</div></div>"
    )


def _image(png: bytes, subject: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<div>{escape(subject)}:</div><img alt="{escape(subject)}" src="{source}">'


def choose_table(name: str, write: Callable[[str], None] | None, draw: Draw) -> LiveView[FleetStatus]:
    """The view for where this process runs; plain lines to ``write`` where one is given."""
    if write is not None:
        return FleetLines(name, write)
    if in_notebook():
        return FleetPage(name, draw)
    if sys.stdout.isatty():
        try:
            return FleetTable(name)
        except ImportError:
            pass
    return FleetLines(name, lambda line: print(line, flush=True))
