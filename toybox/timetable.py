"""When each stage of a training has to be done."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Timetable:
    """Shares out the time that is left, so that a slow stage takes from all that follow."""

    def __init__(self, seconds: float, shares: Mapping[str, float]) -> None:
        """
        Args:
            shares: what each stage, in their order, gets of the time that is left, relative to those after it.
        """
        self._end = time.monotonic() + seconds
        self._shares = shares

    def seconds_for(self, stage: str) -> float:
        stages = list(self._shares)
        left = sum(self._shares[later] for later in stages[stages.index(stage) :])
        return max(0.0, self._end - time.monotonic()) * self._shares[stage] / left
