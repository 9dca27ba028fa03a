"""S3: a directory goes up verified, with a manifest written last, and comes down verified.

Credentials, region and endpoint come from the standard AWS settings (`AWS_PROFILE`, `AWS_DEFAULT_REGION`,
`AWS_ENDPOINT_URL`, ...). Nothing local is ever deleted here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode
from uuid import uuid4

from dreambooth_sm.errors import UserError

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

MANIFEST_NAME = "manifest.json"
# The same on every machine, whatever its memory: an object's checksum depends on it.
PART_SIZE = 16 * 2**20
# Requests at a time, which hide the network's latency. Memory follows: one part each, 256 MiB, and 512 MiB where there
# are eight cores or more, and memory with them.
WORKERS = min(32, max(16, 4 * (os.cpu_count() or 1)))
_MOST_PARTS = 10_000
_CHUNK = 2**18  # stays in a core's cache between being received, hashed and written
# Tries to read a body that breaks off; opening one is retried by the client itself.
_READS = 5

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
        prefix = prefix.removesuffix("/")
        if prefix != prefix.strip() or (prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/"))):
            raise UserError(f"{text!r}: the prefix has an empty, '.' or '..' segment or a blank at its end")
        return cls(bucket, prefix)

    def __truediv__(self, relative: str) -> S3Uri:
        return S3Uri(self.bucket, f"{self.prefix}/{relative}" if self.prefix else relative)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True)
class ManifestEntry:
    """One file.

    Attributes:
        path: POSIX path relative to the manifest.
        size: in bytes.
        sha256: in hex; of a file larger than ``part_size`` it is the SHA-256 of its parts' SHA-256s, which S3 calls
            composite and keeps for the object: every byte is hashed once, by several cores at a time.
        part_size: bytes of each part but the last.
    """

    path: str
    size: int
    sha256: str
    part_size: int


@dataclass(frozen=True)
class Manifest:
    """What a complete upload consists of.

    Attributes:
        files: one entry a file, sorted by path; the manifest itself is not among them.
        created: UTC time of the upload in ISO 8601.
        job: name of the job that made the files; empty if none did.
        step: optimizer steps after which they were made; None where that means nothing.
    """

    files: tuple[ManifestEntry, ...]
    created: str
    job: str = ""
    step: int | None = None

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> str:
        """With a SHA-256 of its own: everything else is compared with it, on any server."""
        fields = asdict(self)
        return json.dumps(fields | {"sha256": _sha256_of(fields)}, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: the text is something else, or was damaged.
        """
        try:
            fields = json.loads(text)
            if fields.pop("sha256") != _sha256_of(fields):
                raise ValueError("it was damaged: its SHA-256 is another")
            return cls(**fields | {"files": tuple(ManifestEntry(**entry) for entry in fields["files"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a manifest: {error}") from error


def _sha256_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


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
        # Every request that needs a checksum brings its own SHA-256.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # That SHA-256 is signed; a second one of the same bytes would be all that signing the body adds.
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
    with _explained(source, DownloadError):
        pages = client.get_paginator("list_objects_v2").paginate(**request)
        objects = {item["Key"].removeprefix(start): item["Size"] for page in pages for item in page.get("Contents", [])}
    # Consoles make "folders": empty objects whose key ends with a slash.
    return {key: size for key, size in objects.items() if key and not key.endswith("/")}


def get_object(uri: S3Uri, *, client: S3Client | None = None) -> bytes | None:
    """The content of one object, checked by the server's checksum where it keeps one; None where there is none.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        DownloadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    with _explained(uri, DownloadError):
        try:
            return client.get_object(Bucket=uri.bucket, Key=uri.prefix, ChecksumMode="ENABLED")["Body"].read()
        except client.exceptions.NoSuchKey:
            return None


def put_object(uri: S3Uri, body: bytes, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> None:
    """Writes one object; the server refuses content that differs from its SHA-256.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        UploadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    with _explained(uri, UploadError):
        _put(client, uri, body, options)


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
    its files is replaced. Files whose object is there already, with the same SHA-256, are not sent again. Links are
    followed. Other objects under the target stay.

    Args:
        directory: must hold at least one file, and none called `manifest.json` at its top.
        options: encryption, tags and the like of the objects.
        job, step: for the manifest.
        progress: called with bytes done so far and bytes in all, always in the calling thread.
        workers: requests at a time; memory use is that many parts.
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
    # Leaving the pool waits for the requests in flight, so that none of their parts outlives the abort.
    with ThreadPoolExecutor(workers) as pool:
        known = [upload for upload in uploads if there.get(upload.name) == upload.size]
        unchanged = dict(zip(known, _in_parallel(pool, (upload.is_there for upload in known), workers), strict=True))
        due = [upload for upload in uploads if not unchanged.get(upload)]
        if due and MANIFEST_NAME in there:
            _delete(client, target / MANIFEST_NAME, options)
        try:
            done = total - sum(upload.size for upload in due)
            for size in _in_parallel(pool, (part for upload in due for part in upload.parts()), workers):
                done += size
                if progress:
                    progress(done, total)
            list(_in_parallel(pool, (upload.finish for upload in due), workers))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            for upload in due:
                upload.abort()
            raise
    manifest = Manifest(tuple(u.entry for u in uploads), datetime.now(UTC).isoformat(timespec="seconds"), job, step)
    try:
        with _explained(target / MANIFEST_NAME, UploadError):
            _put(client, target / MANIFEST_NAME, manifest.to_json().encode(), options)
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
    client: S3Client | None = None,
) -> list[Path]:
    """Downloads what lies below a prefix; each file appears under its name only when it is whole.

    With a `manifest.json` at the prefix exactly the files that it lists are fetched, and checked against it;
    the manifest itself stays in S3. Without one everything below the prefix is fetched.

    Args:
        directory: made if missing; files of the same names are replaced.
        workers: requests at a time.
        client: default: `s3_client()`.

    Returns:
        The files, sorted by key.

    Raises:
        UserError: nothing lies there; a key leads out of the directory; no such bucket, no permission.
        DownloadError: a transfer failed in spite of retries, or a file differs from the manifest.
    """
    client = client or s3_client()
    listed = list_objects(source, options, client=client)
    if MANIFEST_NAME in listed:
        entries = read_manifest(source, options, client=client).files
    else:
        entries = tuple(ManifestEntry(name, size, "", PART_SIZE) for name, size in sorted(listed.items()))
    if not entries:
        raise UserError(f"{source}: there is nothing below this prefix: check the bucket and the prefix")
    inside = directory.resolve()
    escaping = [e.path for e in entries if not (directory / e.path).resolve().is_relative_to(inside)]
    if escaping:
        raise UserError(f"{source / name}: this key leads out of {directory}: remove it" for name in escaping)

    downloads = [_Download(client, entry, source, directory / entry.path, options) for entry in entries]
    with ThreadPoolExecutor(workers) as pool:
        try:
            for download in _in_parallel(pool, (part for d in downloads for part in d.parts()), workers):
                download.finish_if_whole()
        finally:
            pool.shutdown(cancel_futures=True)
            for download in downloads:
                download.discard()
    return [download.path for download in downloads]


@dataclass(frozen=True)
class Verification:
    """How the objects below a prefix compare with the manifest there.

    Attributes:
        manifest: what should be there.
        missing: files without an object.
        different: files whose object has another size or SHA-256.
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
    """Compares the objects below a prefix with its manifest: sizes, and the SHA-256s that the server keeps.

    An object for which the server keeps none is read, which takes as long as a download.

    Raises:
        UserError: there is no manifest; no such bucket, no permission, no credentials.
        DownloadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    listed = list_objects(source, options, client=client)
    if MANIFEST_NAME not in listed:
        raise UserError(f"{source}: there is no {MANIFEST_NAME}: no upload to this prefix was completed")
    manifest = read_manifest(source, options, client=client)
    names = {entry.path for entry in manifest.files}

    def is_same(entry: ManifestEntry) -> bool:
        with _explained(source / entry.path, DownloadError):
            return listed[entry.path] == entry.size and _object_is(client, source / entry.path, entry, options)

    present = [entry for entry in manifest.files if entry.path in listed]
    with ThreadPoolExecutor(workers) as pool:
        same = list(_in_parallel(pool, (partial(is_same, entry) for entry in present), workers))
    return Verification(
        manifest,
        missing=tuple(sorted(names - listed.keys())),
        different=tuple(entry.path for entry, equal in zip(present, same, strict=True) if not equal),
        unknown=tuple(sorted(listed.keys() - names - {MANIFEST_NAME})),
    )


def read_manifest(source: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> Manifest:
    """The manifest at a prefix.

    Raises:
        UserError: there is none, or it is something else.
        DownloadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    uri = source / MANIFEST_NAME
    with _explained(uri, DownloadError):
        place = {"Bucket": uri.bucket, "Key": uri.prefix, **options.reading()}
        text = client.get_object(**place)["Body"].read()
    try:
        return Manifest.from_json(text)
    except ValueError as error:
        raise UserError(f"{uri}: {error}: remove it or upload the directory again") from error


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
        self.part_size = max(part_size, -(-self.size // _MOST_PARTS))
        self.digests = [b""] * _count_parts(self.size, self.part_size)
        self.etags = [""] * len(self.digests)
        self.upload_id = ""

    @property
    def entry(self) -> ManifestEntry:
        """Of a file whose parts were all read."""
        return ManifestEntry(self.name, self.size, _combine(self.digests).hex(), self.part_size)

    def is_there(self) -> bool:
        """Whether the object holds this file already, as far as the server says."""
        with _explained(self.uri, UploadError):
            kept = _kept_sha256(self.client, self.uri, self.options)
        if not kept:
            return False
        for number in range(len(self.digests)):
            self._read(number)
        return _is_sha256(kept, self.entry)

    def parts(self) -> Iterator[Callable[[], int]]:
        """Requests that send the file and return their bytes: one for a small file, else one a part."""
        if len(self.digests) > 1:
            with _explained(self.uri, UploadError):
                self.upload_id = self.client.create_multipart_upload(
                    Bucket=self.uri.bucket, Key=self.uri.prefix, ChecksumAlgorithm="SHA256", **self.options.writing()
                )["UploadId"]
        yield from (partial(self._send, number) for number in range(len(self.digests)))

    def _read(self, number: int) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(number * self.part_size)
            chunk = stream.read(self.part_size)
        if len(chunk) != min(self.part_size, self.size - number * self.part_size):
            raise UploadError(f"{self.path}: the file changed while it was uploaded")
        self.digests[number] = hashlib.sha256(chunk).digest()
        return chunk

    def _send(self, number: int) -> int:
        chunk = self._read(number)
        with _explained(self.uri, UploadError):
            if not self.upload_id:
                _put(self.client, self.uri, chunk, self.options, self.digests[number])
            else:
                self.etags[number] = self.client.upload_part(
                    Bucket=self.uri.bucket,
                    Key=self.uri.prefix,
                    UploadId=self.upload_id,
                    PartNumber=number + 1,
                    Body=chunk,
                    ChecksumAlgorithm="SHA256",
                    ChecksumSHA256=_base64(self.digests[number]),
                    **self.options.reading(),
                )["ETag"]
        return len(chunk)

    def finish(self) -> None:
        if not self.upload_id:
            return
        with _explained(self.uri, UploadError):
            answer = self.client.complete_multipart_upload(
                Bucket=self.uri.bucket,
                Key=self.uri.prefix,
                UploadId=self.upload_id,
                MultipartUpload={
                    "Parts": [
                        {"PartNumber": number, "ETag": etag, "ChecksumSHA256": _base64(digest)}
                        for number, (etag, digest) in enumerate(zip(self.etags, self.digests, strict=True), start=1)
                    ]
                },
                **self.options.reading(),
            )
            _verify(self.client, self.uri, self.entry, self.options, answer.get("ChecksumSHA256", ""))

    def abort(self) -> None:
        if self.upload_id:
            _abort(self.client, self.uri, self.upload_id, self.options)


class _Download:
    """One file on its way: written by `parts` under another name, and given its own by `finish_if_whole`."""

    def __init__(self, client: S3Client, entry: ManifestEntry, source: S3Uri, path: Path, options: S3Options) -> None:
        self.client, self.entry, self.uri, self.path, self.options = client, entry, source / entry.path, path, options
        self.source = source
        self.unchecked = path.with_name(f".{uuid4().hex}.unchecked")
        self.digests = [b""] * _count_parts(entry.size, entry.part_size)
        self.started = False

    def parts(self) -> Iterator[Callable[[], _Download]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.started = True
        with self.unchecked.open("wb") as stream:
            stream.truncate(self.entry.size)
        yield from (partial(self._fetch, number) for number in range(len(self.digests)))

    def _fetch(self, number: int) -> _Download:
        first = number * self.entry.part_size
        size = min(self.entry.part_size, self.entry.size - first)
        with _explained(self.uri, DownloadError), self.unchecked.open("r+b", buffering=0) as stream:

            def write(offset: int, chunk: bytes) -> None:
                stream.seek(offset)
                stream.write(chunk)

            self.digests[number] = _read(self.client, self.uri, self.options, self.entry.size, first, size, write)
        return self

    def finish_if_whole(self) -> None:
        """Checks the file and gives it its name, once all parts are there."""
        if not self.started or not all(self.digests):
            return
        if self.entry.sha256 not in ("", _combine(self.digests).hex()):
            raise DownloadError(f"{self.uri}: its SHA-256 is not the one in {self.source / MANIFEST_NAME}")
        self.unchecked.replace(self.path)
        self.started = False

    def discard(self) -> None:
        if self.started:
            self.unchecked.unlink(missing_ok=True)


def _count_parts(size: int, part_size: int) -> int:
    return max(1, -(-size // part_size))


def _combine(digests: list[bytes]) -> bytes:
    """The SHA-256 that S3 keeps for an object of these parts."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()


def _files(directory: Path) -> dict[str, Path]:
    """Every file below a directory by its relative POSIX path, sorted; links are followed, not in circles."""

    def fail(error: OSError) -> None:
        raise error

    found = {}
    for parent, folders, names in os.walk(directory.absolute(), onerror=fail, followlinks=True):
        here = Path(parent)
        above = {folder.resolve() for folder in (here, *here.parents)}
        folders[:] = [name for name in folders if (here / name).resolve() not in above]
        for path in (here / name for name in names):
            if not path.is_file():
                raise UserError(f"{path}: neither a file nor a directory (a broken link?): remove it")
            found[path.relative_to(directory.absolute()).as_posix()] = path
    return dict(sorted(found.items()))


def _in_parallel(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], window: int) -> Iterator[T]:
    """Results in order; unlike `pool.map`, takes a task only when fewer than `window + 1` are unfinished."""
    pending: deque[Future[T]] = deque()
    for task in tasks:
        pending.append(pool.submit(task))
        if len(pending) > window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _base64(digest: bytes) -> str:
    return b64encode(digest).decode()


def _put(client: S3Client, uri: S3Uri, body: bytes, options: S3Options, sha256: bytes | None = None) -> None:
    sha256 = sha256 or hashlib.sha256(body).digest()
    answer = client.put_object(
        Bucket=uri.bucket,
        Key=uri.prefix,
        Body=body,
        ChecksumAlgorithm="SHA256",
        ChecksumSHA256=_base64(sha256),
        **options.writing(),
    )
    entry = ManifestEntry(uri.prefix, len(body), sha256.hex(), len(body) or 1)
    _verify(client, uri, entry, options, answer.get("ChecksumSHA256", ""))


def _verify(client: S3Client, uri: S3Uri, entry: ManifestEntry, options: S3Options, kept: str) -> None:
    """Raises UploadError unless the server has, by the checksum in its answer or by a closer look, what was sent."""
    if not (_is_sha256(kept, entry) if kept else _object_is(client, uri, entry, options)):
        raise UploadError(f"{uri}: the object in S3 differs from the local file: upload it again")


def _object_is(client: S3Client, uri: S3Uri, entry: ManifestEntry, options: S3Options) -> bool:
    """Compares an object with its entry: by the checksum that the server keeps, or else by reading it."""
    # Another checksum may be that of the same bytes in other parts, as a copy of the object has it.
    if _is_sha256(_kept_sha256(client, uri, options), entry):
        return True
    digests = []
    for first in range(0, max(1, entry.size), entry.part_size):
        size = min(entry.part_size, entry.size - first)
        digests.append(_read(client, uri, options, entry.size, first, size))
    return _combine(digests).hex() == entry.sha256


def _kept_sha256(client: S3Client, uri: S3Uri, options: S3Options) -> str:
    head = client.head_object(Bucket=uri.bucket, Key=uri.prefix, ChecksumMode="ENABLED", **options.reading())
    return head.get("ChecksumSHA256", "")


def _is_sha256(kept: str, entry: ManifestEntry) -> bool:
    # "-N" after the checksum of an object in N parts is missing from some servers' answers.
    return kept.partition("-")[0] == _base64(bytes.fromhex(entry.sha256))


def _read(
    client: S3Client,
    uri: S3Uri,
    options: S3Options,
    whole: int,
    first: int,
    size: int,
    write: Callable[[int, bytes], object] = lambda offset, chunk: None,
) -> bytes:
    """Reads a part of an object; a body that breaks off is read anew.

    Args:
        whole: bytes that the object should have.
        first, size: the part.
        write: gets each chunk with its offset in the object.

    Returns:
        the SHA-256 of the part.
    """
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    span = {"Range": f"bytes={first}-{first + size - 1}"} if size < whole else {}
    for left in reversed(range(_READS)):
        answer = client.get_object(Bucket=uri.bucket, Key=uri.prefix, **span, **options.reading())  # type: ignore[arg-type]
        total = answer.get("ContentRange", f"/{answer['ContentLength']}").rpartition("/")[2]
        if total != str(whole):
            raise DownloadError(f"{uri}: the object has {total} bytes instead of {whole}: it was replaced")
        digest, offset = hashlib.sha256(), first
        try:
            for chunk in answer["Body"].iter_chunks(_CHUNK):
                digest.update(chunk)
                write(offset, chunk)
                offset += len(chunk)
            return digest.digest()
        except (HTTPClientError, IncompleteReadError):
            if not left:
                raise
            time.sleep(0.1 * 2 ** (_READS - left))
    raise AssertionError("unreachable")


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
