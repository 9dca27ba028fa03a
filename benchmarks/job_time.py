"""The whole job, from the start of its process to its end: seconds of each phase, with random weights.

    python -m benchmarks.job_time [--model sdxl] [--card CARD] [--cap_gb GB] [--name value ...]

Hyperparameters go to the job. The base model is made once, in the system's temporary directory. ``rest_s`` is what no
phase has: Python's start and end, and those of other processes where there are several.
With ``--card`` the job takes this one for the named card: its plan, its memory, its attention kernels, fp16 where it
has no bf16. ``--cap_gb`` leaves the job less memory than its plan expects.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import MODELS, PROMPTS, emit, hyperparameters, make_pictures
from dreambooth_sm.knobs.decode import split_arguments
from launcher.jobs.progress import Progress

_PROJECT = Path(__file__).parents[1]


def as_card(card: str, cap_gb: object) -> dict[str, str]:
    """The environment in which processes take their card for the named one."""
    paths = [str(Path(__file__).parent / "as_card"), str(_PROJECT), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "AS_CARD": card, "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}
    return settings | ({"AS_CARD_GB": str(cap_gb)} if cap_gb else {})


def run(options: dict[str, str], environment: dict[str, str]) -> tuple[float, Progress]:
    """A job in a tree of its own.

    Returns:
        its seconds, and what it said.
    """
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="job-time-") as base:
        command = [sys.executable, "-u", str(_PROJECT / "container" / "train.py")]
        command += [text for name, value in options.items() for text in (f"--{name}", value)]
        started = time.perf_counter()
        with subprocess.Popen(
            command,
            env={**os.environ, **environment, "SAGEMAKER_BASE_DIR": base},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            for line in process.stdout or ():
                print(f"{time.perf_counter() - started:7.2f} {line}", end="", file=sys.stderr)
                progress.read(line)
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"the job ended with {process.returncode}")
    return seconds, progress


def main() -> None:
    work = Path(tempfile.gettempdir()) / "dreambooth-sm-job-time"
    wishes = split_arguments(sys.argv[1:])
    name = wishes.pop("model", "sd15")
    model, pictures = work / name, work / f"pictures-{name}"
    if not model.is_dir():
        MODELS[name]().save(model, torch.float16)
    torch.cuda.empty_cache()
    make_pictures(pictures, 5, hyperparameters(name).resolution)
    card, cap_gb = wishes.pop("card", None), wishes.pop("cap_gb", None)
    length = {} if "num_train_epochs" in wishes else {"max_train_steps": "800"}
    wishes = {**length, "num_class_images": "50", "logging_steps": "100", "seed": "0", **wishes}
    places = {"instance_data_dir": str(pictures), "pretrained_model_name_or_path": str(model)}
    seconds, progress = run({**PROMPTS, **places, **wishes}, as_card(card, cap_gb) if card else {})
    last = progress.history[-1]
    emit(
        model=name,
        card=card,
        hyperparameters=wishes,
        seconds={name: round(of, 1) for name, of in progress.seconds.items()},
        rest_s=round(seconds - sum(progress.seconds.values()), 1),
        whole_s=round(seconds, 1),
        vram_gb=last.get("vram_gb"),
        steps_per_s=last["steps_per_s"],
        loss=last["loss"],
    )


if __name__ == "__main__":
    main()
