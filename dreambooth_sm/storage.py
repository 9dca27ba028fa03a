"""S3: a directory goes up verified, with a manifest written last, and comes down verified.

Credentials, region and endpoint come from the standard AWS settings (`AWS_PROFILE`, `AWS_DEFAULT_REGION`,
`AWS_ENDPOINT_URL`, ...). Nothing local is ever deleted here.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode
from uuid import uuid4

from dreambooth_sm.checksums import checksum_of, combined, encoded, extended
from dreambooth_sm.errors import UserError
from dreambooth_sm.http_answer import Answer
from dreambooth_sm.manifest import MANIFEST_NAME, Manifest, ManifestEntry
from dreambooth_sm.parallel import in_parallel
from dreambooth_sm.s3_wire import Body, Headers, Span, chunk_buffer, wire

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

# Larger files travel in parts of this size, several at a time.
PART_SIZE = 16 * 2**20
# Requests at a time, which hide the network's latency.
WORKERS = min(32, max(16, 4 * (os.cpu_count() or 1)))
_MOST_PARTS = 10_000

T = TypeVar("T")
Progress = Callable[[int, int], None]


class TransferError(Exception):
    """A transfer failed although the request was right: network, server, or a copy that differs."""


class UploadError(TransferError):
    """What lies in S3 is incomplete or differs from the local files."""


class DownloadError(TransferError):
    """What was read from S3 is incomplete or differs from its manifest."""


@dataclass(frozen=True)
class S3Uri:
    """A bucket and a key, or a prefix of keys, in it. `uri / "unet/config.json"` is the URI of a key below it.

    Attributes:
        bucket: name of the bucket, or ARN of an access point.
        prefix: key or prefix without leading and trailing slash; empty for the whole bucket.
    """

    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> S3Uri:
        """Reads `s3://bucket/prefix` or `s3://ACCESS-POINT-ARN/prefix`; a trailing slash makes no difference.

        Raises:
            UserError: the text is not such a URI; the message says which part of it is wrong.
        """
        scheme, separator, rest = text.partition("://")
        if scheme != "s3" or not separator:
            raise UserError(f"{text!r} is not an S3 URI: write s3://bucket/prefix")
        if point := re.match(r"arn:aws[a-z-]*:s3:[a-z0-9-]+:\d{12}:accesspoint[/:][a-z0-9-]+(?=/|$)", rest):
            bucket, prefix = point.group(), rest[point.end() + 1 :]
        else:
            bucket, _, prefix = rest.partition("/")
        if not point and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise UserError(
                f"{text!r}: {bucket!r} is not a bucket name: 3 to 63 lower-case letters, digits, dots and hyphens"
            )
        if bucket.endswith("--x-s3"):
            raise UserError(f"{text!r}: a directory bucket (S3 Express One Zone): name a general purpose bucket")
        prefix = prefix.removesuffix("/")
        if prefix != prefix.strip() or (prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/"))):
            raise UserError(f"{text!r}: the prefix has an empty, '.' or '..' segment or a blank at its end")
        return cls(bucket, prefix)

    def __truediv__(self, relative: str) -> S3Uri:
        return S3Uri(self.bucket, f"{self.prefix}/{relative}" if self.prefix else relative)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True)
class S3Options:
    """How objects are written and read; what is left out is the bucket's own choice.

    Attributes:
        kms_key: id or ARN of the KMS key that encrypts the objects.
        acl: canned ACL, such as ``bucket-owner-full-control``.
        tags: tags of every object.
        storage_class: such as ``INTELLIGENT_TIERING``.
        requester_pays: whether we pay for requests to a bucket of that kind.
    """

    kms_key: str | None = None
    acl: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    storage_class: str | None = None
    requester_pays: bool = False

    def reading(self) -> dict[str, Any]:
        """Arguments of boto3's requests that read, list, delete, or send a part."""
        return {"RequestPayer": "requester"} if self.requester_pays else {}

    def writing(self) -> dict[str, Any]:
        """Arguments of boto3's requests that make an object."""
        made = {"ACL": self.acl, "StorageClass": self.storage_class, "Tagging": urlencode(self.tags)}
        if self.kms_key:
            made |= {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key}
        return {name: value for name, value in made.items() if value} | self.reading()


