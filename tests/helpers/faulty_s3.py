"""A way to an S3 server on which things go wrong, as a seed says."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from dreambooth_sm.checksums import checksum_of, encoded

KINDS = (
    "internal error",
    "slow down",
    "reset before",
    "reset after",
    "short answer",
    "flipped request",
    "flipped answer",
    "delay",
    "expired",
)
_ERRORS = {
    "internal error": (500, "InternalError"),
    "slow down": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "bad digest": (400, "BadDigest"),
}


class FaultySchedule:
    """Which request meets which fault.

    Args:
        seed: the same seed gives the same faults to the same order of requests.
        checksums: whether the server verifies and keeps checksums, as S3 does, or knows nothing of them.

    Attributes:
        met: faults by kind, as they happened.
    """

    def __init__(self, seed: int, *, checksums: bool) -> None:
        self.random = random.Random(seed)
        self.checksums = checksums
        self.rate = self.random.choice([0.02, 0.1, 0.3, 0.6])
        self.kinds = self.random.sample(KINDS, k=self.random.randint(1, len(KINDS)))
        self.met: Counter[str] = Counter()
        self.expired = False
        self.lock = threading.Lock()

    def next(self) -> tuple[str | None, float]:
        """The fault that the next request meets, and a number from 0 to 1 that says where."""
        with self.lock:
            kind = self.random.choice(self.kinds) if self.random.random() < self.rate else None
            # Credentials that have expired stay so.
            self.expired |= kind == "expired"
            if self.expired:
                kind = "expired"
            if kind:
                self.met[kind] += 1
            return kind, self.random.random()


@contextmanager
def faulty(endpoint: str, schedule: FaultySchedule) -> Iterator[str]:
    """Runs the proxy in front of the server at ``endpoint``; its address."""
    upstream = urlsplit(endpoint).netloc

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_request(self) -> None:
            kind, where = schedule.next()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if kind == "reset before":
                return self.reset()
            if kind == "delay":
                time.sleep(0.05 * where)
            if kind == "flipped request":
                body = flip(body, where)
            if kind in _ERRORS:
                return self.refuse(kind)
            headers = dict(self.headers)
            given = headers.get("x-amz-checksum-crc64nvme")
            if schedule.checksums:
                if given and self.command == "PUT" and given != encoded(checksum_of(body)):
                    return self.refuse("bad digest")
            else:
                headers = {n: v for n, v in headers.items() if "checksum" not in n.lower()}
            connection = http.client.HTTPConnection(upstream)
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            if kind == "reset after":
                return self.reset()
            length = response.headers["Content-Length"] if self.command == "HEAD" else str(len(content))
            if kind == "flipped answer" and self.command == "GET":
                content = flip(content, where)
            self.send_response_only(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if kind == "short answer" and content:
                self.wfile.write(content[: int(len(content) * where)])
                return self.reset()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815

        def refuse(self, kind: str) -> None:
            status, code = _ERRORS[kind]
            content = f"<Error><Code>{code}</Code><Message>as arranged</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that went away

    with Server(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def flip(content: bytes, where: float) -> bytes:
    """The content with one bit the other way round."""
    if not content:
        return content
    changed = bytearray(content)
    changed[int(where * len(content))] ^= 1 << int(where * 1e6) % 8
    return bytes(changed)
