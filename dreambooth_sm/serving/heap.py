"""How glibc keeps this process's memory."""

from __future__ import annotations

import ctypes
import os

# Of malloc.h.
_M_ARENA_MAX = -8
_SETTING, _ARENAS = "MALLOC_ARENA_MAX", 2


def bound_arenas() -> None:
    """Lets threads share two arenas of the heap, unless ``MALLOC_ARENA_MAX`` says how many.

    glibc gives threads up to eight for each core, and each keeps what was once freed in it: what one thread takes for
    a request and another frees adds up. Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and _SETTING not in os.environ:
        mallopt(_M_ARENA_MAX, _ARENAS)
