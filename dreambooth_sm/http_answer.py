"""Answers to HTTP/1.1 requests: `http.client` reads them too, in three times the time, half of a small request's."""

from __future__ import annotations

import re
from http.client import HTTPException
from typing import BinaryIO

_STATUS_LINE = re.compile(rb"HTTP/1\.(\d) (\d{3})(?: (.*))?")
_LONGEST_LINE = 2**16
_MOST_HEADERS = 200
_INTERIM = range(100, 200)
_WITHOUT_BODY = {204, 304}


class Answer:
    """One answer, from a stream on which the next one may follow it. Its head is read at once, its body on demand.

    Attributes:
        status, reason: as in ``200 OK``.
        headers: by their names in lower case.
        length: bytes of the body; None where only its end tells.

    Raises:
        http.client.HTTPException: what came is no answer to an HTTP request.
        OSError: the connection failed or ended too early.
    """

    def __init__(self, stream: BinaryIO, method: str) -> None:
        self._stream = stream
        self.status = 100
        while self.status in _INTERIM:
            line = self._line()
            found = _STATUS_LINE.fullmatch(line)
            if not found:
                raise HTTPException(f"not an HTTP answer: {line[:80]!r}")
            self._version, self.status = found[1], int(found[2])
            self.reason = (found[3] or b"").decode("latin-1")
            self.headers = self._read_headers()
        connection = self.headers.get("connection", "").lower()
        self._stays = connection == "keep-alive" if self._version == b"0" else connection != "close"
        empty = method == "HEAD" or self.status in _WITHOUT_BODY
        self._chunked = not empty and self.headers.get("transfer-encoding", "").lower() == "chunked"
        self.length: int | None = 0 if empty else None
        if not empty and not self._chunked and "content-length" in self.headers:
            self.length = self._number(self.headers["content-length"])
        # Bytes before the end of the body, or of the chunk that is being read.
        self._left: int | None = 0 if self._chunked else self.length

    @property
    def is_reusable(self) -> bool:
        """Whether all of it was read, and the connection is good for another request."""
        return self._stays and self._left == 0 and not self._chunked

    def readinto(self, buffer: memoryview) -> int:
        """Reads on, as much as fits; how many bytes, 0 at the end."""
        if self._chunked and not self._left:
            self._begin_chunk()
        if self._left == 0:
            return 0
        count: int = self._stream.readinto(buffer if self._left is None else buffer[: self._left])  # type: ignore[attr-defined]
        if self._left is not None:
            if not count:
                raise ConnectionError(f"the answer broke off {self._left} bytes before its end")
            self._left -= count
            if self._chunked and not self._left:
                self._line()
        return count

    def read(self) -> bytes:
        """The rest of the body."""
        if self._left == 0 and not self._chunked:
            return b""
        content, buffer = bytearray(), memoryview(bytearray(2**14))
        while count := self.readinto(buffer):
            content += buffer[:count]
        return bytes(content)

    def _begin_chunk(self) -> None:
        self._left = self._number(self._line().partition(b";")[0].decode("latin-1"), 16)
        if not self._left:
            self._read_headers()
            self._chunked = False

    def _number(self, text: str, base: int = 10) -> int:
        try:
            number = int(text, base)
        except ValueError:
            number = -1
        if number < 0:
            raise HTTPException(f"not a number of bytes: {text[:80]!r}")
        return number

    def _read_headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        for _ in range(_MOST_HEADERS):
            line = self._line().decode("latin-1")
            if not line:
                return headers
            name, colon, value = line.partition(":")
            if not colon:
                raise HTTPException(f"not a header: {line[:80]!r}")
            headers[name.lower()] = value.strip()
        raise HTTPException(f"more than {_MOST_HEADERS} headers")

    def _line(self) -> bytes:
        line = self._stream.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            if len(line) == _LONGEST_LINE:
                raise HTTPException(f"a line of more than {_LONGEST_LINE} bytes")
            raise ConnectionError("the connection was closed before the answer's end")
        return line.rstrip(b"\r\n")
