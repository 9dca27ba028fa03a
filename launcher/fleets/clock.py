"""The time as a fleet sees it: a simulation brings its own."""

from __future__ import annotations

import time


class Clock:
    """The clock of this machine."""

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)
