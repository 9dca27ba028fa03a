"""Views of a followed job: plain lines, a terminal with rich, or a notebook."""

from __future__ import annotations

import io
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from launcher.jobs.progress import Progress

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
# Lines of the log that a notebook shows, and seconds between two of its pictures of the job.
_NOTEBOOK_LINES, _NOTEBOOK_PAUSE = 12, 0.5
# Pictures in a row, and the side of each in pixels.
_COLUMNS, _TILE = 5, 160


@dataclass(frozen=True)
class Standing:
    """A job at one moment.

    Attributes:
        status, doing: SageMaker's TrainingJobStatus and SecondaryStatus.
        progress: what the job's lines say.
        seconds: that it has run.
        cost: dollars so far; None where the price is not known.
    """

    status: str
    doing: str
    progress: Progress
    seconds: float
    cost: float | None

    def words(self) -> list[str]:
        """``step 120/800``, ``loss 0.0831``, ``2:05 left``, ``$0.03``: what is known of it."""
        progress, words = self.progress, []
        if progress.step:
            words.append(f"step {progress.step}/{progress.steps or '?'}")
        if progress.loss is not None:
            words.append(f"loss {progress.loss:.4f}")
        if self.status == "InProgress" and progress.phase == "train" and progress.seconds_left is not None:
            words.append(f"{clock_text(progress.seconds_left)} left")
        words.append(clock_text(self.seconds))
        if self.cost is not None:
            words.append(f"${self.cost:.2f}")
        return words

    @property
    def activity(self) -> str:
        """What the job does now: the phase that it names itself, else SageMaker's word."""
        progress = self.progress
        if self.doing != "Training" or not progress.phase:
            return self.doing
        part = f" {progress.done}/{progress.total}" if progress.total and progress.phase != "train" else ""
        return progress.phase.replace("_", " ") + part


class LiveView(AbstractContextManager["LiveView[T]"], Generic[T]):
    """Plain lines, each one as the job wrote it.

    Args:
        write: takes a line without its end.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def say(self, line: str) -> None:
        """A line of the log."""
        self._write(line)

    def show(self, standing: T) -> None:
        """Shows where it stands now."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """It has ended, or nobody follows it any more."""


JobView = LiveView[Standing]


class Display(AbstractContextManager["Display[T]"], Generic[T]):
    """A view whose own errors end nothing but itself: the job that it shows continues, and so does following it.

    Args:
        view: where the job is shown.
    """

    def __init__(self, view: LiveView[T]) -> None:
        self._view: LiveView[T] | None = view

    def __enter__(self) -> Display[T]:
        self._try(lambda view: view.__enter__())
        return self

    def say(self, line: str) -> None:
        """A line of the job's log, or about following it."""
        self._try(lambda view: view.say(line))

    def show(self, standing: Callable[[], T]) -> None:
        """Shows where the job stands now."""
        self._try(lambda view: view.show(standing()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._try(lambda view: view.__exit__(kind, error, trace))

    def _try(self, part: Callable[[LiveView[T]], object]) -> None:
        if self._view is None:
            return
        try:
            part(self._view)
        except Exception as error:
            self._view = None
            warnings.warn(
                f"the job's lines can't be shown ({type(error).__name__}: {error}); it is followed without them",
                RuntimeWarning,
                stacklevel=2,
            )


class TerminalView(JobView):
    """The lines, above a bar that stays at the bottom of the terminal."""

    def __init__(self, name: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(TextColumn(name), BarColumn(), TextColumn("{task.description}"))
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> TerminalView:
        self._bar.start()
        return self

    def say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, standing: Standing) -> None:
        self._bar.update(
            self._task,
            description=" · ".join([standing.activity, *standing.words()]),
            total=standing.progress.steps,
            completed=standing.progress.step,
        )

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class NotebookView(JobView):
    """One output below the cell, replaced as the job advances; it needs no widgets and stays in the saved notebook."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines: deque[str] = deque(maxlen=_NOTEBOOK_LINES)
        self._standing: Standing | None = None
        self._due = 0.0
        self._handle: Any = None

    def say(self, line: str) -> None:
        self._lines.append(line)

    def show(self, standing: Standing) -> None:
        self._standing = standing
        if time.monotonic() >= self._due:
            self._draw()

    def __exit__(self, *_: object) -> None:
        if self._standing:
            self._draw()

    def _draw(self) -> None:
        import IPython.display

        notebook: Any = IPython.display
        assert self._standing is not None
        html = notebook.HTML(job_html(self._name, self._standing, list(self._lines)))
        if self._handle is None:
            self._handle = notebook.display(html, display_id=True)
        else:
            self._handle.update(html)
        self._due = time.monotonic() + _NOTEBOOK_PAUSE


_COLORS = {"Completed": "#2e7d32", "Failed": "#c62828", "Stopped": "#ef6c00"}


def job_html(name: str, standing: Standing, lines: list[str]) -> str:
    """A job as a piece of HTML: name and state, bar, figures, and the last lines of its log."""
    color = _COLORS.get(standing.status, "#1565c0")
    percent = 100 * (standing.progress.fraction or 0)
    state = standing.activity if standing.status == "InProgress" else standing.status
    return (
        '<div style="max-width:60em;font-family:sans-serif">'
        f'<b>{escape(name)}</b> <span style="color:{color}">{escape(state)}</span>'
        f'<div style="background:#8884;height:6px;margin:6px 0"><div style="background:{color};height:6px;'
        f'width:{percent:.0f}%"></div></div>'
        f"<div>{escape(' · '.join(standing.words()))}</div>"
        f'<pre style="font-size:85%;margin:6px 0;white-space:pre-wrap">{escape(chr(10).join(lines))}</pre></div>'
    )


class Pictures(list["Image.Image"]):
    """Pictures; as the last value of a notebook's cell they are shown in rows."""

    def _repr_png_(self) -> bytes | None:
        from PIL import Image, ImageOps

        if not self:
            return None
        columns = min(_COLUMNS, len(self))
        rows = -(-len(self) // columns)
        sheet = Image.new("RGB", (columns * _TILE, rows * _TILE), "white")
        for place, picture in enumerate(self):
            row, column = divmod(place, columns)
            sheet.paste(
                ImageOps.pad(picture.convert("RGB"), (_TILE, _TILE), color="white"), (column * _TILE, row * _TILE)
            )
        file = io.BytesIO()
        sheet.save(file, "png")
        return file.getvalue()


class Page(str):
    """An HTML page; as the last value of a notebook's cell it is shown in a frame of its own."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self)}" sandbox="" style="width:100%;height:40em;border:0"></iframe>'


def choose_view(name: str, write: Callable[[str], None] | None) -> JobView:
    """The view for where this process runs; plain lines to ``write`` where one is given."""
    if write is not None:
        return JobView(write)
    if in_notebook():
        return NotebookView(name)
    if sys.stdout.isatty():
        try:
            return TerminalView(name)
        except ImportError:
            pass
    return JobView(lambda line: print(line, flush=True))


def in_notebook() -> bool:
    """Whether the cells of a notebook show what this process displays."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def clock_text(seconds: float) -> str:
    """A time in minutes, or in hours: ``2:05`` or ``1:02:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
