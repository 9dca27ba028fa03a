"""Errors that nobody expects, in the log."""

from __future__ import annotations

import sys

from dreambooth_sm.printing import traceback_lines

_SHOWN = "_is_in_the_log"


def show(error: BaseException) -> None:
    """Prints where an error comes from, once, however many requests it ends."""
    if getattr(error, _SHOWN, False):
        return
    setattr(error, _SHOWN, True)
    print(*traceback_lines(error), sep="\n", file=sys.stderr, flush=True)
