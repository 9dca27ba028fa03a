"""Loading, saving and converting a model of SD 1.5's size: seconds and peak host memory, beside diffusers' own way.

    python -m benchmarks.load_save [--repeat 3]

Random weights, fp16 files in the system's temporary directory (12 GB of disk). Every measurement is a process of its
own, ours and diffusers' in turns: best seconds, largest VmHWM (which counts the libraries and pages of mapped files).
Files are in the page cache. ``load`` ends when every weight has been read in fp32, which is what training starts from;
``save`` writes fp16 files from such a model, and its memory includes the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORK = Path(tempfile.gettempdir()) / "dreambooth-sm-load-save"
DIRECTORY, SINGLE = WORK / "directory", WORK / "single.safetensors"
OUT = WORK / "out"


def peak_gb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9


def touch(modules: list[Any]) -> None:
    """Reads every weight, so that none is left on the disk behind a memory map."""
    for module in modules:
        for parameter in module.parameters():
            parameter.sum()


def ours_load(source: Path) -> Any:
    from dreambooth_sm.models import read_stored

    pipeline = read_stored(source).load()
    touch([pipeline.unet, pipeline.vae, pipeline.text_encoder])
    return pipeline


def theirs_load(source: Path) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    if source.is_file():
        options: dict[str, Any] = {"config": str(DIRECTORY), "local_files_only": True}
        pipeline = StableDiffusionPipeline.from_single_file(str(source), dtype=torch.float32, **options)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    touch([pipeline.unet, pipeline.vae, pipeline.text_encoder])
    return pipeline


def ours_save() -> Callable[[], None]:
    import torch

    from dreambooth_sm.stored.directory import write_directory
    from dreambooth_sm.stored.model import StoredModel

    model = StoredModel.of("model", ours_load(DIRECTORY))
    return lambda: write_directory(model, OUT, dtype=torch.float16)


def theirs_save() -> Callable[[], None]:
    import torch

    pipeline = theirs_load(DIRECTORY)
    return lambda: pipeline.to(dtype=torch.float16).save_pretrained(OUT)


def ours_convert() -> None:
    from dreambooth_sm.convert import convert

    convert(str(SINGLE), OUT)


def theirs_convert() -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_single_file(
        str(SINGLE), config=str(DIRECTORY), local_files_only=True, dtype=torch.float16
    ).save_pretrained(OUT)


# What is measured; a save's preparation is not part of its seconds.
TASKS: dict[str, Callable[[], Callable[[], Any]]] = {
    "ours load directory": lambda: lambda: ours_load(DIRECTORY),
    "theirs load directory": lambda: lambda: theirs_load(DIRECTORY),
    "ours load file": lambda: lambda: ours_load(SINGLE),
    "theirs load file": lambda: lambda: theirs_load(SINGLE),
    "ours save": ours_save,
    "theirs save": theirs_save,
    "ours convert": lambda: ours_convert,
    "theirs convert": lambda: theirs_convert,
}


def run_task(name: str) -> None:
    """Runs one task in this process and prints what it took."""
    import diffusers  # noqa: F401 - not part of the seconds
    import transformers  # noqa: F401

    import dreambooth_sm.convert  # noqa: F401

    task = TASKS[name]()
    before = peak_gb()
    started = time.perf_counter()
    result = task()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "before_gb": before, "peak_gb": peak_gb()}))
    del result


def make_files() -> None:
    from benchmarks.common import sd15
    from dreambooth_sm.stored.model import clip_tokenizer

    WORK.mkdir(exist_ok=True)
    base = sd15()
    base.tokenizer = clip_tokenizer("<|endoftext|>")
    base.save(DIRECTORY)
    base.save_single_file(SINGLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--task", choices=list(TASKS))
    options = parser.parse_args()
    if options.task:
        return run_task(options.task)
    from benchmarks.common import emit

    if not SINGLE.is_file():
        subprocess.run([sys.executable, "-c", "from benchmarks.load_save import make_files; make_files()"], check=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in TASKS}
    for _ in range(options.repeat):
        for name, results in found.items():
            shutil.rmtree(OUT, ignore_errors=True)
            ended = subprocess.run(
                [sys.executable, "-m", "benchmarks.load_save", "--task", name],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            results.append(json.loads(ended.stdout.splitlines()[-1]))
    shutil.rmtree(OUT, ignore_errors=True)
    emit(
        file_gb=round(SINGLE.stat().st_size / 1e9, 2),
        **{
            name.replace(" ", "_"): {
                "seconds": round(min(result["seconds"] for result in results), 2),
                "peak_gb": round(max(result["peak_gb"] for result in results), 2),
                "before_gb": round(max(result["before_gb"] for result in results), 2),
            }
            for name, results in found.items()
        },
    )


if __name__ == "__main__":
    main()
