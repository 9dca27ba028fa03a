"""The progress of a job, by the lines that it writes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dreambooth_sm.report import parse_metrics

# Larger counts are not a job's; floats would not hold them either.
_MOST = 2**53


@dataclass
class Progress:
    """Reads a job's lines one by one; what the line of a later start says replaces what an earlier one said.

    Attributes:
        steps: training steps in all; None where that is not known before the job says it.
        phase: what the job does now; empty before its first line.
        done, total: of the phase, such as class images made.
        history: one entry for each metrics line of training, names to numbers, by step.
        seconds: wall-clock seconds of each phase that has ended, in order, over all starts of the job.
    """

    steps: int | None = None
    phase: str = ""
    done: int = 0
    total: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def read(self, line: str) -> None:
        """Takes a line in; one that says nothing of this kind, or not in numbers, is passed over."""
        pairs = parse_metrics(line)
        numbers = _numbers(pairs)
        match pairs, numbers:
            case _, {"step": step, "loss": _} if _is_count(step):
                # After an interruption the job does the steps since its checkpoint again.
                while self.history and self.history[-1]["step"] >= step:
                    self.history.pop()
                self.history.append(numbers)
            case {"seed": _}, {"steps": steps} if _is_count(steps):
                self.steps = int(steps)
            case {"phase": phase, "state": "started"}, _:
                self.phase, self.done, self.total = phase, 0, 0
            case {"phase": phase, "state": "ended"}, {"seconds": seconds} if math.isfinite(seconds):
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            case {"progress": _}, {"done": done, "total": total} if _is_count(done) and _is_count(total):
                self.done, self.total = int(done), int(total)

    @property
    def step(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def loss(self) -> float | None:
        return self.history[-1]["loss"] if self.history else None

    @property
    def fraction(self) -> float | None:
        """Part of the training steps that is done; None where the steps are not known."""
        return min(1.0, self.step / self.steps) if self.steps else None

    @property
    def seconds_left(self) -> float | None:
        """Until training ends, at the speed of the last steps; None before the first."""
        rate = self.history[-1].get("steps_per_s", 0.0) if self.history else 0.0
        return max(0, self.steps - self.step) / rate if self.steps and 1e-9 < rate < math.inf else None


def _is_count(number: float) -> bool:
    return 0 <= number <= _MOST and number == int(number)


def _numbers(pairs: dict[str, str]) -> dict[str, float]:
    numbers = {}
    for name, value in pairs.items():
        try:
            numbers[name] = float(value)
        except ValueError:
            continue
    return numbers
