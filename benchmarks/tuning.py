"""Does a search find a setting that is at least as good as the preset's? Trials on the toybox model, for real.

    python -m benchmarks.tuning [--trials 12] [--strategy bayesian] [--steps 40] [--seeds 2] [--drawing-steps 6]
                                [--resolution 128] [--grid FILE.png]

:func:`launcher.tune` on the embedded SageMaker: a LoRA of so many steps on the toy that the base model never saw, over
learning rate, rank and the weight of the class. Its best trial was chosen for its score, so its values are then trained
with other seeds, and so are those of ``preset=object`` with as many steps (rate and rank are defaults, which are for
large models) and those of docs/recipes.md, found for the toybox by a grid. A job each, measured by the judge, by ten
pictures that are drawn in few steps, alike for all. On a CPU twelve trials take minutes.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import launcher
from benchmarks.common import PROMPTS, emit
from dreambooth_sm import toybox
from dreambooth_sm.report import measure_pattern
from launcher.local.services import embedded_services

RANGES = {"learning_rate": (1e-4, 1e-2, "log"), "lora_rank": (4, 32, "log"), "prior_loss_weight": (0.1, 1.0)}
SETTINGS: dict[str, Mapping[str, Any]] = {
    "preset": {"preset": "object"},
    "recipe": {"learning_rate": 1e-3, "lora_rank": 16, "prior_loss_weight": 1.0, "lora_targets": "attention"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--strategy", default="bayesian")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--drawing-steps", type=int, default=6)
    parser.add_argument("--resolution", type=int, default=toybox.SIDE)
    parser.add_argument("--grid", type=Path)
    options = parser.parse_args()
    common: dict[str, Any] = {
        **PROMPTS,
        "base_model": toybox.NAME,
        "method": "lora",
        "max_train_steps": options.steps,
        "resolution": options.resolution,
        "num_class_images": 8,
        "sample_batch_size": 8,
        "logging_steps": options.steps,
        "instance_type": "ml.g5.xlarge",
        "validation_guidance_scale": 3.0,
        "environment": {"DRAWING_STEPS": str(options.drawing_steps)},  # a job inherits none of this process's
    }
    with _services():
        started = time.monotonic()
        tuning = launcher.tune(
            toybox.PHOTOS,
            ranges=RANGES,
            strategy=options.strategy,
            max_trials=options.trials,
            parallel=1,
            search_seed=0,
            **common,
        )
        for trial in tuning.trials:
            emit(trial=trial.number, **trial.values, score=trial.objective, status=trial.status, s=round(trial.seconds))
        best = tuning.best
        emit(best=best.number, **best.values, score=best.objective, wall_s=round(time.monotonic() - started))
        if options.grid and (sheet := tuning.samples(3).image()):
            sheet.save(options.grid)
        found = {name: _scores(common | dict(values), options.seeds) for name, values in SETTINGS.items()}
        found["found"] = _scores(common | dict(best.values), options.seeds)
    for name, scores in found.items():
        emit(setting=name, scores=scores, mean=round(statistics.fmean(scores), 4))
    for name in SETTINGS:
        emit(found_less=name, **_difference(found["found"], found[name]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    emit(wall_s=round(time.monotonic() - started), cpu_s=round(used.ru_utime + used.ru_stime))


@contextmanager
def _services() -> Iterator[None]:
    """The embedded services, whose jobs draw in few steps."""
    program = Path(__file__).with_name("tuning_job.py")
    quicker = partial(embedded_services, entrypoint=program)
    with patch("launcher.local.run.embedded_services", quicker), launcher.local_services():
        yield


def _scores(values: Mapping[str, Any], seeds: int) -> list[float]:
    """Scores of jobs with other seeds than the trials'."""
    return [_score({**values, "seed": seed}) for seed in range(1, seeds + 1)]


def _score(values: Mapping[str, Any]) -> float:
    job = launcher.fit(toybox.PHOTOS, **values, fidelity_encoders="judge", log=lambda line: None)
    found = [match for line in job.lines() if (match := re.search(measure_pattern("score"), line))]
    return float(found[-1][1])


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """The mean difference on the same seeds, and its standard error."""
    each = [one - other for one, other in zip(ours, theirs, strict=True)]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    return {"mean": round(statistics.fmean(each), 4), "standard_error": None if error is None else round(error, 4)}


if __name__ == "__main__":
    main()
