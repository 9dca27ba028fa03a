"""An S3 server that costs next to nothing, so that clients show speed: what it is sent it counts and drops, and what it
is asked for the kernel sends from files.

    python -m benchmarks.null_s3 [--delay-ms MILLISECONDS] [--mb-per-s RATE] [--directory DIRECTORY]

Waits that long before each answer, as a network would, and sends no faster than that in all. Prints its address. It
hands out DIRECTORY/BUCKET/KEY; of what it is sent it keeps sizes and the checksums that clients give, and answers with
them as S3 does, but verifies nothing. Linux only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.null_http import NullHandler, serve

_COUNT = itertools.count()
_CHECKSUM = "x-amz-checksum-crc64nvme"
# Of an object in parts: no MD5 sum that a client could compare.
_ETAG = f'"{0:032x}-1"'
_DATE = "2026-11-01T00:00:00.000Z"
_ABOUT = {"ETag": _ETAG, "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT"}


class NullS3(NullHandler):
    """One connection."""

    objects: dict[str, tuple[int, str]] = {}  # noqa: RUF012 - size and checksum, shared by all connections
    parts: dict[str, dict[int, int]] = {}  # noqa: RUF012

    def _put(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        size, given = int(headers.get("x-amz-decoded-content-length", body)), headers.get(_CHECKSUM, "")
        if "uploadId" in query:
            self.parts[query["uploadId"][0]][int(query["partNumber"][0])] = size
        else:
            self.objects[path] = size, given
        self.answer(headers={"ETag": f'"{next(_COUNT):032x}"', **({_CHECKSUM: given} if given else {})})

    def _post(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        if "uploads" in query:
            upload = f"upload-{next(_COUNT)}"
            self.parts[upload] = {}
            _, bucket, key = path.split("/", 2)
            names = {"Bucket": bucket, "Key": key, "UploadId": upload}
            self.answer(f"<InitiateMultipartUploadResult>{_xml(names)}</InitiateMultipartUploadResult>")
            return
        parts, checksum = self.parts.pop(query["uploadId"][0]), headers.get(_CHECKSUM, "")
        self.objects[path] = sum(parts.values()), checksum
        facts = {"ETag": f'"{next(_COUNT):032x}-{len(parts)}"', **({"ChecksumCRC64NVME": checksum} if checksum else {})}
        self.answer(f"<CompleteMultipartUploadResult>{_xml(facts)}</CompleteMultipartUploadResult>")

    def _head(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        file = self._file(path)
        size, checksum = (file.stat().st_size, "") if file else self.objects.get(path, (None, ""))
        if size is None:
            self.answer(status=404)
        else:
            self.answer(headers={"Content-Length": str(size), **_ABOUT} | ({_CHECKSUM: checksum} if checksum else {}))

    def _get(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        file = self._file(path)
        if file is None and path.strip("/").count("/"):
            return self.answer("<Error><Code>NoSuchKey</Code></Error>", status=404)
        if file is None:
            return self._list(path.strip("/"), query.get("prefix", [""])[0])
        self.send_part(file, headers.get("range", ""), _ABOUT)

    def _delete(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        self.answer(status=204)

    def _file(self, path: str) -> Path | None:
        file = self.directory / path.lstrip("/") if self.directory else None
        return file if file and file.is_file() else None

    def _list(self, bucket: str, prefix: str) -> None:
        root = self.directory / bucket if self.directory else Path("/nowhere")
        below = root / prefix.rpartition("/")[0]
        files = sorted((file for file in below.rglob("*") if file.is_file()), key=str)
        named = [(file.relative_to(root).as_posix(), file.stat().st_size) for file in files]
        listed = [
            f"<Contents>{_xml({'Key': key, 'Size': size, 'LastModified': _DATE, 'ETag': _ETAG})}</Contents>"
            for key, size in named
            if key.startswith(prefix)
        ]
        facts = _xml({"Name": bucket, "Prefix": prefix, "KeyCount": len(listed), "IsTruncated": "false"})
        self.answer(f"<ListBucketResult>{facts}{''.join(listed)}</ListBucketResult>")


def _xml(fields: Mapping[str, object]) -> str:
    return "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in fields.items())


if __name__ == "__main__":
    serve(NullS3, __doc__)
