"""CRC-64/NVME, which S3 verifies and keeps for every object: made at memory's speed, and put together from parts."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable


def checksum_of(content: bytes | memoryview) -> int:
    """The CRC of these bytes."""
    return extended(0, content)


def extended(checksum: int, content: bytes | memoryview) -> int:
    """The CRC of what ``checksum`` is of, followed by ``content``."""
    from awscrt.checksums import crc64nvme  # takes 40 ms, and most of what imports this never sends anything

    return crc64nvme(content, checksum)


def combined(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC of parts one after another, each given by its CRC and its size in bytes."""
    from awscrt.checksums import combine_crc64nvme

    whole = 0
    for checksum, size in parts:
        whole = combine_crc64nvme(whole, checksum, size)
    return whole


def encoded(checksum: int) -> str:
    """As S3 writes it: eight bytes, in base64."""
    return b64encode(checksum.to_bytes(8, "big")).decode()
