"""How many subjects a job takes: a job is long against its start, and not so long that it is better cut in two."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.estimates import Estimate
from launcher.instances import PRICES
from launcher.parts import in_minutes

# Of a job's time, its start and what its subjects share may be this much, where there are enough subjects.
_SHARED_SHARE = 0.1
# More of it is lost where something goes wrong, and later.
_LONGEST_MINUTES = 120.0
# Assumed, not measured: what a subject takes beside its steps. Its pictures are encoded, and its model is written.
_BESIDE_MINUTES = 0.1


@dataclass(frozen=True)
class FleetEstimate:
    """The time and money that a fleet needs.

    Attributes:
        sizes: subjects of each job.
        parallel: jobs that run at a time.
        alone: the estimate of a job with one subject.
        cards: of an instance, each with subjects of its own.
    """

    sizes: tuple[int, ...]
    parallel: int
    alone: Estimate
    cards: int = 1

    @property
    def subjects(self) -> int:
        return sum(self.sizes)

    @property
    def job_minutes(self) -> float | None:
        """Of the longest job; None on CPUs."""
        return self._minutes(max(self.sizes))

    @property
    def minutes(self) -> float | None:
        """From the first job's start to the last one's end."""
        longest = self.job_minutes
        return None if longest is None else longest * -(-len(self.sizes) // self.parallel)

    @property
    def usd(self) -> float | None:
        """Of all jobs, on demand; None where the price is not known."""
        price = self.alone.instance.usd_per_hour
        minutes = [self._minutes(size) for size in self.sizes]
        waiting = self.alone.waiting_minutes
        return None if price is None else sum((each - waiting) / 60 * price for each in minutes if each is not None)

    def _minutes(self, size: int) -> float | None:
        if self.alone.minutes is None:
            return None
        rounds = -(-size // self.cards)
        return shared_minutes(self.alone) + rounds * subject_minutes(self.alone)

    def lines(self) -> list[str]:
        """For people: jobs, time and cost, beside a job a subject."""
        count, jobs = self.subjects, len(self.sizes)
        sizes = f"{max(self.sizes)}" if len({*self.sizes}) == 1 else f"{min(self.sizes)} or {max(self.sizes)}"
        lines = [
            *self.alone.lines()[:2],
            f"fleet: {count} subjects in {jobs} job{'s' * (jobs > 1)} of {sizes}, {self.parallel} at a time",
        ]
        if self.minutes is None or self.job_minutes is None:
            return [*lines, "time: no estimate for CPUs"]
        lines.append(
            f"estimate: about {in_minutes(self.minutes)} in all, {self.job_minutes:.0f} a job, "
            f"{subject_minutes(self.alone):.1f} a subject more"
        )
        if self.usd is None or self.alone.usd is None:
            return [*lines, "cost: at an unknown price"]
        lines.append(
            f"cost: about ${self.usd:.2f} in all, ${self.usd / count:.3f} a subject, on demand ({PRICES}); a job a "
            f"subject: ${self.alone.usd:.2f} each"
        )
        return lines


def subject_minutes(alone: Estimate) -> float:
    """Minutes of a card that one more subject takes."""
    return alone.training_minutes + _BESIDE_MINUTES


def shared_minutes(alone: Estimate) -> float:
    """Minutes that a job takes whatever the number of its subjects: waiting, start, end, class images."""
    return (alone.whole_minutes or 0.0) - alone.training_minutes


def subjects_a_job(count: int, alone: Estimate, parallel: int, *, cards: int = 1, limit: float | None = None) -> int:
    """How many subjects the largest job should take.

    Args:
        count: of all subjects.
        parallel: jobs that run at a time.
        limit: minutes that a job may take; None: :data:`_LONGEST_MINUTES`.
    """
    spread = -(-count // parallel)
    if alone.minutes is None:
        return spread
    each, shared = subject_minutes(alone), shared_minutes(alone)
    least = cards * -(-(shared / _SHARED_SHARE - shared) // each)
    most = cards * ((min(limit or _LONGEST_MINUTES, _LONGEST_MINUTES) - shared) // each)
    return max(1, int(min(max(least, spread), most, count)))


def split(count: int, largest: int) -> tuple[int, ...]:
    """Sizes of as few jobs as it takes, as equal as can be."""
    jobs = -(-count // largest)
    return tuple(count // jobs + (number < count % jobs) for number in range(jobs))
