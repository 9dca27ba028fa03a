"""What one more subject costs in a fleet, beside a job of its own: seconds on the clock and of the processor.

    python -m benchmarks.fleet [--model sd15] [--subjects 8] [--pictures 10] [--name value ...]

One job with a single subject, and one with several, by :func:`launcher.fit_many` on this machine. Marginal seconds are
those of the second job less those of the first, over the subjects that it has more; ``between_starts_s`` are seconds
from one subject's start to the next one's, as the log has them. ``phases_s`` are medians of each phase's seconds, of
the subjects after the first: also of phases that another subject's training hides. Hyperparameters go to the jobs: by
default a LoRA, 400 steps at 512 pixels, 50 shared class images. ``--model toybox`` needs no GPU; the others have random
weights.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import MODELS, PROMPTS, emit, make_pictures
from dreambooth_sm.knobs.decode import split_arguments
from launcher import fit_many

_STARTED = re.compile(r"^subject=\S+ state=started")
_PHASE = re.compile(r"^phase=(\S+) state=ended seconds=(\S+)")


def main() -> None:
    wishes: dict[str, object] = {
        "method": "lora",
        "max_train_steps": 400,
        "resolution": 512,
        "num_class_images": 50,
        "logging_steps": 100,
        "seed": 0,
        **split_arguments(sys.argv[1:]),
    }
    name, count = str(wishes.pop("model", "sd15")), int(str(wishes.pop("subjects", 8)))
    pictures = int(str(wishes.pop("pictures", 10)))
    model: str | Path = name
    if name != "toybox":
        model = Path(tempfile.gettempdir()) / "dreambooth-sm-fleet" / name
        if not model.is_dir():
            MODELS[name]().save(model, torch.float16)
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="fleet-") as work:
        for number in range(count):
            make_pictures(Path(work) / "all" / f"subject-{number:03d}", pictures, int(str(wishes["resolution"])))
        one = Path(work) / "one"
        one.mkdir()
        (one / "subject-000").symlink_to(Path(work) / "all" / "subject-000")
        alone = measure(one, model, Path(work) / "job-1", wishes)
        many = measure(Path(work) / "all", model, Path(work) / "job-2", wishes)
    more, starts = count - 1, many.starts
    emit(
        model=name,
        card=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        cores=len(os.sched_getaffinity(0)),
        hyperparameters={name: str(value) for name, value in wishes.items()},
        subjects=count,
        pictures=pictures,
        alone_s=round(alone.wall, 1),
        alone_cpu_s=round(alone.cpu, 1),
        together_s=round(many.wall, 1),
        together_cpu_s=round(many.cpu, 1),
        marginal_s=round((many.wall - alone.wall) / more, 2),
        marginal_cpu_s=round((many.cpu - alone.cpu) / more, 2),
        between_starts_s=[round(later - sooner, 2) for sooner, later in itertools.pairwise(starts)],
        phases_s={phase: round(statistics.median(seconds), 3) for phase, seconds in many.phases.items()},
    )


@dataclass(frozen=True)
class Times:
    """Seconds of a fleet's job, when each of its subjects started, and what phases took after the first one."""

    wall: float
    cpu: float
    starts: list[float]
    phases: dict[str, list[float]]


def measure(subjects: Path, model: str | Path, directory: Path, wishes: Mapping[str, object]) -> Times:
    """Trains all subjects of a folder."""
    starts: list[float] = []
    phases: dict[str, list[float]] = defaultdict(list)

    def log(line: str) -> None:
        print(line, file=sys.stderr)
        if _STARTED.search(line):
            starts.append(time.perf_counter())
        elif len(starts) > 1 and (ended := _PHASE.match(line)):
            phases[ended[1]].append(float(ended[2]))

    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    fit_many(subjects, base_model=model, directory=directory, log=log, **{**PROMPTS, **wishes})  # type: ignore[arg-type]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Times(time.perf_counter() - began, cpu, starts, phases)


if __name__ == "__main__":
    main()
