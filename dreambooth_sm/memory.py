"""Memory of the process that nothing uses any more."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Collects what is left of modules that were let go, and gives the device's share back to its driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
