"""Errors that nobody expects, in the log."""

from __future__ import annotations

import sys
import traceback

from dreambooth_sm.printing import safe

_SHOWN = "_is_in_the_log"


def show(error: BaseException) -> None:
    """Prints where an error comes from, once, however many requests it ends."""
    if getattr(error, _SHOWN, False):
        return
    setattr(error, _SHOWN, True)
    for line in "".join(traceback.format_exception(error)).splitlines():
        print(f"| {safe(line)}", file=sys.stderr, flush=True)
