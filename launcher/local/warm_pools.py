"""Warm pools of the embedded SageMaker: a directory that outlives a job, for the next job that is like it.

https://docs.aws.amazon.com/sagemaker/latest/dg/train-warm-pools.html
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.jobs.warm_pools import conditions

# Where a container finds the pool's directory.
MOUNTED = "/opt/ml/sagemaker/warmpoolcache"


class PoolUse:
    """A job's time in a warm pool, as WarmPoolStatus tells it.

    Args:
        directory: that stays for the next job.
        keep_alive: seconds after the job's end.
    """

    def __init__(self, directory: Path, keep_alive: int) -> None:
        self.directory = directory
        self._keep_alive = keep_alive
        self._status, self._reused_by = "InUse", ""
        self._ended = self._left = 0.0

    @property
    def is_available(self) -> bool:
        return self._refreshed() == "Available"

    def end(self, *, is_healthy: bool) -> None:
        """The job has ended, and by a fault of the platform where it is not healthy."""
        self._ended = time.time()
        self._status = "Available"
        if not is_healthy or not self._keep_alive:
            self._terminate(self._ended)

    def move_to(self, job: str) -> None:
        """Another job takes the directory over."""
        self._status, self._reused_by, self._left = "Reused", job, time.time()

    def describe(self) -> dict[str, Any]:
        """WarmPoolStatus."""
        status = self._refreshed()
        until = time.time() if status == "Available" else self._left
        found = {"Status": status, "ResourceRetainedBillableTimeInSeconds": max(0, round(until - self._ended))}
        return found | ({"ReusedByJob": self._reused_by} if self._reused_by else {})

    def _refreshed(self) -> str:
        if self._status == "Available" and time.time() > self._ended + self._keep_alive:
            self._terminate(self._ended + self._keep_alive)
        return self._status

    def _terminate(self, when: float) -> None:
        self._status, self._left = "Terminated", when
        shutil.rmtree(self.directory, ignore_errors=True)


class EmbeddedWarmPools:
    """The warm pools of all regions.

    Args:
        directory: below which theirs are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._kept: list[tuple[str, Mapping[str, object], PoolUse]] = []

    def enter(self, request: Mapping[str, Any], region: str) -> PoolUse | None:
        """The pool that a job runs in: one that is available and like it, else a new one where it asks for one."""
        if request.get("EnableManagedSpotTraining"):
            return None
        wanted, keep_alive = conditions(request), request["ResourceConfig"].get("KeepAlivePeriodInSeconds", 0)
        with self._lock:
            self._kept = [each for each in self._kept if each[2].describe()["Status"] in ("InUse", "Available")]
            same = (use for place, found, use in self._kept if place == region and found == wanted and use.is_available)
            if earlier := next(same, None):
                earlier.move_to(request["TrainingJobName"])
            elif not keep_alive:
                return None
            directory = earlier.directory if earlier else self._directory / uuid.uuid4().hex
            directory.mkdir(parents=True, exist_ok=True)
            use = PoolUse(directory, keep_alive)
            self._kept.append((region, wanted, use))
            return use
