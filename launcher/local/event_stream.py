"""Messages of AWS's event streams (``application/vnd.amazon.eventstream``), as embedded services send them."""

from __future__ import annotations

import struct
import zlib

_TEXT = 7  # the type of a header's value


def payload_part(content: bytes) -> bytes:
    """A part of the body of InvokeEndpointWithResponseStream."""
    kinds = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}
    headers = b"".join(_header(name, value) for name, value in kinds.items())
    prelude = struct.pack(">II", 16 + len(headers) + len(content), len(headers))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + content
    return message + struct.pack(">I", zlib.crc32(message))


def _header(name: str, value: str) -> bytes:
    key, text = name.encode(), value.encode()
    return struct.pack(">B", len(key)) + key + struct.pack(">BH", _TEXT, len(text)) + text
