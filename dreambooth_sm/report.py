"""The words of a running job: phases, metric lines, progress.

Numbers are lines of nothing but ``key=value`` pairs, so that CloudWatch's metric regexes, the demo and the tests read
the same stream. Words begin otherwise, and are made safe first: no file name or prompt in them passes for a number.
On a terminal a progress bar is drawn as well. Listeners are told the same: whoever shows it elsewhere.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, StringConstraints
from tqdm import tqdm

from dreambooth_sm.printing import redact, safe

Item = TypeVar("Item")
# A pair with the blank behind it; a value with blanks or quotes in it is a JSON text. Possessive: no line takes longer
# than its length.
_PAIR = re.compile(r'(\w++)=("(?:[^"\\]|\\.)*+"|[^\s"]\S*+)(?: |$)', re.ASCII)
_BARE = re.compile(r'[^\s"]\S*')
# What a metrics line of training can hold; the client makes CloudWatch metrics of them.
TRAINING_METRICS = ("step", "loss", "instance_loss", "prior_loss", "lr", "steps_per_s", "vram_gb")
# What a line of a measured model can hold (``selection.py``): the means over its subjects.
MEASURES = ("score", "subject", "prompt", "prior", "diversity")
# Ids of trackers' runs; one is a directory's name as well.
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
# Off a terminal a progress line is due when this share of the work is done.
_PROGRESS_SHARE = 0.25


def format_metrics(**values: object) -> str:
    """``step=120 loss=0.0831 lr=2e-06``: floats in four significant digits, None left out."""
    shown = {k: f"{v:.4g}" if isinstance(v, float) else safe(v) for k, v in values.items() if v is not None}
    return " ".join(f"{key}={_quoted(value)}" for key, value in shown.items())


def _quoted(value: str) -> str:
    return value if _BARE.fullmatch(value) else json.dumps(value, ensure_ascii=False)


def parse_metrics(line: str) -> dict[str, str]:
    """The pairs of a line of :func:`format_metrics`; none of any other line. Takes time in proportion to its length."""
    line = line.strip()
    pairs: dict[str, str] = {}
    position = 0
    while position < len(line):
        pair = _PAIR.match(line, position)
        if pair is None:
            return {}
        name, value = pair.groups()
        if value.startswith('"'):
            try:
                value = str(json.loads(value))
            except ValueError:
                return {}
        pairs[name] = value
        position = pair.end()
    return pairs


def metric_pattern(name: str) -> str:
    """A regular expression whose group is the number of ``name`` in a metrics line of training, and no other."""
    pairs = r"(?: \w+=[^\s\"]+)*"
    if name == "step":
        return rf"^step=([0-9]\S*) loss=[^\s\"]+{pairs}\s*$"
    return rf"^step=[0-9]\S*{pairs} {name}=([-+]?[0-9][^\s\"]*){pairs}\s*$"


def measure_pattern(name: str) -> str:
    """As :func:`metric_pattern`, of the lines of a measured model, and not of the base model, which has taken 0 steps.

    The last such line of a job is that of the model which it exports.
    """
    pairs = r"(?: \w+=[^\s\"]+)*"
    return rf"^(?:candidate=[1-9][0-9]*|best=[0-9]+){pairs} {name}=([-+]?[0-9][^\s\"]*){pairs}\s*$"


@dataclass(frozen=True)
class ValidationPicture:
    """One validation picture.

    Attributes:
        step: optimizer steps done; 0 for the base model.
        path: of the PNG, whose metadata names all of this.
    """

    step: int
    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Attempt:
    """One start of the job, as far as it counts: up to its end, or to the checkpoint that the next one resumed from.

    Attributes:
        started: UTC time in ISO 8601.
        first_step, last_step: optimizer steps done before and after it.
        seconds: wall-clock seconds of each phase, in order; so far, of one that had not ended.
        peak_host_memory_gb: in GB (1e9 bytes).
    """

    started: str
    first_step: int
    last_step: int
    seconds: dict[str, float]
    peak_host_memory_gb: float


class Listener:
    """Is told what a job measures, draws and finally reports, at once; returns at once, and raises nothing."""

    def measured(self, values: Mapping[str, object]) -> None:
        """Values of a metric line, by name; numbers of a step, or other facts."""

    def drew(self, pictures: Sequence[ValidationPicture]) -> None:
        """Pictures of one step, which lie where their paths say until the job uploads its model."""

    def finished(self, facts: Mapping[str, Any], directory: Path) -> None:
        """The report, which lies in the directory."""


class _Row(BaseModel):
    """A metrics line of training: numbers."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, int | float]

    step: Annotated[int, Ge(0)]
    loss: float


