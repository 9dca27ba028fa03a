"""Views of a followed tuning job: plain lines, or a live table in a terminal or a notebook."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from html import escape
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import TransferError
from launcher.jobs.views import LiveView, clock_text, in_notebook
from launcher.tuning.grid import TrialGrid
from launcher.tuning.status import Trial, TuningStatus, short

# Trials that a table shows; of more, the best and those that run.
_ROWS = 20
DrawGrid = Callable[[], TrialGrid]


def header(status: TuningStatus) -> list[str]:
    """The names of a table's columns."""
    names = list(dict.fromkeys(name for trial in status.trials for name in trial.values))
    return ["trial", status.objective, *names, "state", "time", *(["cost"] if status.dollars is not None else [])]


def rows(status: TuningStatus) -> list[list[str]]:
    """What a table shows of each trial: the best first, then those that run, then the others."""
    ranked = status.ranked()
    running = [trial for trial in status.trials if not trial.has_ended]
    others = [trial for trial in status.trials if trial.has_ended and trial not in ranked]
    return [_row(trial, status) for trial in [*ranked, *running, *others][:_ROWS]]


def _row(trial: Trial, status: TuningStatus) -> list[str]:
    names = list(dict.fromkeys(name for each in status.trials for name in each.values))
    cost = [f"${trial.dollars:.2f}" if trial.dollars is not None else ""] if status.dollars is not None else []
    return [
        str(trial.number),
        "" if trial.objective is None else f"{trial.objective:.4g}",
        *(short(trial.values.get(name, "")) for name in names),
        trial.status,
        clock_text(trial.seconds),
        *cost,
    ]


class TuningLines(LiveView[TuningStatus]):
    """A line whenever a trial has started or ended.

    Args:
        name: of the tuning job.
    """

    def __init__(self, name: str, write: Callable[[str], None]) -> None:
        super().__init__(write)
        self._name, self._told = name, ""
        self._states: dict[str, str] = {}

    def show(self, standing: TuningStatus) -> None:
        for trial in standing.trials:
            if trial.has_ended and self._states.get(trial.name) != trial.status:
                self._write(_ended_line(trial, standing.objective))
            self._states[trial.name] = trial.status
        if (line := standing.line()) != self._told:
            self._told = line
            cost = f", ${standing.dollars:.2f} so far" if standing.dollars is not None else ""
            self._write(f"{self._name}: {line}{cost}")


def _ended_line(trial: Trial, objective: str) -> str:
    value = "" if trial.objective is None else f"{objective} {trial.objective:.4g}, "
    reason = f": {(trial.reason.splitlines() or [''])[0]}" if trial.reason else ""
    return f"trial {trial.number}: {trial.status.lower()}, {value}{trial.words}{reason}"


class TuningTable(LiveView[TuningStatus]):
    """A table that stays at the bottom of the terminal, below the lines."""

    def __init__(self, name: str) -> None:
        from rich.live import Live

        self._name = name
        self._live = Live(auto_refresh=False)

    def __enter__(self) -> TuningTable:
        self._live.start()
        return self

    def say(self, line: str) -> None:
        self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, standing: TuningStatus) -> None:
        from rich.markup import escape as plain
        from rich.table import Table

        table = Table(title=plain(self._name), caption=plain(standing.line()))
        for name in header(standing):
            table.add_column(plain(name))
        for row in rows(standing):
            table.add_row(*map(plain, row))
        self._live.update(table, refresh=True)

    def __exit__(self, *_: object) -> None:
        self._live.stop()


class TuningPage(LiveView[TuningStatus]):
    """One output below the cell, replaced as trials end, with pictures of the best ones.

    Args:
        name: of the tuning job.
        draw: these pictures.
    """

    def __init__(self, name: str, draw: DrawGrid) -> None:
        self._name, self._draw = name, draw
        self._line, self._pictures = "", ""
        self._best: str | None = None
        self._handle: Any = None

    def say(self, line: str) -> None:
        self._line = line

    def show(self, standing: TuningStatus) -> None:
        import IPython.display

        notebook: Any = IPython.display
        if standing.best and standing.best.name != self._best:
            self._best = standing.best.name
            self._pictures = self._pictures_of_the_best()
        html = notebook.HTML(tuning_html(self._name, standing, self._line) + self._pictures)
        if self._handle is None:
            self._handle = notebook.display(html, display_id=True)
        else:
            self._handle.update(html)

    def _pictures_of_the_best(self) -> str:
        try:
            sheet = self._draw()._repr_png_()
        except (UserError, TransferError) as error:  # the table is worth more
            return f"<div>{escape(f'no pictures: {error}')}</div>"
        if not sheet:
            return ""
        return f'<img alt="the best trials" src="data:image/png;base64,{base64.b64encode(sheet).decode()}">'


def tuning_html(name: str, status: TuningStatus, line: str = "") -> str:
    """A tuning job as a piece of HTML: its name, how far it is, the table, and the last line of its log."""
    head = "".join(f'<th style="text-align:left">{escape(each)}</th>' for each in header(status))
    cells = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{escape(each)}</td>' for each in row) + "</tr>"
        for row in rows(status)
    )
    return (
        f'<div style="font-family:sans-serif"><b>{escape(name)}</b> {escape(status.status)}'
        f"<div>{escape(status.line())}</div><table><tr>{head}</tr>{cells}</table><div>{escape(line)}</div></div>"
    )


def choose_view(name: str, write: Callable[[str], None] | None, draw: DrawGrid) -> LiveView[TuningStatus]:
    """The view for where this process runs; plain lines to ``write`` where one is given."""
    if write is not None:
        return TuningLines(name, write)
    if in_notebook():
        return TuningPage(name, draw)
    if sys.stdout.isatty():
        try:
            return TuningTable(name)
        except ImportError:
            pass
    return TuningLines(name, lambda line: print(line, flush=True))
