"""An S3 server that costs next to nothing, so that clients show speed: what it is sent it counts and drops, and what it
is asked for the kernel sends from files.

    python -m benchmarks.null_s3 [--delay-ms MILLISECONDS] [--directory DIRECTORY]

Waits that long before each answer, as a network would. Prints its address. It hands out DIRECTORY/BUCKET/KEY; of what
it is sent it keeps sizes and the checksums that clients give, and answers with them as S3 does, but verifies nothing.
Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import re
import socket
import socketserver
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

_COUNT = itertools.count()
_CHECKSUM = "x-amz-checksum-crc64nvme"
# Of an object in parts: no MD5 sum that a client could compare.
_ETAG = f'"{0:032x}-1"'
_DATE = "2026-11-01T00:00:00.000Z"


class NullS3(socketserver.BaseRequestHandler):
    """One connection."""

    delay = 0.0
    directory: Path | None = None
    objects: dict[str, tuple[int, str]] = {}  # noqa: RUF012 - size and checksum, shared by all connections
    parts: dict[str, dict[int, int]] = {}  # noqa: RUF012

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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

    def _put(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        size, given = int(headers.get("x-amz-decoded-content-length", body)), headers.get(_CHECKSUM, "")
        if "uploadId" in query:
            self.parts[query["uploadId"][0]][int(query["partNumber"][0])] = size
        else:
            self.objects[path] = size, given
        self._answer(headers={"ETag": f'"{next(_COUNT):032x}"', **({_CHECKSUM: given} if given else {})})

    def _post(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        if "uploads" in query:
            upload = f"upload-{next(_COUNT)}"
            self.parts[upload] = {}
            _, bucket, key = path.split("/", 2)
            names = {"Bucket": bucket, "Key": key, "UploadId": upload}
            self._answer(f"<InitiateMultipartUploadResult>{_xml(names)}</InitiateMultipartUploadResult>")
            return
        parts, checksum = self.parts.pop(query["uploadId"][0]), headers.get(_CHECKSUM, "")
        self.objects[path] = sum(parts.values()), checksum
        facts = {"ETag": f'"{next(_COUNT):032x}-{len(parts)}"', **({"ChecksumCRC64NVME": checksum} if checksum else {})}
        self._answer(f"<CompleteMultipartUploadResult>{_xml(facts)}</CompleteMultipartUploadResult>")

    def _head(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        file = self._file(path)
        size, checksum = (file.stat().st_size, "") if file else self.objects.get(path, (None, ""))
        if size is None:
            self._answer(status=404)
        else:
            self._answer(headers=_about(size) | ({_CHECKSUM: checksum} if checksum else {}))

    def _get(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        file = self._file(path)
        if file is None:
            return self._list(path.strip("/"), query.get("prefix", [""])[0])
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2] or size - 1), size - 1) if asked else size - 1
        about = _about(last - first + 1) | ({"Content-Range": f"bytes {first}-{last}/{size}"} if asked else {})
        self._answer(status=206 if asked else 200, headers=about)
        with file.open("rb") as stream:
            self.request.sendfile(stream, first, last - first + 1)

    def _delete(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        self._answer(status=204)

    def _file(self, path: str) -> Path | None:
        file = self.directory / path.lstrip("/") if self.directory else None
        return file if file and file.is_file() else None

    def _list(self, bucket: str, prefix: str) -> None:
        root = self.directory / bucket if self.directory else Path("/nowhere")
        files = sorted((file for file in root.rglob("*") if file.is_file()), key=str)
        named = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in files]
        listed = [
            f"<Contents>{_xml({'Key': key, 'Size': size, 'LastModified': _DATE, 'ETag': _ETAG})}</Contents>"
            for key, size in named
            if key.startswith(prefix)
        ]
        facts = _xml({"Name": bucket, "Prefix": prefix, "KeyCount": len(listed), "IsTruncated": "false"})
        self._answer(f"<ListBucketResult>{facts}{''.join(listed)}</ListBucketResult>")

    def _answer(self, body: str = "", status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body.encode()
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        lines = [f"HTTP/1.1 {status} OK", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.request.sendall("\r\n".join(lines).encode() + content)


def _about(size: int) -> dict[str, str]:
    return {"Content-Length": str(size), "ETag": _ETAG, "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT"}


def _xml(fields: Mapping[str, object]) -> str:
    return "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in fields.items())


class _Server(socketserver.ThreadingTCPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    NullS3.delay, NullS3.directory = options.delay_ms / 1e3, options.directory
    with _Server(("127.0.0.1", 0), NullS3) as server:
        print("http://{}:{}".format(*server.server_address[:2]), flush=True)
        server.serve_forever()
