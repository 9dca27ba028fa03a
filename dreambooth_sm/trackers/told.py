"""Tells trackers of a job: listeners of its report, each with a thread of its own.

A tracker that fails costs the job one warning, and one that hangs some seconds at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dreambooth_sm.background import Background
from dreambooth_sm.context import Context
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, StopRequested, UserError
from dreambooth_sm.importing import importing
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.printing import redact
from dreambooth_sm.report import RUN_ID, Listener, Reporter, ValidationPicture
from dreambooth_sm.trackers.kinds import TRACKERS, TrackedRun, Tracker
from dreambooth_sm.trackers.needs import is_online, tracking_uri

JobSettings = dict[str, bool | float | str]

# Seconds that all trackers together may keep a job that ends, and one that was stopped: SageMaker kills it soon.
_LONGEST_WAIT, _SHORTEST_WAIT = 60.0, 20.0


class ToldTracker(Listener):
    """Tells one tracker what the report is told, in the background.

    Args:
        report: is warned where the tracker fails, and remembers the run's id.
    """

    def __init__(self, tracker: Tracker, run: TrackedRun, settings: JobSettings, report: Reporter) -> None:
        self._tracker, self._report = tracker, report
        self._has_started = self._has_failed = False
        self._background: Background[Callable[[], object]] = Background(f"tells {tracker.name}", self._act)
        self._background.start()
        self._background.add(partial(self._start, run, settings))

    def measured(self, values: Mapping[str, object]) -> None:
        step, measures = measures_of(values)
        if measures:
            self._tell(self._tracker.measure, measures, step)

    def drew(self, pictures: Sequence[ValidationPicture]) -> None:
        self._tell(self._tracker.show, list(pictures))

    def finished(self, facts: Mapping[str, Any], directory: Path) -> None:
        self._tell(self._tracker.report, facts, directory)

    def end(self, code: int) -> None:
        """Ends the run, when all else was told."""
        self._tell(self._tracker.finish, code)

    def wait(self, deadline: float) -> None:
        """Waits until everything was told.

        Args:
            deadline: of the monotonic clock.
        """
        if not self._background.close(max(0.0, deadline - time.monotonic())):
            self._background.take_back()
            self._warn("it did not take everything before the job's end")

    def _tell(self, call: Callable[..., object], *arguments: Any) -> None:
        self._background.add(lambda: call(*arguments) if self._has_started else None)

    def _start(self, run: TrackedRun, settings: JobSettings) -> None:
        found = self._tracker.start(run, settings)
        self._has_started = True
        if RUN_ID.fullmatch(found):  # checkpoints hold no others
            self._report.runs[self._tracker.name] = found
        self._report.metrics(tracker=self._tracker.name, run=found)

    def _act(self, tell: Callable[[], object]) -> None:
        try:
            tell()
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._report.warn(f"{self._tracker.name} is not told everything: {reason}")


@contextlib.contextmanager
def told_trackers(job: Context, plan: Plan, step: int) -> Iterator[None]:
    """Inside, the trackers that ``report_to`` names are told of the job.

    Args:
        step: that the job is resumed after.
    """
    told: list[ToldTracker] = []
    with tempfile.TemporaryDirectory(prefix="trackers-", ignore_cleanup_errors=True) as scratch:
        if job.world.is_main:
            told += _begin(job, plan, step, Path(scratch))
        code = EXIT_OK
        try:
            yield
        except BaseException as error:
            code = _code(error)
            raise
        finally:
            job.report.listeners = [each for each in job.report.listeners if each not in told]
            deadline = time.monotonic() + (_SHORTEST_WAIT if code == EXIT_STOPPED else _LONGEST_WAIT)
            for tracker in told:
                tracker.end(code)
            for tracker in told:
                tracker.wait(deadline)


def _begin(job: Context, plan: Plan, step: int, scratch: Path) -> Iterator[ToldTracker]:
    settings = settings_of(job, plan)
    for name in job.h.trackers:
        try:
            with importing():
                tracker = TRACKERS[name]()
        except Exception as error:  # an installation that is broken
            job.report.warn(f"{name} is told nothing: {type(error).__name__}: {error}")
            continue
        told = ToldTracker(tracker, run_of(job, name, step, scratch), settings, job.report)
        job.report.listeners.append(told)
        yield told


def run_of(job: Context, tracker: str, step: int, scratch: Path) -> TrackedRun:
    """The run of a job: where an earlier attempt had one, that."""
    contract = job.contract
    is_named = contract.job_name != type(contract).job_name
    name = contract.subject or (contract.job_name if is_named else job.h.model_name)
    # Without what SageMaker mounts, beside the model.
    output = contract.base / "output" if contract.base.is_dir() else Path(job.h.models_path).parent
    return TrackedRun(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:100] or "job",
        project=job.h.tracking_project,
        uri=tracking_uri(job.h, os.environ),
        events=output / "tensorboard",
        files=scratch if is_online(os.environ) else output / "data",  # which SageMaker saves
        id=job.report.runs.get(tracker),
        step=step,
    )


def settings_of(job: Context, plan: Plan) -> JobSettings:
    """Hyperparameters and plan, as trackers take them; without what was not set, and without secrets."""
    values = job.h.told() | {f"plan.{name}": value for name, value in plan.settings().items()}
    plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v, default=str) for k, v in values.items()}
    told = {name: redact(value) if isinstance(value, str) else value for name, value in plain.items()}
    return {name: value for name, value in told.items() if values[name] is not None}


def measures_of(values: Mapping[str, object]) -> tuple[int, dict[str, float]]:
    """The measures of a metric line by a tracker's names, and their step; none of lines that tell something else."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    if "loss" in numbers:
        group, step = "train", numbers.pop("step")
    elif "candidate" in numbers:
        group, step = "fidelity", numbers.pop("candidate")
    else:
        return 0, {}
    return int(step), {f"{group}/{name}": number for name, number in numbers.items()}


def _code(error: BaseException) -> int:
    if isinstance(error, StopRequested):
        return EXIT_STOPPED
    return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