DEFAULTS = S3Options()


def s3_client(
    session: Session | None = None,
    *,
    endpoint_url: str | None = None,
    attempts: int = 8,
    timeout: float = 60,
) -> S3Client:
    """A client that retries and, with an endpoint of your own, puts the bucket into the path of the address.

    Args:
        session: where credentials and region come from; default: the standard AWS settings.
        endpoint_url: default: the standard AWS settings.
        attempts: tries a request, the first included, with growing pauses of 20 s at most.
        timeout: seconds without any answer after which a try has failed.

    Raises:
        UserError: the AWS settings name a profile or an endpoint that does not exist.
    """
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    own_endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=min(timeout, 10),
        read_timeout=timeout,
        max_pool_connections=64,
        # Every request that needs a checksum brings its own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # That checksum is signed; another one of the same bytes would be all that signing the body adds.
        s3={"addressing_style": "path" if own_endpoint else "auto", "payload_signing_enabled": False},
    )
    try:
        session = session or boto3.session.Session()
        return session.client("s3", endpoint_url=endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"the AWS settings do not work: {error}") from error


def check_writable(target: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> None:
    """Tries whether an upload to `target` could start, in well under 20 s, and leaves no object behind.

    Raises:
        UserError: it could not; the message names the URI and what to do.
    """
    client = client or s3_client(attempts=2, timeout=5)
    probe = target / MANIFEST_NAME
    with _explained(target, UserError):
        client.list_objects_v2(Bucket=target.bucket, Prefix=probe.prefix, MaxKeys=1, **options.reading())
        answer = client.create_multipart_upload(Bucket=probe.bucket, Key=probe.prefix, **options.writing())
    if not answer.get("UploadId"):
        raise UserError(f"{target}: what answers is no S3 server: check the network and AWS_ENDPOINT_URL")
    _abort(client, probe, answer["UploadId"], options)


def list_objects(source: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> dict[str, int]:
    """The objects below a prefix: relative key -> size in bytes.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        DownloadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    start = f"{source.prefix}/" if source.prefix else ""
    request = {"Bucket": source.bucket, "Prefix": start, **options.reading()}
    objects: dict[str, int] = {}
    token: str | None = ""
    while token is not None:
        with _explained(source, DownloadError):
            page = client.list_objects_v2(**request)
        objects |= {item["Key"].removeprefix(start): item["Size"] for item in page.get("Contents", [])}
        request["ContinuationToken"] = token = page.get("NextContinuationToken")
    # Consoles make "folders": empty objects whose key ends with a slash.
    return {key: size for key, size in objects.items() if key and not key.endswith("/")}


def get_object(uri: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> bytes | None:
    """The content of one object, checked by the server's checksum where it keeps one; None where there is none.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        DownloadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    content = bytearray()

    def write(offset: int, chunk: memoryview) -> None:
        del content[offset:]  # of a try before
        content.extend(chunk)

    from botocore.exceptions import ClientError

    with _explained(uri, DownloadError):
        try:
            _read(client, uri, options, write=write)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise
    return bytes(content)


def put_object(uri: S3Uri, body: bytes, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> None:
    """Writes one object; the server refuses content that differs from its checksum.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        UploadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    with _explained(uri, UploadError):
        _put(client, uri, body, checksum_of(body), options)


def upload_directory(
    directory: Path,
    target: S3Uri,
    options: S3Options = DEFAULTS,
    *,
    job: str = "",
    step: int | None = None,
    progress: Progress | None = None,
    workers: int = WORKERS,
    part_size: int = PART_SIZE,
    client: S3Client | None = None,
) -> Manifest:
    """Uploads every file below `directory`, verifies every object, then writes `manifest.json`.

    A reader who finds the manifest finds everything that it lists: an earlier upload's manifest goes before any of
    its files is replaced. Files whose object is there already, with the same checksum, are not sent again. Links are
    followed. Other objects under the target stay.

    Args:
        directory: must hold at least one file, and none called `manifest.json` at its top.
        options: encryption, tags and the like of the objects.
        job, step: for the manifest.
        progress: called with bytes done so far and bytes in all, always in the calling thread.
        workers: requests at a time.
        part_size: larger files go up in parts of this many bytes, at least 5 MiB.
        client: default: `s3_client()`.

    Raises:
        UserError: the directory is empty or unfit; no such bucket, no permission, no credentials.
        UploadError: a transfer failed in spite of retries, or an object differs from its file.
    """
    files = _files(directory)
    if not files:
        raise UserError(f"{directory}: there is no file to upload")
    if MANIFEST_NAME in files:
        raise UserError(f"{directory / MANIFEST_NAME}: the upload writes a file of this name: rename yours")
    client = client or s3_client()
    try:
        there = list_objects(target, options, client=client)
    except DownloadError as error:
        raise UploadError(str(error)) from error
    uploads = [_Upload(client, path, name, target, options, part_size) for name, path in files.items()]
    total, done = sum(upload.size for upload in uploads), 0
    known = [upload for upload in uploads if there.get(upload.name) == upload.size]
    with in_parallel((upload.look for upload in known), workers) as looked:
        list(looked)
    due = [upload for upload in uploads if not upload.is_there]
    if due and MANIFEST_NAME in there:
        _delete(client, target / MANIFEST_NAME, options)
    done = total - sum(upload.size for upload in due)
    try:
        with in_parallel((part for upload in due for part in upload.parts()), workers) as sizes:
            for size in sizes:
                done += size
                if progress:
                    progress(done, total)
        with in_parallel((upload.finish for upload in due if upload.upload_id), workers) as finished:
            list(finished)
    except BaseException:
        for upload in due:
            upload.abort()
        raise
    manifest = Manifest(tuple(u.entry for u in uploads), datetime.now(UTC).isoformat(timespec="seconds"), job, step)
    try:
        with _explained(target / MANIFEST_NAME, UploadError):
            text = manifest.to_json().encode()
            _put(client, target / MANIFEST_NAME, text, checksum_of(text), options)
    except BaseException:
        with suppress(UserError, TransferError):
            _delete(client, target / MANIFEST_NAME, options)
        raise
    return manifest


def download_directory(
    source: S3Uri,
    directory: Path,
    options: S3Options = DEFAULTS,
    *,
    workers: int = WORKERS,
    part_size: int = PART_SIZE,
    client: S3Client | None = None,
) -> list[Path]:
    """Downloads what lies below a prefix; each file appears under its name only when it is whole.

    With a `manifest.json` at the prefix exactly the files that it lists are fetched, and checked against it;
    the manifest itself stays in S3. Without one everything below the prefix is fetched.

    Args:
        directory: made if missing; files of the same names are replaced.
        workers: requests at a time.
        part_size: larger files come in parts of this many bytes.
        client: default: `s3_client()`.

    Returns:
        The files, sorted by key.

    Raises:
        UserError: nothing lies there; a key leads out of the directory; no such bucket, no permission.
        DownloadError: a transfer failed in spite of retries, or a file differs from the manifest.
    """
    client = client or s3_client()
    manifest = _find_manifest(source, options, client)
    if manifest:
        entries = manifest.files
    else:
        listed = list_objects(source, options, client=client)
        entries = tuple(ManifestEntry(name, size, "") for name, size in sorted(listed.items()))
    if not entries:
        raise UserError(f"{source}: there is nothing below this prefix: check the bucket and the prefix")
    inside = directory.resolve()
    paths = {entry.path: directory / entry.path for entry in entries}
    astray = {p for p in {path.parent for path in paths.values()} if not p.resolve().is_relative_to(inside)}
    escaping = [name for name, path in paths.items() if path.parent in astray or path.name == ".."]
    if escaping:
        raise UserError(f"{source / name}: this key leads out of {directory}: remove it" for name in escaping)

    downloads = [_Download(client, entry, source, paths[entry.path], options, part_size) for entry in entries]
    try:
        with in_parallel((part for download in downloads for part in download.parts()), workers) as parts:
            list(parts)
    finally:
        for download in downloads:
            download.discard()
    return [download.path for download in downloads]


@dataclass(frozen=True)
class Verification:
    """How the objects below a prefix compare with the manifest there.

    Attributes:
        manifest: what should be there.
        missing: files without an object.
        different: files whose object has another size or checksum.
        unknown: objects that the manifest does not list.
    """

    manifest: Manifest
    missing: tuple[str, ...]
    different: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether a reader gets what the manifest promises; unknown objects do no harm."""
        return not self.missing and not self.different


def verify(
    source: S3Uri, options: S3Options = DEFAULTS, *, workers: int = WORKERS, client: S3Client | None = None
) -> Verification:
    """Compares the objects below a prefix with its manifest: sizes, and the checksums that the server keeps.

    An object for which the server keeps none is read, which takes as long as a download.

    Raises:
        UserError: there is no manifest; no such bucket, no permission, no credentials.
        DownloadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    manifest = read_manifest(source, options, client=client)
    listed = list_objects(source, options, client=client)
    names = {entry.path for entry in manifest.files}

    def compare(entry: ManifestEntry) -> tuple[str, bool]:
        with _explained(source / entry.path, DownloadError):
            whole = listed[entry.path] == entry.size and _object_is(client, source / entry.path, entry, options)
            return entry.path, whole

    present = [entry for entry in manifest.files if entry.path in listed]
    with in_parallel((partial(compare, entry) for entry in present), workers) as compared:
        same = dict(compared)
    return Verification(
        manifest,
        missing=tuple(sorted(names - listed.keys())),
        different=tuple(entry.path for entry in present if not same[entry.path]),
        unknown=tuple(sorted(listed.keys() - names - {MANIFEST_NAME})),
    )


def read_manifest(source: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> Manifest:
    """The manifest at a prefix.

    Raises:
        UserError: there is none, or it is something else.
        DownloadError: the server can't be reached or fails.
    """
    manifest = _find_manifest(source, options, client or s3_client())
    if manifest is None:
        raise UserError(f"{source}: there is no {MANIFEST_NAME}: no upload to this prefix was completed")
    return manifest


def _find_manifest(source: S3Uri, options: S3Options, client: S3Client) -> Manifest | None:
    text = get_object(source / MANIFEST_NAME, options, client=client)
    try:
        return None if text is None else Manifest.from_json(text)
    except ValueError as error:
        raise UserError(f"{source / MANIFEST_NAME}: {error}: remove it or upload the directory again") from error


def delete_directory(target: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> None:
    """Deletes what lies below a prefix, the manifest first.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        TransferError: the server can't be reached or fails.
    """
    client = client or s3_client()
    for name in sorted(list_objects(target, options, client=client), key=lambda name: (name != MANIFEST_NAME, name)):
        _delete(client, target / name, options)


class _Upload:
    """One file on its way: sent by `parts`, closed by `finish` once these were called, or else by `abort`."""

    def __init__(
        self, client: S3Client, path: Path, name: str, target: S3Uri, options: S3Options, part_size: int
    ) -> None:
        self.client, self.path, self.name, self.uri, self.options = client, path, name, target / name, options
        self.size = path.stat().st_size
        self.spans = _spans(self.size, max(part_size, -(-self.size // _MOST_PARTS)))
        self.checksums = [0] * len(self.spans)
        self.etags = [""] * len(self.spans)
        # Of parts for which the server named no checksum, but their MD5 sum.
        self.md5s: dict[int, bytes] = {}
        self.upload_id = ""
        self.is_there = False

    @property
    def entry(self) -> ManifestEntry:
        """Of a file whose parts were all read."""
        whole = combined((checksum, size) for checksum, (_, size) in zip(self.checksums, self.spans, strict=True))
        return ManifestEntry(self.name, self.size, encoded(whole))

    def look(self) -> None:
        """Finds out whether the object holds this file already, as far as the server says."""
        with _explained(self.uri, UploadError):
            kept = _kept_checksum(self.client, self.uri, self.options)
        if kept:
            with self.path.open("rb", buffering=0) as file:
                for number in range(len(self.spans)):
                    self._sum_up(file, number)
            self.is_there = kept == self.entry.crc64nvme

    def parts(self) -> Iterator[Callable[[], int]]:
        """Requests that send the file and return their bytes: one for a small file, else one a part."""
        if len(self.spans) > 1:
            with _explained(self.uri, UploadError):
                self.upload_id = self.client.create_multipart_upload(
                    Bucket=self.uri.bucket,
                    Key=self.uri.prefix,
                    ChecksumAlgorithm="CRC64NVME",
                    ChecksumType="FULL_OBJECT",
                    **self.options.writing(),
                )["UploadId"]
        yield from (partial(self._send, number) for number in range(len(self.spans)))

    def _sum_up(self, file: FileIO, number: int) -> Body:
        """The part as a request's body, its checksum noted."""
        body, checksum, chunk = Span(file, *self.spans[number]), 0, memoryview(b"")
        try:
            for chunk in body.chunks():
                checksum = extended(checksum, chunk)
        except OSError as error:
            raise UploadError(f"{self.path}: the file changed while it was uploaded: {error}") from error
        self.checksums[number] = checksum
        return body if body.size > len(chunk) else bytes(chunk)

    def _send(self, number: int) -> int:
        with _explained(self.uri, UploadError), self.path.open("rb", buffering=0) as file:
            body = self._sum_up(file, number)
            if not self.upload_id:
                _put(self.client, self.uri, body, self.checksums[number], self.options)
            else:
                answer = wire(self.client, self.uri.bucket).put(
                    self.uri.prefix,
                    body,
                    _checksum_headers(self.checksums[number]) | _as_headers(self.options.reading()),
                    {"partNumber": str(number + 1), "uploadId": self.upload_id},
                )
                self.etags[number] = answer.get("etag", "")
                if _CHECKSUM not in answer and (md5 := _md5_in(answer, body, self.checksums[number])):
                    self.md5s[number] = md5
        return self.spans[number][1]

    def finish(self) -> None:
        with _explained(self.uri, UploadError):
            answer = self.client.complete_multipart_upload(
                Bucket=self.uri.bucket,
                Key=self.uri.prefix,
                UploadId=self.upload_id,
                MultipartUpload={
                    "Parts": [
                        {"PartNumber": number, "ETag": etag, "ChecksumCRC64NVME": encoded(checksum)}
                        for number, (etag, checksum) in enumerate(zip(self.etags, self.checksums, strict=True), start=1)
                    ]
                },
                ChecksumCRC64NVME=self.entry.crc64nvme,
                ChecksumType="FULL_OBJECT",
                **self.options.reading(),
            )
            kept = answer.get("ChecksumCRC64NVME", "")
            if kept or answer.get("ETag", "").strip('"') != self._etag:
                _verify(self.client, self.uri, self.entry, self.options, kept)

    @property
    def _etag(self) -> str | None:
        """The entity tag of an object made of these parts, where the server told the MD5 sum of each."""
        if len(self.md5s) < len(self.spans):
            return None
        md5s = b"".join(self.md5s[number] for number in range(len(self.spans)))
        return f"{hashlib.md5(md5s, usedforsecurity=False).hexdigest()}-{len(self.spans)}"

    def abort(self) -> None:
        if self.upload_id:
            _abort(self.client, self.uri, self.upload_id, self.options)


class _Download:
    """One file on its way: written by `parts` under another name, and given its own by the last of them."""

    def __init__(
        self, client: S3Client, entry: ManifestEntry, source: S3Uri, path: Path, options: S3Options, part_size: int
    ) -> None:
        self.client, self.entry, self.uri, self.path, self.options = client, entry, source / entry.path, path, options
        self.source = source
        self.unchecked = path.with_name(f".{uuid4().hex}.unchecked")
        self.spans = _spans(entry.size, part_size)
        self.checksums: dict[int, int] = {}
        self.started = False
        self.lock = threading.Lock()

    def parts(self) -> Iterator[Callable[[], None]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.started = True
        if len(self.spans) > 1:
            with self.unchecked.open("wb") as stream:
                stream.truncate(self.entry.size)
        yield from (partial(self._fetch, number) for number in range(len(self.spans)))

    def _fetch(self, number: int) -> None:
        mode = "wb" if len(self.spans) == 1 else "r+b"
        with _explained(self.uri, DownloadError), self.unchecked.open(mode, buffering=0) as stream:

            def write(offset: int, chunk: memoryview) -> None:
                stream.seek(offset)
                stream.write(chunk)

            checksum = _read(self.client, self.uri, self.options, self.entry.size, self.spans[number], write)
        with self.lock:
            self.checksums[number] = checksum
            if len(self.checksums) == len(self.spans):
                self._finish()

    def _finish(self) -> None:
        """Checks the file and gives it its name."""
        whole = combined((self.checksums[number], size) for number, (_, size) in enumerate(self.spans))
        if self.entry.crc64nvme not in ("", encoded(whole)):
            raise DownloadError(f"{self.uri}: its checksum is not the one in {self.source / MANIFEST_NAME}")
        self.unchecked.replace(self.path)
        self.started = False

    def discard(self) -> None:
        if self.started:
            self.unchecked.unlink(missing_ok=True)


def _spans(size: int, part_size: int) -> list[tuple[int, int]]:
    """First byte and size of each part of a file; an empty file has one."""
    return [(first, min(part_size, size - first)) for first in range(0, max(1, size), part_size)]


def _files(directory: Path) -> dict[str, Path]:
    """Every file below a directory by its relative POSIX path, sorted; links are followed, not in circles."""

    def fail(error: OSError) -> None:
        raise error

    found, top = {}, directory.absolute()
    for parent, folders, names in os.walk(top, onerror=fail, followlinks=True):
        here = Path(parent)
        above = {folder.resolve() for folder in (here, *here.parents)}
        folders[:] = [name for name in folders if (here / name).resolve() not in above]
        prefix = "" if here == top else f"{here.relative_to(top).as_posix()}/"
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 - for many small files, at a third of pathlib's time
            if not os.path.isfile(path):  # noqa: PTH113
                raise UserError(f"{path}: neither a file nor a directory (a broken link?): remove it")
            found[prefix + name] = Path(path)
    return dict(sorted(found.items()))


_CHECKSUM = "x-amz-checksum-crc64nvme"
_HEADERS = {
    "ACL": "x-amz-acl",
    "RequestPayer": "x-amz-request-payer",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "StorageClass": "x-amz-storage-class",
    "Tagging": "x-amz-tagging",
}


def _as_headers(arguments: Mapping[str, str]) -> dict[str, str]:
    """boto3's arguments as the headers that it makes of them."""
    return {_HEADERS[name]: value for name, value in arguments.items()}


def _checksum_headers(checksum: int) -> dict[str, str]:
    return {_CHECKSUM: encoded(checksum), "x-amz-sdk-checksum-algorithm": "CRC64NVME"}


def _put(client: S3Client, uri: S3Uri, body: Body, checksum: int, options: S3Options) -> None:
    headers = _checksum_headers(checksum) | _as_headers(options.writing())
    answer = wire(client, uri.bucket).put(uri.prefix, body, headers)
    if _CHECKSUM not in answer and _md5_in(answer, body, checksum):
        return
    size = body.size if isinstance(body, Span) else len(body)
    _verify(client, uri, ManifestEntry(uri.prefix, size, encoded(checksum)), options, answer.get(_CHECKSUM, ""))


def _md5_in(answer: Headers, body: Body, checksum: int) -> bytes:
    """The MD5 sum of what was sent, if the server gives it as the entity tag and the body still has its checksum."""
    etag = answer.get("etag", "").strip('"')
    if not re.fullmatch(r"[0-9a-f]{32}", etag):
        return b""
    md5, crc = hashlib.md5(usedforsecurity=False), 0
    for chunk in [memoryview(body)] if isinstance(body, bytes) else body.chunks():
        md5.update(chunk)
        crc = extended(crc, chunk)
    return md5.digest() if (md5.hexdigest(), crc) == (etag, checksum) else b""


def _verify(client: S3Client, uri: S3Uri, entry: ManifestEntry, options: S3Options, kept: str) -> None:
    """Raises UploadError unless the server has, by the checksum in its answer or by a closer look, what was sent."""
    if not (kept == entry.crc64nvme if kept else _object_is(client, uri, entry, options)):
        raise UploadError(f"{uri}: the object in S3 differs from the local file: upload it again")


def _object_is(client: S3Client, uri: S3Uri, entry: ManifestEntry, options: S3Options) -> bool:
    """Compares an object with its entry: by the checksum that the server keeps, or else by reading it."""
    if not entry.crc64nvme:
        return True  # all that is known is its size
    kept = _kept_checksum(client, uri, options)
    return (kept or encoded(_read(client, uri, options, entry.size))) == entry.crc64nvme


def _kept_checksum(client: S3Client, uri: S3Uri, options: S3Options) -> str:
    headers = {"x-amz-checksum-mode": "ENABLED"} | _as_headers(options.reading())
    return wire(client, uri.bucket).head(uri.prefix, headers).get(_CHECKSUM, "")


def _read(
    client: S3Client,
    uri: S3Uri,
    options: S3Options,
    whole: int | None = None,
    span: tuple[int, int] | None = None,
    write: Callable[[int, memoryview], object] = lambda offset, chunk: None,
) -> int:
    """Reads an object or a part of it; a body that breaks off is read anew.

    Args:
        whole: bytes that the object should have.
        span: first byte and size of the part.
        write: gets each chunk with its offset in the object.

    Returns:
        the CRC of what was read.

    Raises:
        DownloadError: the object has another size.
    """
    headers = _as_headers(options.reading())
    if span and span[1] != whole:
        headers["range"] = f"bytes={span[0]}-{sum(span) - 1}"
    else:
        headers["x-amz-checksum-mode"] = "ENABLED"

    def receive(answer: Answer) -> int:
        total = answer.headers.get("content-range", f"/{answer.length}").rpartition("/")[2]
        if whole is not None and total != str(whole):
            raise DownloadError(f"{uri}: the object has {total} bytes instead of {whole}: it was replaced")
        offset = span[0] if span else 0
        buffer, checksum = chunk_buffer(), 0
        while count := answer.readinto(buffer):
            checksum = extended(checksum, buffer[:count])
            write(offset, buffer[:count])
            offset += count
        if answer.headers.get(_CHECKSUM, encoded(checksum)) != encoded(checksum):
            raise ConnectionError("what arrived differs from the checksum that came with it")
        return checksum

    return wire(client, uri.bucket).get(uri.prefix, headers, receive)


def _delete(client: S3Client, uri: S3Uri, options: S3Options) -> None:
    with _explained(uri, TransferError):
        client.delete_object(Bucket=uri.bucket, Key=uri.prefix, **options.reading())  # type: ignore[arg-type]


def _abort(client: S3Client, uri: S3Uri, upload_id: str, options: S3Options) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    # Without the right to abort, the bucket's lifecycle rule tidies up; the error that led here matters more.
    with suppress(BotoCoreError, ClientError):
        client.abort_multipart_upload(Bucket=uri.bucket, Key=uri.prefix, UploadId=upload_id, **options.reading())  # type: ignore[arg-type]


_CREDENTIALS = "the AWS credentials are wrong or have expired: renew them"
_DENIED = (
    "access denied: allow s3:PutObject, s3:GetObject, s3:DeleteObject, s3:ListBucket and s3:AbortMultipartUpload there "
    "(and the bucket's KMS key, if it has one) to the role or user in use"
)
_ELSEWHERE = "the bucket is in another region: set AWS_DEFAULT_REGION to it"
_ADVICE = {
    "NoSuchBucket": "the bucket does not exist: create it or correct its name",
    "AccessDenied": _DENIED,
    # An answer to HeadObject has no body, hence only the status.
    "403": _DENIED,
    "ExpiredToken": _CREDENTIALS,
    "InvalidAccessKeyId": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "PermanentRedirect": _ELSEWHERE,
}


@contextmanager
def _explained(uri: S3Uri, fault: type[Exception]) -> Iterator[None]:
    """Turns boto's errors into one sentence: UserError where the reader can put it right, else `fault`."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        CredentialRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
        SSOError,
    )
    from botocore.parsers import ResponseParserError

    try:
        yield
    except ClientError as error:
        advice = _ADVICE.get(error.response["Error"]["Code"])
        raise UserError(f"{uri}: {advice}") if advice else fault(f"{uri}: {error}") from error
    except (CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, SSOError) as error:
        raise UserError(
            f"{uri}: no AWS credentials: {error}: configure a profile, a role or AWS_ACCESS_KEY_ID"
        ) from error
    except (Boto3Error, BotoCoreError, ResponseParserError, ValueError) as error:  # ValueError: no number in a number
        raise fault(f"{uri}: {error}: check the network, the region and AWS_ENDPOINT_URL") from error
