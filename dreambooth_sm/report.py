"""What a running job tells people: phases, metric lines, progress.

Everything is one line of ``key=value`` pairs, so that CloudWatch's metric regexes, the demo and the tests read the
same stream; on a terminal a progress bar is drawn as well.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
_PAIR = re.compile(r"(\w+)=(\S+)")
# What a metrics line of training can hold; the client makes CloudWatch metrics of them.
TRAINING_METRICS = ("step", "loss", "instance_loss", "prior_loss", "lr", "steps_per_s", "vram_gb")
# Off a terminal a progress line is due when this share of the work is done.
_PROGRESS_SHARE = 0.25


def format_metrics(**values: object) -> str:
    """``step=120 loss=0.0831 lr=2e-06``: floats in four significant digits, None left out."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items() if v is not None}
    return " ".join(f"{key}={value}" for key, value in shown.items())


def parse_metrics(line: str) -> dict[str, str]:
    """The ``key=value`` pairs of a line."""
    return dict(_PAIR.findall(line))


def metric_pattern(name: str) -> str:
    """A regular expression whose group is the number of ``name`` in a line of :func:`format_metrics`."""
    return rf"(?:^|\s){name}=([-+]?[0-9]\S*)"


class Reporter:
    """Writes the job's lines.

    Args:
        stream: where to; standard output by default.

    Attributes:
        seconds: wall-clock seconds of each phase that has ended, in order.
        history: the values of each metric line, in order.
        verdicts: what was said of how well the model was trained.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.seconds: dict[str, float] = {}
        self.history: list[dict[str, object]] = []
        self.verdicts: list[str] = []

    def say(self, text: str) -> None:
        tqdm.write(text, file=self.stream)
        self.stream.flush()

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def verdict(self, text: str) -> None:
        self.verdicts.append(text)
        self.say(f"verdict: {text}")

    def metrics(self, **values: object) -> None:
        self.history.append({key: value for key, value in values.items() if value is not None})
        self.say(format_metrics(**values))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase and says its name at the start and its seconds at the end, also when it fails."""
        started = time.monotonic()
        self.say(f"phase={name} state=started")
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - started
            self.say(format_metrics(phase=name, state="ended", seconds=self.seconds[name]))

    def progress(self, items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
        """Passes items through: a bar on a terminal, a line at each quarter elsewhere."""
        if self.stream.isatty():
            yield from tqdm(items, total=total, desc=what, file=self.stream, leave=False)
            return
        due = _PROGRESS_SHARE
        for done, item in enumerate(items, start=1):
            yield item
            if done / total >= due:
                self.metrics(progress=what.replace(" ", "_"), done=done, total=total)
                due = (done / total // _PROGRESS_SHARE + 1) * _PROGRESS_SHARE
