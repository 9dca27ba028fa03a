"""How far a fleet is."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.fleets.jobs import WAITING
from launcher.jobs.outputs import ENDED


@dataclass(frozen=True)
class FleetStatus:
    """How far a fleet is: each of its subjects is in one of four places.

    Attributes:
        done: ids of those with a model.
        failed: ids of those without one, to the reasons.
        running: ids of those in jobs that run.
        remaining: ids of those in jobs that have not started, or that have ended before their turn.
        jobs: names of the jobs that were started, to their status; ``Waiting`` in a queue.
        dollars: that instances have cost so far; None where that is not known.
        seconds_left: at the speed of the last half hour; None before a subject has ended.
        latest: the id of the one that was done last.
    """

    done: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    running: tuple[str, ...] = ()
    remaining: tuple[str, ...] = ()
    jobs: dict[str, str] = field(default_factory=dict)
    dollars: float | None = None
    seconds_left: float | None = None
    latest: str | None = None

    @property
    def jobs_at_work(self) -> int:
        """Those that run."""
        return sum(status not in (*ENDED, WAITING) for status in self.jobs.values())

    def line(self) -> str:
        """For people."""
        count = self.jobs_at_work
        return (
            f"{len(self.done)} done, {len(self.failed)} failed, {len(self.running)} in {count} running "
            f"job{'s' * (count != 1)}, {len(self.remaining)} remaining"
        )
