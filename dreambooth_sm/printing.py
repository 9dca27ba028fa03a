"""Makes texts printable: one line each, nothing that a terminal obeys, no secrets; and streams that never end a job."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

# Control characters, line and paragraph separators, marks that turn the direction of text, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Names of variables that hold secrets, and what secrets look like.
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|(ACCESS|PRIVATE|SECRET)_KEY)(_|$)", re.IGNORECASE
)
_NO_SECRET_ENDINGS = ("_PATH", "_FILE", "_DIR", "_NAME", "_ARN", "_URL", "_URI")
_SHORTEST_SECRET = 12
# The user and password of an address.
_USER = re.compile(r"(?<=://)[^/\s?#'\"]*@")
# The proofs that a presigned address carries.
_SIGNED = re.compile(r"(?<=[?&])(X-Amz-(?:Signature|Security-Token)|Signature)=[^&\s'\"]+")
SECRET_VALUE = re.compile(
    r"(?<=://)[^/\s?#'\":]*:[^/\s?#'\"]+(?=@)"
    r"|hf_[A-Za-z0-9]{20,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def printable(text: str) -> str:
    r"""A text as one line that no terminal takes for commands: ``"a\x1b[31m"`` as ``"a\\x1b[31m"``."""
    return _UNPRINTABLE.sub(lambda match: repr(match.group())[1:-1], text)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A text without the secrets of this process, and without what looks like one.

    Args:
        environment: variables, whose secrets are known by their names.
    """
    for secret in secrets_of(environment):
        text = text.replace(secret, "***")
    return _SIGNED.sub(r"\1=***", SECRET_VALUE.sub("***", _USER.sub("***@", text)))


def safe(text: object) -> str:
    """Makes a text that quotes something from outside fit to be shown: :func:`redact` and :func:`printable`."""
    return printable(redact(str(text)))


def traceback_lines(error: BaseException) -> list[str]:
    """Where an error comes from, as logs show it."""
    return [f"| {safe(line)}" for line in "".join(traceback.format_exception(error)).splitlines()]


def has_userinfo(url: str) -> bool:
    """Whether an address carries a user's name or password: ``https://name:word@host``."""
    return bool(_USER.search(url))


def names_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return bool(_SECRET_NAME.search(name)) and not name.upper().endswith(_NO_SECRET_ENDINGS)


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """The secrets among some variables' values; short ones are words that a text may hold for other reasons."""
    return [value for name, value in environment.items() if names_secret(name) and len(value) >= _SHORTEST_SECRET]


class _Surviving(io.FileIO):
    """A descriptor whose reader may go away, or whose disk may fill: what can't be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(memoryview(data).cast("B"))


def survive_streams() -> None:
    """Makes standard output and error streams that never raise: not for a reader that went away (``EPIPE``), a full
    disk, or a character that their encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.flush()
        raw = io.BufferedWriter(_Surviving(stream.fileno(), "wb", closefd=False))
        survivor = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, survivor)
