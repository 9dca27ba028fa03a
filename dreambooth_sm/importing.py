"""Imports the large libraries: torch, diffusers and transformers make a million objects that stay."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Does not look for garbage among what is imported inside: there is none, and looking takes as long again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor later: what was imported stays to the end
        atexit.register(gc.unfreeze)  # where libraries look for what they made
        if collecting:
            gc.enable()
