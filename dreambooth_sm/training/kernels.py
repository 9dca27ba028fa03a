"""Which devices the Triton kernels of this package run on."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch


@cache
def kernels_for(module: str, device: torch.device) -> ModuleType | None:
    """A module of kernels beside this one, or None where they don't run: they do on CUDA from compute capability 7.5
    on, and in Triton's interpreter."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 5):
        return None
    try:
        from dreambooth_sm.training.adamw_blockwise_triton import INTERPRETED

        kernels = import_module(f"dreambooth_sm.training.{module}")
    except ImportError:
        return None
    return kernels if device.type == "cuda" or INTERPRETED else None
