"""The disk of a warm pool, which outlives a job: what is kept there for the next job, and how much of it.

Jobs of the same pool come one after another, with the same execution role. Only the directories of this project are
touched: whatever else lies on the disk is somebody else's.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from dreambooth_sm.private_directory import make_private

# Where SageMaker says that the disk is: of a job that keeps its instance, or runs on one that was kept.
VARIABLE = "SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY"
# Of the disk, base models may take this much; the rest is for what jobs write.
_SHARE = 0.5
# What is being written is called so until it is whole.
UNFINISHED = ".partial"
# Of the models, those of the model hub lie in this folder.
_HUB = "hub"
# Locks of the models that this process uses.
_held: dict[Path, IO[str]] = {}
_COMPILED = "dreambooth-sm-compiled"
# Caches of compiled kernels by their variables, and their folders; all are made for several processes.
_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}


def disk() -> Path | None:
    """Where the disk is mounted; None where the job has none."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def keep_compiled() -> None:
    """Lets Triton, Inductor and CUDA (cuDNN's attention) keep what they compile on the disk, unless their variables say
    where.

    Raises:
        UserError: somebody else could have put programs there.
    """
    if (place := disk()) is None:
        return
    wanted = {name: folder for name, folder in _CACHES.items() if name not in os.environ}
    directory = make_private(place / _COMPILED, "compiled kernels", VARIABLE)
    os.environ |= {name: str(directory / folder) for name, folder in wanted.items()}


def bound(models: Path, used: Path | None = None, *, most: int | None = None) -> None:
    """Removes what earlier jobs left half-written, and the models that were not used for longest, down to a share of
    the disk. What this job uses stays.

    Args:
        models: directory whose entries are models, and ``hub``, whose entries are models of the hub.
        used: a path of the model that was used now, and will be until this process ends.
        most: bytes that models may take; None: a share of the disk.
    """
    entries = [*(path for path in models.iterdir() if path.name != _HUB), *(models / _HUB).glob("models--*")]
    entries = [path for path in entries if path.is_dir()]
    if now := next((path for path in entries if used is not None and used.is_relative_to(path)), None):
        os.utime(now)
        _hold(now)
    for path in [path for path in entries if path.name.endswith(UNFINISHED)]:
        _remove(path)
    sizes = {path: _size(path) for path in entries if path.is_dir()}
    room = shutil.disk_usage(models).total * _SHARE if most is None else most
    for path in sorted(sizes, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) <= room:
            return
        if _remove(path):
            del sizes[path]


def _hold(model: Path) -> None:
    """Keeps other processes of this host from removing a model, until this one ends."""
    if model not in _held:
        _held[model] = model.with_name(f"{model.name}.used").open("a")
        fcntl.flock(_held[model], fcntl.LOCK_SH)


def _remove(path: Path) -> bool:
    """Whether it could be removed: nobody writes it, and nobody uses it."""
    name = path.name.removesuffix(UNFINISHED)
    with ExitStack() as files:
        for lock in (f"{name}.lock", f"{name}.used"):
            file = files.enter_context(path.with_name(lock).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        shutil.rmtree(path, ignore_errors=True)
    return True


def _size(directory: Path) -> int:
    """Bytes of all files below, each once: the hub's client links to them."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_symlink() and path.is_file())
