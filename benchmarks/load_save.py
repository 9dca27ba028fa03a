"""Loading, saving and converting a model: seconds and peak host memory, beside diffusers' own way.

    python -m benchmarks.load_save [--size sd15] [--device cpu] [--repeat 3] [--tasks load save convert]

Random weights, fp16 files in the system's temporary directory (10 GB of disk; 30 GB for SDXL). Every measurement is a
process of its own, ours and diffusers' in turns, with files in the page cache: the best seconds and the largest peak.
Peaks are VmHWM from the task's start on, which counts pages of mapped files; ``before_gb`` is what the process had by
then: the libraries, the CUDA context, and the model that is saved where it is on the host.

``load`` ends when every weight has been read, on ``--device``, in the precision of the files; ``load-fp32`` in fp32,
which is what training on a CPU starts from. ``save`` writes an fp16 directory from a model on ``--device``, and
``save-fp32`` from one in fp32. ``convert`` makes a directory of a single file, and ``convert-back`` a single file with
its SHA-256, which diffusers can't.
"""

from __future__ import annotations

import argparse
import contextlib
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
TASKS = ("load", "load-file", "load-fp32", "load-file-fp32", "save", "save-fp32", "convert", "convert-back")
OURS_ALONE = ("convert-back",)


def status_gb(field: str) -> float:
    """A field of this process' memory, in GB (1e9 bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e9


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # not every container may; the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


class Bench:
    """What is measured, by one side.

    Args:
        files: directory with the model's two forms.
        device: where models are loaded to, and saved from.
    """

    def __init__(self, files: Path, device: str) -> None:
        self.directory, self.single, self.out = files / "directory", files / "single.safetensors", files / "out"
        self.device = device

    def task(self, name: str) -> Callable[[], Any]:
        """A task, ready to run: what it needs beforehand is done."""
        import torch

        precision = torch.float32 if name.endswith("-fp32") else torch.float16
        match name.removesuffix("-fp32"):
            case "load":
                return lambda: self._touch(self.load(self.directory, precision))
            case "load-file":
                return lambda: self._touch(self.load(self.single, precision))
            case "save":
                pipeline = self.load(self.directory, precision)
                self._touch(pipeline)
                return lambda: self.save(pipeline)
        return self.convert if name == "convert" else self.convert_back

    def _touch(self, pipeline: Any) -> Any:
        """Reads every weight, so that none is left on the disk behind a memory map."""
        import torch

        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                for parameter in module.parameters():
                    parameter.sum()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return pipeline

    def load(self, source: Path, dtype: Any) -> Any: ...

    def save(self, pipeline: Any) -> None: ...

    def convert(self) -> None: ...

    def convert_back(self) -> None: ...


class Ours(Bench):
    def load(self, source: Path, dtype: Any) -> Any:
        from dreambooth_sm.models import read_stored

        return read_stored(source).load(dtype, self.device)

    def save(self, pipeline: Any) -> None:
        import torch

        from dreambooth_sm.stored.directory import write_directory
        from dreambooth_sm.stored.model import StoredModel

        write_directory(StoredModel.of("model", pipeline), self.out, dtype=torch.float16)

    def convert(self) -> None:
        from dreambooth_sm.convert import convert

        convert(str(self.single), self.out)

    def convert_back(self) -> None:
        from dreambooth_sm.convert import convert

        convert(str(self.directory), self.out.with_suffix(".safetensors"))


class Diffusers(Bench):
    def load(self, source: Path, dtype: Any) -> Any:
        return self._read(source, dtype).to(self.device)

    def _read(self, source: Path, dtype: Any) -> Any:
        import diffusers

        index = json.loads((self.directory / "model_index.json").read_text(encoding="utf-8"))
        kind = getattr(diffusers, index["_class_name"])
        if source.is_file():
            return kind.from_single_file(str(source), config=str(self.directory), local_files_only=True, dtype=dtype)
        return kind.from_pretrained(source, dtype=dtype, local_files_only=True)

    def save(self, pipeline: Any) -> None:
        import torch

        pipeline.to(dtype=torch.float16).save_pretrained(self.out)

    def convert(self) -> None:
        import torch

        self._read(self.single, torch.float16).save_pretrained(self.out)


SIDES: dict[str, type[Bench]] = {"ours": Ours, "diffusers": Diffusers}


def run_task(side: str, name: str, files: Path, device: str) -> None:
    """Runs one task in this process and prints what it took."""
    import diffusers
    import torch
    import transformers  # noqa: F401 - not part of the seconds

    import dreambooth_sm.convert  # noqa: F401

    diffusers.utils.logging.disable_progress_bar()
    if device != "cpu":
        torch.zeros(1, device=device).sum().item()  # makes the context
    task = SIDES[side](files, device).task(name)
    reset_peak()
    before = status_gb("VmRSS")
    started = time.perf_counter()
    result = task()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "before_gb": before, "peak_gb": status_gb("VmHWM")}))
    del result


def make_files(size: str, files: Path) -> None:
    """Writes the model as a directory and as a single file."""
    import torch

    from benchmarks.common import MODELS
    from dreambooth_sm.models import read_stored
    from dreambooth_sm.stored.model import clip_tokenizer
    from dreambooth_sm.stored.single_file import write_single_file

    partial = files.with_name(f"{files.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    base = MODELS[size]()
    base.tokenizer = clip_tokenizer("<|endoftext|>")
    if "text_encoder_2" in base.modules:
        setattr(base, "tokenizer_2", clip_tokenizer("!"))  # noqa: B010 - a part of this family alone
    base.save(partial / "directory", torch.float16)
    write_single_file(read_stored(partial / "directory"), partial / "single.safetensors", dtype=None)
    partial.rename(files)


def measure(side: str, name: str, files: Path, device: str) -> dict[str, float]:
    """One task in a process of its own."""
    for left in (files / "out", files / "out.safetensors"):
        shutil.rmtree(left, ignore_errors=True)
        left.unlink(missing_ok=True)
    call = "from benchmarks.load_save import run_task; from pathlib import Path; "
    call += f"run_task({side!r}, {name!r}, Path({str(files)!r}), {device!r})"
    ended = subprocess.run([sys.executable, "-c", call], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    options = parser.parse_args()
    files = WORK / options.size
    if not files.is_dir():
        WORK.mkdir(exist_ok=True)
        call = "from benchmarks.load_save import make_files; from pathlib import Path; "
        call += f"make_files({options.size!r}, Path({str(files)!r}))"
        subprocess.run([sys.executable, "-c", call], check=True)
    from benchmarks.common import emit

    emit(
        size=options.size, device=options.device, file_gb=round((files / "single.safetensors").stat().st_size / 1e9, 2)
    )
    for name in options.tasks:
        sides = [side for side in SIDES if side == "ours" or name not in OURS_ALONE]
        rounds = [{side: measure(side, name, files, options.device) for side in sides} for _ in range(options.repeat)]
        emit(task=name, **{side: summary([results[side] for results in rounds]) for side in sides})


def summary(results: list[dict[str, float]]) -> dict[str, float]:
    """The best seconds and the largest memory of several runs."""
    gigabytes = {field: round(max(result[field] for result in results), 2) for field in ("peak_gb", "before_gb")}
    return {"seconds": round(min(result["seconds"] for result in results), 2)} | gigabytes


if __name__ == "__main__":
    main()
