"""How far a tuning job is, and what its trials have come to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.jobs.outputs import ENDED

# Trials have numbers, which SageMaker puts between the tuning job's name and some digits of its own.
_NUMBER = re.compile(r".*-(\d+)-[0-9a-zA-Z]+")


@dataclass(frozen=True)
class Trial:
    """A training job of a tuning job.

    Attributes:
        name: of the training job.
        number: from 1 on, as they were started.
        values: what it was tried with, by the hyperparameters' names.
        status: SageMaker's TrainingJobStatus.
        objective: what it has come to so far; None before its first measure.
        seconds: that it has run.
        dollars: of its instances, on demand; None where that is not known.
        reason: why it failed; empty where it did not.
    """

    name: str
    number: int
    values: dict[str, str]
    status: str
    objective: float | None = None
    seconds: float = 0.0
    dollars: float | None = None
    reason: str = ""

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def words(self) -> str:
        """``learning_rate=0.0001 lora_rank=8``: numbers in four digits."""
        return " ".join(f"{name}={short(value)}" for name, value in self.values.items())


@dataclass(frozen=True)
class TuningStatus:
    """How far a tuning job is.

    Attributes:
        status: SageMaker's HyperParameterTuningJobStatus.
        objective: the measure that is to be best.
        maximize: whether the greatest is.
        planned: trials in all, at most.
        trials: those that were started, by number.
    """

    status: str
    objective: str
    maximize: bool
    planned: int
    trials: tuple[Trial, ...] = ()

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def ranked(self) -> list[Trial]:
        """Trials that have left a model, the best first."""
        found = [trial for trial in self.trials if trial.status == "Completed" and trial.objective is not None]
        return sorted(found, key=lambda trial: trial.objective or 0.0, reverse=self.maximize)

    @property
    def best(self) -> Trial | None:
        """None before the first trial has left a model."""
        return next(iter(self.ranked()), None)

    @property
    def dollars(self) -> float | None:
        """Of all trials so far; None where that is not known."""
        known = [trial.dollars for trial in self.trials if trial.dollars is not None]
        return sum(known) if known and len(known) == len(self.trials) else None

    def counts(self) -> dict[str, int]:
        """How many trials are ``done``, ``stopped``, ``failed``, ``running``, ``planned``, where there are any."""
        names = {"Completed": "done", "Stopped": "stopped", "Failed": "failed"}
        found = {"done": 0, "stopped": 0, "failed": 0, "running": 0}
        for trial in self.trials:
            found[names.get(trial.status, "running")] += 1
        planned = 0 if self.has_ended else max(0, self.planned - len(self.trials))
        every = {**found, "planned": planned}
        return {name: count for name, count in every.items() if count or name == "done"}

    def line(self) -> str:
        """For people."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        best = self.best
        found = f"; best {self.objective} {best.objective:.4g} with {best.words}" if best else ""
        return f"{counts}{found}"


def read_trials(summaries: Sequence[Mapping[str, Any]], price: float | None, now: float) -> tuple[Trial, ...]:
    """Reads the entries of ListTrainingJobsForHyperParameterTuningJob.

    Args:
        price: of the instances of a trial, in dollars an hour; None where it is not known.
        now: seconds since 1970.
    """
    found = list[Trial]()
    for each in sorted(summaries, key=lambda each: (each["CreationTime"], each["TrainingJobName"])):
        started = each.get("TrainingStartTime")
        ended = each.get("TrainingEndTime")
        seconds = max(0.0, (ended.timestamp() if ended else now) - started.timestamp()) if started else 0.0
        number = _NUMBER.fullmatch(each["TrainingJobName"])
        found.append(
            Trial(
                each["TrainingJobName"],
                int(number[1]) if number else len(found) + 1,
                dict(each.get("TunedHyperParameters", {})),
                each["TrainingJobStatus"],
                each.get("FinalHyperParameterTuningJobObjectiveMetric", {}).get("Value"),
                seconds,
                None if price is None else price * seconds / 3600,
                each.get("FailureReason", ""),
            )
        )
    return tuple(sorted(found, key=lambda trial: trial.number))


def short(value: str) -> str:
    """A value for people: numbers in four digits, anything else as it is."""
    value = value.strip('"')
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
