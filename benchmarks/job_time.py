"""The whole job, from process start to the saved model: seconds of each phase, SD 1.5 with random weights.

    python -m benchmarks.job_time [--name value ...]

Hyperparameters go to the job. The base model is made once, in the system's temporary directory.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import PROMPTS, emit, make_pictures, sd15
from dreambooth_sm.hyperparameters import split_arguments
from launcher import fit


def main() -> None:
    work = Path(tempfile.gettempdir()) / "dreambooth-sm-job-time"
    model = work / "sd15"
    if not model.is_dir():
        sd15().save(model, torch.float16)
    torch.cuda.empty_cache()
    make_pictures(work / "pictures", 5)
    wishes: dict[str, object] = {"max_train_steps": 800, "num_class_images": 50, "logging_steps": 100, "seed": 0}
    wishes |= split_arguments(sys.argv[1:])
    started = time.perf_counter()
    job = fit(
        work / "pictures",
        base_model=model,
        log=lambda line: print(line, file=sys.stderr),
        **{**PROMPTS, **wishes},  # type: ignore[arg-type]
    )
    last = job.metrics[-1]
    emit(
        hyperparameters={name: str(value) for name, value in wishes.items()},
        seconds={name: round(seconds, 1) for name, seconds in job.seconds.items()},
        whole_s=round(time.perf_counter() - started, 1),
        vram_gb=last["vram_gb"],
        steps_per_s=last["steps_per_s"],
        loss=last["loss"],
    )


if __name__ == "__main__":
    main()