class _SampleRecord(BaseModel):
    """A :class:`ValidationPicture` whose path is a plain name, as this project gives it: no other file is meant."""

    model_config = ConfigDict(strict=True, extra="forbid")

    step: Annotated[int, Ge(0)]
    prompt: str
    seed: int
    path: Annotated[str, StringConstraints(pattern=r"^step-[0-9]+-prompt-[0-9]+-seed-[0-9]+-[0-9a-f]{8}\.png$")]


class Record(BaseModel):
    """The schema of what :meth:`Reporter.record` gives, for checking one that was perhaps written by others."""

    model_config = ConfigDict(strict=True, extra="forbid")

    steps: list[_Row] = []
    attempts: list[Attempt] = []
    samples: list[_SampleRecord] = []
    runs: dict[str, Annotated[str, StringConstraints(pattern=f"^{RUN_ID.pattern}$")]] = {}


class Reporter:
    """Writes the job's lines, and remembers what they say, over all attempts of the job.

    Args:
        stream: where to; standard output by default.

    Attributes:
        seconds: wall-clock seconds of each phase that has ended, in order; of this attempt.
        history: the values of each metric line, in order; of attempts before this one, those of training.
        samples: the validation pictures.
        earlier: the attempts before this one.
        verdicts: what was said of how well the model was trained.
        runs: names of the trackers that are told of the job, to the ids of their runs.
        listeners: are told what it is told.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.seconds: dict[str, float] = {}
        self.history: list[dict[str, object]] = []
        self.samples: list[ValidationPicture] = []
        self.earlier: list[Attempt] = []
        self.verdicts: list[str] = []
        self.runs: dict[str, str] = {}
        self.listeners: list[Listener] = []
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._first_step = 0
        self._running: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Writes a line; a stream that can take no more costs the line, not the job."""
        line = safe(text)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with suppress(OSError):
            tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=self.stream)
            self.stream.flush()

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def verdict(self, text: str) -> None:
        self.verdicts.append(redact(text))
        self.say(f"verdict: {text}")

    def metrics(self, **values: object) -> None:
        row = {key: value for key, value in values.items() if value is not None}
        self.history.append(row)
        self.say(format_metrics(**values))
        for listener in self.listeners:
            listener.measured(row)

    def drew(self, pictures: Sequence[ValidationPicture]) -> None:
        """Remembers validation pictures of one step."""
        self.samples += pictures
        self.metrics(validation=pictures[0].step, pictures=len(pictures))
        for listener in self.listeners:
            listener.drew(pictures)

    def finish(self, facts: Mapping[str, Any], directory: Path) -> None:
        """Tells listeners that the report is written."""
        for listener in self.listeners:
            listener.finished(facts, directory)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase and says its name at the start and its seconds at the end, also when it fails."""
        self._running[name] = time.monotonic()
        self.say(f"phase={name} state=started")
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - self._running.pop(name)
            self.say(format_metrics(phase=name, state="ended", seconds=self.seconds[name]))

    @property
    def training_rows(self) -> list[dict[str, object]]:
        """The metric lines of training, of all attempts."""
        return [row for row in self.history if "step" in row and "loss" in row]

    def attempts(self, step: int) -> list[Attempt]:
        """All attempts; the present one up to now, after ``step`` optimizer steps."""
        import resource  # not on Windows, where a client may import this module

        now = time.monotonic()
        seconds = self.seconds | {name: now - started for name, started in self._running.items()}
        rounded = {name: round(value, 2) for name, value in seconds.items()}
        memory = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
        return [*self.earlier, Attempt(self._started, self._first_step, step, rounded, memory)]

    def record(self, step: int) -> dict[str, Any]:
        """Returns what :meth:`resume` needs in an attempt that is resumed after ``step``, as JSON's types.

        Pictures are in it by name. See :class:`Record`.
        """
        return {
            "steps": self.training_rows,
            "attempts": [asdict(attempt) for attempt in self.attempts(step)],
            "samples": [asdict(sample) | {"path": sample.path.name} for sample in self.samples],
            **({"runs": dict(self.runs)} if self.runs else {}),
        }

    def resume(self, record: Mapping[str, Any], step: int, pictures: Path) -> None:
        """Takes over what earlier attempts had to tell, from their :meth:`record`.

        Args:
            step: that this attempt is resumed after.
            pictures: the directory that holds the earlier ones; what is missing there is left out.
        """
        self._first_step = step
        self.history += record.get("steps", [])
        self.earlier = [Attempt(**fields) for fields in record.get("attempts", [])]
        samples = [
            ValidationPicture(**fields | {"path": pictures / fields["path"]}) for fields in record.get("samples", [])
        ]
        self.samples = [sample for sample in samples if sample.path.is_file()]
        self.runs = dict(record.get("runs", {}))

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
