"""The program of a job of :mod:`benchmarks.troubled_fleet`: ``container/train.py`` on an instance that may not last.

By chance, which the job's name decides, SageMaker has no capacity for it, or loses it in the midst of its work.
"""

import os
import random
import runpy
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
_WITHOUT_CAPACITY, _LOST_JOBS = 0.15, 0.15
# Seconds of the processor.
_LOST_AFTER = (10.0, 40.0)
_NO_CAPACITY = "CapacityError: Unable to provision requested ML compute capacity."
_LOST = "InternalServerError: We encountered an internal error. Please try again."


def end(reason: str) -> None:
    """Ends at once, as SageMaker tells it."""
    failure = Path(os.environ["SAGEMAKER_BASE_DIR"]) / "output" / "failure"
    failure.parent.mkdir(parents=True, exist_ok=True)
    failure.write_text(reason)
    os._exit(1)


def lose(seconds: float) -> None:
    """Ends after so many seconds of the processor."""
    while time.process_time() < seconds:
        time.sleep(0.5)
    end(_LOST)


if __name__ == "__main__":
    chance = random.Random(os.environ["TRAINING_JOB_NAME"])
    if chance.random() < _WITHOUT_CAPACITY:
        end(_NO_CAPACITY)
    if chance.random() < _LOST_JOBS:
        threading.Thread(target=lose, args=[chance.uniform(*_LOST_AFTER)], daemon=True).start()
    sys.path.insert(0, str(ROOT))
    sys.argv[0] = str(ROOT / "container" / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
