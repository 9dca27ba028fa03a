"""A way to an S3 server on which things go wrong, as a seed says."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from dreambooth_sm.checksums import checksum_of, encoded
from launcher.local.s3 import EmbeddedS3
from tests.helpers.s3_proxy import RESET, Answer, Request, s3_proxy

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
}
_CHECKSUM = "x-amz-checksum-crc64nvme"


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
def faulty(server: EmbeddedS3, schedule: FaultySchedule) -> Iterator[str]:
    """Runs the proxy in front of a server; its address."""
    # Between a request and its answer, which the same thread handles.
    met = threading.local()

    def before(request: Request) -> Answer | None:
        met.kind, met.where = schedule.next()
        if met.kind == "reset before":
            return RESET
        if met.kind == "delay":
            time.sleep(0.05 * met.where)
        if met.kind == "flipped request":
            request.body = flip(request.body, met.where)
        if met.kind in _ERRORS:
            return Answer.error(*_ERRORS[met.kind])
        if schedule.checksums:
            given = request.headers.get(_CHECKSUM)
            if given and request.method == "PUT" and given != encoded(checksum_of(request.body)):
                return Answer.error(400, "BadDigest")
        else:
            request.headers = {n: v for n, v in request.headers.items() if "checksum" not in n}
        return None

    def after(request: Request, answer: Answer) -> None:
        if met.kind == "reset after":
            answer.cut = -1
        if met.kind == "flipped answer" and request.method == "GET":
            answer.body = flip(answer.body, met.where)
        if met.kind == "short answer" and answer.body:
            answer.cut = int(len(answer.body) * met.where)

    with s3_proxy(server, before, after) as address:
        yield address


def flip(content: bytes, where: float) -> bytes:
    """The content with one bit the other way round."""
    if not content:
        return content
    changed = bytearray(content)
    changed[int(where * len(content))] ^= 1 << int(where * 1e6) % 8
    return bytes(changed)
