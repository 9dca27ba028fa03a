"""What the servers that cost next to nothing share: connections, latency, a rate, files that the kernel
sends. Linux only.
"""

from __future__ import annotations

import argparse
import re
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, unquote

# Is sent between two looks at the rate.
_PIECE = 2**20


class Line:
    """A network that all connections share.

    Args:
        rate: bytes a second; 0 for as many as can be.
    """

    def __init__(self, rate: float = 0) -> None:
        self._rate, self._free, self._lock = rate, 0.0, threading.Lock()

    def wait_for(self, size: int) -> None:
        """Returns when these bytes have gone over the line."""
        if not self._rate:
            return
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self._rate
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))


class NullHandler(socketserver.BaseRequestHandler):
    """One connection; methods ``_get`` and the like, of the servers, answer its requests.

    Attributes:
        delay: seconds before each answer.
        directory: with the files that are handed out.
        line: that they are sent over.
        own_rate: bytes a second of one connection; 0 for as many as can be.
        address: of the server.
    """

    delay = 0.0
    directory: Path | None = None
    line = Line()
    own_rate = 0.0
    address = ""

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._own = Line(self.own_rate)
        self._read, self._unused = bytearray(), bytearray(2**20)
        while head := self._next_head():
            line, *fields = head.split("\r\n")
            method, target, _ = line.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
            path, _, query = target.partition("?")
            if headers.get("expect"):
                self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = self._drop(int(headers.get("content-length", 0)))
            time.sleep(self.delay) if self.delay else None
            getattr(self, f"_{method.lower()}")(unquote(path), parse_qs(query, keep_blank_values=True), headers, body)

    def _next_head(self) -> str:
        while (end := self._read.find(b"\r\n\r\n")) < 0:
            received = self.request.recv(2**16)
            if not received:
                return ""
            self._read += received
        head = self._read[:end].decode()
        del self._read[: end + 4]
        return head

    def _drop(self, size: int) -> int:
        """Throws the body of a request away, in the kernel."""
        here = min(size, len(self._read))
        del self._read[:here]
        rest, unused = size - here, self._unused
        while rest and (dropped := self.request.recv_into(unused, min(rest, 2**20), socket.MSG_TRUNC)):
            rest -= dropped
        return size

    def send_part(self, file: Path, asked: str, about: Mapping[str, str]) -> None:
        """A file, or the range of it that is asked for."""
        size = file.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        first = int(found[1]) if found else 0
        last = min(int(found[2] or size - 1), size - 1) if found else size - 1
        part = {"Content-Range": f"bytes {first}-{last}/{size}"} if found else {}
        self.answer(status=206 if found else 200, headers={"Content-Length": str(last - first + 1), **about, **part})
        with file.open("rb") as stream:
            for start in range(first, last + 1, _PIECE):
                piece = min(_PIECE, last + 1 - start)
                self.line.wait_for(piece)
                self._own.wait_for(piece)
                self.request.sendfile(stream, start, piece)

    def answer(self, body: str = "", status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        content = body.encode()
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        lines = [f"HTTP/1.1 {status} OK", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.request.sendall("\r\n".join(lines).encode() + content)


class _Server(socketserver.ThreadingTCPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


def serve(handler: type[NullHandler], about: str | None) -> None:
    """Serves by what the command line says, and prints the address."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--mb-per-s", type=float, default=0)
    parser.add_argument("--connection-mb-per-s", type=float, default=0)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    handler.delay, handler.directory = options.delay_ms / 1e3, options.directory
    handler.line, handler.own_rate = Line(options.mb_per_s * 1e6), options.connection_mb_per_s * 1e6
    with _Server(("127.0.0.1", 0), handler) as server:
        handler.address = "http://{}:{}".format(*server.server_address[:2])
        print(handler.address, flush=True)
        server.serve_forever()
