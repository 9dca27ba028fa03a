"""The whole job, from process start to the saved model: seconds of each phase, with random weights.

    python -m benchmarks.job_time [--model sdxl] [--card CARD] [--cap_gb GB] [--name value ...]

Hyperparameters go to the job. The base model is made once, in the system's temporary directory. With ``--card`` the
job takes this one for the named card: its plan, its memory, its attention kernels, fp16 where it has no bf16.
``--cap_gb`` leaves the job less memory than its plan expects.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import MODELS, PROMPTS, emit, hyperparameters, make_pictures
from dreambooth_sm.knobs.decode import split_arguments
from launcher import fit


def act_as(card: str, cap_gb: object) -> None:
    """Makes the processes that are started from now on take their card for the named one."""
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(here / "as_card"), str(here.parent), os.environ.get("PYTHONPATH", "")]
    )
    os.environ |= {"AS_CARD": card, "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}
    if cap_gb:
        os.environ["AS_CARD_GB"] = str(cap_gb)


def main() -> None:
    work = Path(tempfile.gettempdir()) / "dreambooth-sm-job-time"
    wishes: dict[str, object] = {"max_train_steps": 800, "num_class_images": 50, "logging_steps": 100, "seed": 0}
    wishes |= split_arguments(sys.argv[1:])
    name = str(wishes.pop("model", "sd15"))
    model = work / name
    if not model.is_dir():
        MODELS[name]().save(model, torch.float16)
    torch.cuda.empty_cache()
    make_pictures(work / "pictures", 5, hyperparameters(name).resolution)
    if card := wishes.pop("card", None):
        act_as(str(card), wishes.pop("cap_gb", None))
    started = time.perf_counter()
    job = fit(
        work / "pictures",
        base_model=model,
        log=lambda line: print(line, file=sys.stderr),
        **{**PROMPTS, **wishes},  # type: ignore[arg-type]
    )
    last = job.history()[-1]
    emit(
        model=name,
        card=card,
        hyperparameters={name: str(value) for name, value in wishes.items()},
        seconds={name: round(seconds, 1) for name, seconds in job.seconds.items()},
        whole_s=round(time.perf_counter() - started, 1),
        vram_gb=last["vram_gb"],
        steps_per_s=last["steps_per_s"],
        loss=last["loss"],
    )


if __name__ == "__main__":
    main()
