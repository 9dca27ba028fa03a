"""Directories that this user alone can write to: what lies there is trusted by later jobs."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from dreambooth_sm.errors import UserError


def make_private(directory: Path, kept: str, variable: str) -> Path:
    """Makes a directory that this user alone can write to, or finds it.

    Args:
        kept: what is kept there, for the message; and ``variable``, the environment's, that names another place.

    Raises:
        UserError: somebody else could have put something there.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = directory.lstat()
    except OSError as error:
        raise UserError(f"{directory}, where {kept} are kept, can't be made: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{directory}, where {kept} are kept, is not a directory that this user alone can write to; remove it, or "
            f"set {variable} to another directory"
        )
    return directory
