"""Which devices the Triton kernels of this package run on, and where they lie compiled."""

from __future__ import annotations

import shutil
import uuid
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

# The least that Triton makes code for.
LEAST = (7, 5)
# Where the image has kernels (`kernel_builds`). Triton notes absolute paths in its cache: they are made there as well.
BUILDS = Path("/opt/dreambooth-sm-kernels")


def obstacle(device: torch.device | None = None) -> str | None:
    """Why the kernels don't run on a device; None where they do: on CUDA from compute capability 7.5 on, and in
    Triton's interpreter.

    Args:
        device: None asks for any.
    """
    if device and device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST:
        return "the card's compute capability is below 7.5"
    try:
        from dreambooth_sm.training.adamw_blockwise_triton import INTERPRETED
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device and device.type != "cuda" and not INTERPRETED:
        return f"the parameters are on {device}, and Triton's interpreter is not on"
    return None


@cache
def kernels_for(module: str, device: torch.device) -> ModuleType | None:
    """A module of kernels beside this one, or None where they don't run."""
    if obstacle(device):
        return None
    if device.type == "cuda":
        take_builds(torch.cuda.get_device_capability(device))
    return import_module(f"dreambooth_sm.training.{module}")


def folder_of(capability: tuple[int, int], builds: Path) -> Path:
    """The kernels of an architecture."""
    return builds / f"sm_{capability[0]}{capability[1]}"


def launchers_of(builds: Path) -> Path:
    """What calls kernels, of whatever architecture."""
    return builds / "launchers"


@cache
def take_builds(capability: tuple[int, int], builds: Path = BUILDS) -> None:
    """Puts the compiled kernels of an architecture, and what calls them, into Triton's cache, where there are any.

    Other processes may do the same at the same time.
    """
    from triton import knobs

    target = Path(knobs.cache.dir)
    for folder in (folder_of(capability, builds), launchers_of(builds)):
        with suppress(OSError):  # without them, the job compiles
            for built in folder.iterdir():
                if (target / built.name).exists():
                    continue
                copy = target / f"{built.name}.{uuid.uuid4().hex}"
                shutil.copytree(built, copy)
                with suppress(OSError):  # another process was first
                    copy.rename(target / built.name)
                shutil.rmtree(copy, ignore_errors=True)
