"""An S3 server that costs next to nothing: what it is sent it counts and drops, uncopied, so that clients show speed.

    python -m benchmarks.null_s3 [MILLISECONDS]

Waits that long before each answer, as a network would. Prints its address. It keeps sizes and the checksums that
clients give, and answers with them as S3 does, but verifies nothing and can hand nothing out. Linux only.
"""

from __future__ import annotations

import hashlib
import itertools
import socket
import sys
import time
from base64 import b64decode, b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_COUNT = itertools.count()
_CHECKSUM = "x-amz-checksum-sha256"


class NullS3(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[int, str]] = {}  # noqa: RUF012 - shared by all connections
    delay = 0.0
    parts: dict[str, dict[int, tuple[int, str]]] = {}  # noqa: RUF012

    def do_PUT(self) -> None:
        size = self._drop_body()
        given = self.headers.get(_CHECKSUM, "")
        query = parse_qs(urlsplit(self.path).query)
        if "uploadId" in query:
            self.parts[query["uploadId"][0]][int(query["partNumber"][0])] = size, given
        else:
            self.objects[urlsplit(self.path).path] = size, given
        self._answer(headers={"ETag": f'"{next(_COUNT):032x}"', **({_CHECKSUM: given} if given else {})})

    def do_POST(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        self._drop_body()
        if "uploads" in query:
            upload = f"upload-{next(_COUNT)}"
            self.parts[upload] = {}
            bucket, key = path[1:].split("/", 1)
            self._answer(
                f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{key}</Key><UploadId>{upload}"
                "</UploadId></InitiateMultipartUploadResult>"
            )
            return
        parts = [part for _, part in sorted(self.parts.pop(query["uploadId"][0]).items())]
        digest = hashlib.sha256(b"".join(b64decode(checksum) for _, checksum in parts)).digest()
        checksum = f"{b64encode(digest).decode()}-{len(parts)}" if parts[0][1] else ""
        self.objects[path] = sum(size for size, _ in parts), checksum
        kept = f"<ChecksumSHA256>{checksum}</ChecksumSHA256>" if checksum else ""
        tag = f'"{next(_COUNT):032x}-{len(parts)}"'
        self._answer(f"<CompleteMultipartUploadResult><ETag>{tag}</ETag>{kept}</CompleteMultipartUploadResult>")

    def do_HEAD(self) -> None:
        size, checksum = self.objects.get(urlsplit(self.path).path, (None, ""))
        if size is None:
            self._answer(status=404)
            return
        headers = {"Content-Length": str(size), "ETag": f'"{0:032x}"', "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT"}
        self._answer(headers=headers | ({_CHECKSUM: checksum} if checksum else {}))

    def do_GET(self) -> None:
        self._answer("<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>")

    def do_DELETE(self) -> None:
        self._answer(status=204)

    def _drop_body(self) -> int:
        """Bytes of the object in the body of the request, which is thrown away in the kernel."""
        size = rest = int(self.headers.get("Content-Length") or 0)
        rest -= len(self.rfile.read1(min(rest, 8192))) if rest else 0  # type: ignore[attr-defined]
        unused = bytearray(2**20)
        while rest and (dropped := self.connection.recv_into(unused, min(rest, 2**20), socket.MSG_TRUNC)):
            rest -= dropped
        return int(self.headers.get("x-amz-decoded-content-length") or size)

    def _answer(self, body: str = "", status: int = 200, headers: dict[str, str] | None = None) -> None:
        time.sleep(self.delay)
        headers = {"Content-Length": str(len(body.encode())), **(headers or {})}
        lines = [f"HTTP/1.1 {status} OK", *(f"{name}: {value}" for name, value in headers.items())]
        self.wfile.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


if __name__ == "__main__":
    NullS3.delay = float((sys.argv[1:] or ["0"])[0]) / 1e3
    with _Server(("127.0.0.1", 0), NullS3) as server:
        print("http://{}:{}".format(*server.server_address[:2]), flush=True)
        server.serve_forever()
