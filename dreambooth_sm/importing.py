"""Imports the large libraries: torch, diffusers and transformers make a million objects that stay."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


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


def leave(code: int) -> NoReturn:
    """Ends the process as Python does, but for taking apart what was imported: that takes more than a second.

    Args:
        code: that it ends with.
    """
    # As multiprocessing ends its processes.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
