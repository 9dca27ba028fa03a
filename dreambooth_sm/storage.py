"""S3: a directory goes up verified, with a manifest written last, and comes down verified.

Credentials, region and endpoint come from the standard AWS settings (`AWS_PROFILE`, `AWS_DEFAULT_REGION`,
`AWS_ENDPOINT_URL`, ...). Nothing local is ever deleted here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast
from uuid import uuid4

from dreambooth_sm.errors import UserError

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

MANIFEST_NAME = "manifest.json"
PART_SIZE = 32 * 2**20
WORKERS = 8

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
        bucket: name of the bucket, nothing else.
        prefix: key or prefix without leading and trailing slash; empty for the whole bucket.
    """

    bucket: str
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> S3Uri:
        """Reads `s3://bucket/prefix`; a trailing slash makes no difference.

        Raises:
            UserError: the text is not such a URI; the message says which part of it is wrong.
        """
        scheme, separator, rest = text.partition("://")
        if scheme != "s3" or not separator:
            raise UserError(f"{text!r} is not an S3 URI: write s3://bucket/prefix")
        bucket, _, prefix = rest.partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
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
    """One file: POSIX path relative to the manifest, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a complete upload consists of.

    Attributes:
        files: one entry a file, sorted by path; the manifest itself is not among them.
        created: UTC time of the upload in ISO 8601.
        job: name of the job that made the files; empty if none did.
    """

    files: tuple[ManifestEntry, ...]
    created: str
    job: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: the text is something else.
        """
        try:
            fields = json.loads(text)
            return cls(**fields | {"files": tuple(ManifestEntry(**entry) for entry in fields["files"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a manifest: {error}") from error


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
        s3={"addressing_style": "path" if own_endpoint else "auto"},
    )
    try:
        session = session or boto3.session.Session()
        return session.client("s3", endpoint_url=endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"the AWS settings do not work: {error}") from error


def check_writable(target: S3Uri, *, client: S3Client | None = None) -> None:
    """Tries whether an upload to `target` could start, in well under 20 s, and leaves no object behind.

    Raises:
        UserError: it could not; the message names the URI and what to do.
    """
    client = client or s3_client(attempts=2, timeout=5)
    probe = target / MANIFEST_NAME
    with _explained(target, UserError):
        answer = client.create_multipart_upload(Bucket=probe.bucket, Key=probe.prefix)
    if not answer.get("UploadId"):
        raise UserError(f"{target}: what answers is no S3 server: check the network and AWS_ENDPOINT_URL")
    _abort(client, probe, answer["UploadId"])


def list_objects(source: S3Uri, *, client: S3Client | None = None) -> dict[str, int]:
    """The objects below a prefix: relative key -> size in bytes.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        DownloadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    start = f"{source.prefix}/" if source.prefix else ""
    with _explained(source, DownloadError):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=source.bucket, Prefix=start)
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
            return client.get_object(Bucket=uri.bucket, Key=uri.prefix)["Body"].read()
        except client.exceptions.NoSuchKey:
            return None


def put_object(uri: S3Uri, body: bytes, *, client: S3Client | None = None) -> None:
    """Writes one object; the server refuses content that differs from its SHA-256.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        UploadError: the server can't be reached or fails.
    """
    client = client or s3_client()
    with _explained(uri, UploadError):
        _put(client, uri, body)


def upload_directory(
    directory: Path,
    target: S3Uri,
    *,
    job: str = "",
    progress: Progress | None = None,
    workers: int = WORKERS,
    part_size: int = PART_SIZE,
    client: S3Client | None = None,
) -> Manifest:
    """Uploads every file below `directory` once, verifies every object, then writes `manifest.json`.

    A reader who finds the manifest finds everything that it lists. Links are followed. What lies under the
    target already stays there unless a file of the same name replaces it; that holds for an earlier upload's
    manifest too, so a reader during the second upload has to check what it reads, as `download_directory` does.

    Args:
        directory: must hold at least one file, and none called `manifest.json` at its top.
        job: name for the manifest.
        progress: called with bytes sent so far and bytes in all, always in the calling thread.
        workers: requests at a time.
        part_size: larger files go up in parts of this many bytes, at least 5 MiB and 1/10000 of the largest
            file; memory use is at most `workers + 1` parts.
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
    uploads = [_Upload(client, path, name, target, part_size) for name, path in files.items()]
    total, sent = sum(upload.size for upload in uploads), 0
    try:
        # Leaving the pool waits for the requests in flight, so that none of their parts outlives the abort.
        with ThreadPoolExecutor(workers) as pool:
            for size in _in_parallel(pool, (part for upload in uploads for part in upload.parts()), workers):
                sent += size
                if progress:
                    progress(sent, total)
            entries = tuple(_in_parallel(pool, (upload.finish for upload in uploads), workers))
    except BaseException:
        for upload in uploads:
            upload.abort()
        raise
    manifest = Manifest(entries, datetime.now(UTC).isoformat(timespec="seconds"), job)
    body = manifest.to_json().encode()
    with _explained(target / MANIFEST_NAME, UploadError):
        _put(client, target / MANIFEST_NAME, body)
        _verify(client, target / MANIFEST_NAME, len(body), hashlib.sha256(body).digest())
    return manifest


def download_directory(
    source: S3Uri, directory: Path, *, workers: int = WORKERS, client: S3Client | None = None
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
    from boto3.s3.transfer import S3Transfer

    client = client or s3_client()
    digests: dict[str, str | None] = dict.fromkeys(sorted(list_objects(source, client=client)))
    if MANIFEST_NAME in digests:
        digests = {entry.path: entry.sha256 for entry in _read_manifest(client, source / MANIFEST_NAME).files}
    if not digests:
        raise UserError(f"{source}: there is nothing below this prefix: check the bucket and the prefix")
    paths = {name: directory / name for name in digests}
    inside = directory.resolve()
    escaping = [name for name, path in paths.items() if not path.resolve().is_relative_to(inside)]
    if escaping:
        raise UserError(f"{source / name}: this key leads out of {directory}: remove it" for name in escaping)

    # boto3-stubs names another Config.
    transfers = S3Transfer(client, _transfer_config(workers))  # type: ignore[arg-type]
    with transfers, ThreadPoolExecutor(workers) as pool:

        def fetch(name: str) -> Path:
            uri, path = source / name, paths[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            unchecked = path.with_name(f".{uuid4().hex}.unchecked")
            try:
                with _explained(uri, DownloadError):
                    transfers.download_file(uri.bucket, uri.prefix, str(unchecked))
                with unchecked.open("rb") as stream:
                    if digests[name] not in (None, hashlib.file_digest(stream, "sha256").hexdigest()):
                        raise DownloadError(f"{uri}: its SHA-256 is not the one in {source / MANIFEST_NAME}")
                return unchecked.replace(path)
            finally:
                unchecked.unlink(missing_ok=True)

        return list(_in_parallel(pool, (partial(fetch, name) for name in digests), workers))


class _Upload:
    """One file on its way: read by `parts`, closed by `finish` once these were called, or else by `abort`."""

    def __init__(self, client: S3Client, path: Path, name: str, target: S3Uri, part_size: int) -> None:
        self.client, self.path, self.name, self.uri, self.part_size = client, path, name, target / name, part_size
        self.size = path.stat().st_size
        self.sha256 = hashlib.sha256()
        self.upload_id = ""
        self.sent: list[CompletedPartTypeDef] = []

    def parts(self) -> Iterator[Callable[[], int]]:
        """Requests that send the file and return their bytes: one for a small file, else one a part."""
        count = max(1, -(-self.size // self.part_size))
        if count > 1:
            with _explained(self.uri, UploadError):
                self.upload_id = self.client.create_multipart_upload(
                    Bucket=self.uri.bucket, Key=self.uri.prefix, ChecksumAlgorithm="SHA256"
                )["UploadId"]
        with self.path.open("rb") as stream:
            for number in range(1, count + 1):
                chunk = stream.read(self.part_size)
                self.sha256.update(chunk)
                yield partial(self._send, number, chunk)

    def _send(self, number: int, chunk: bytes) -> int:
        with _explained(self.uri, UploadError):
            if not self.upload_id:
                _put(self.client, self.uri, chunk)
            else:
                checksum = _base64(hashlib.sha256(chunk).digest())
                etag = self.client.upload_part(
                    Bucket=self.uri.bucket,
                    Key=self.uri.prefix,
                    UploadId=self.upload_id,
                    PartNumber=number,
                    Body=chunk,
                    ChecksumAlgorithm="SHA256",
                    ChecksumSHA256=checksum,
                )["ETag"]
                self.sent.append({"PartNumber": number, "ETag": etag, "ChecksumSHA256": checksum})
        return len(chunk)

    def finish(self) -> ManifestEntry:
        stored = self.sha256.digest()
        with _explained(self.uri, UploadError):
            if self.upload_id:
                self.sent.sort(key=lambda part: part["PartNumber"])
                self.client.complete_multipart_upload(
                    Bucket=self.uri.bucket,
                    Key=self.uri.prefix,
                    UploadId=self.upload_id,
                    MultipartUpload={"Parts": self.sent},
                )
                # S3 keeps the hash of the parts' hashes for an object that came in parts.
                stored = hashlib.sha256(b"".join(b64decode(part["ChecksumSHA256"]) for part in self.sent)).digest()
            _verify(self.client, self.uri, self.size, self.sha256.digest(), stored)
        return ManifestEntry(self.name, self.size, self.sha256.hexdigest())

    def abort(self) -> None:
        if self.upload_id:
            _abort(self.client, self.uri, self.upload_id)


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


def _put(client: S3Client, uri: S3Uri, body: bytes) -> None:
    client.put_object(
        Bucket=uri.bucket,
        Key=uri.prefix,
        Body=body,
        ChecksumAlgorithm="SHA256",
        ChecksumSHA256=_base64(hashlib.sha256(body).digest()),
    )


def _verify(client: S3Client, uri: S3Uri, size: int, sha256: bytes, stored: bytes | None = None) -> None:
    """Compares an object with what was sent: its size, and the checksum that the server keeps or its bytes."""
    head = client.head_object(Bucket=uri.bucket, Key=uri.prefix, ChecksumMode="ENABLED")
    # "-N" after the checksum of an object in N parts is missing from some servers' answers.
    kept = head.get("ChecksumSHA256", "").partition("-")[0]
    same = head["ContentLength"] == size and (
        kept == _base64(stored or sha256) if kept else _read_sha256(client, uri) == sha256
    )
    if not same:
        raise UploadError(f"{uri}: the object in S3 differs from the local file: upload it again")


def _read_sha256(client: S3Client, uri: S3Uri) -> bytes:
    digest = hashlib.sha256()
    sink = cast("BinaryIO", SimpleNamespace(write=digest.update))
    client.download_fileobj(uri.bucket, uri.prefix, sink, Config=_transfer_config(workers=1))
    return digest.digest()


def _read_manifest(client: S3Client, uri: S3Uri) -> Manifest:
    with _explained(uri, DownloadError):
        text = client.get_object(Bucket=uri.bucket, Key=uri.prefix)["Body"].read()
    try:
        return Manifest.from_json(text)
    except ValueError as error:
        raise UserError(f"{uri}: {error}: remove it or upload the directory again") from error


def _abort(client: S3Client, uri: S3Uri, upload_id: str) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    # Without the right to abort, the bucket's lifecycle rule tidies up; the error that led here matters more.
    with suppress(BotoCoreError, ClientError):
        client.abort_multipart_upload(Bucket=uri.bucket, Key=uri.prefix, UploadId=upload_id)


def _transfer_config(workers: int) -> TransferConfig:
    from boto3.s3.transfer import TransferConfig

    # The CRT client, which boto3 chooses by itself on some instance types, ignores AWS_ENDPOINT_URL.
    return TransferConfig(max_concurrency=workers, use_threads=workers > 1, preferred_transfer_client="classic")


_CREDENTIALS = "the AWS credentials are wrong or have expired: renew them"
_DENIED = (
    "access denied: allow s3:PutObject, s3:GetObject, s3:ListBucket and s3:AbortMultipartUpload there "
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

    try:
        yield
    except ClientError as error:
        advice = _ADVICE.get(error.response["Error"]["Code"])
        raise UserError(f"{uri}: {advice}") if advice else fault(f"{uri}: {error}") from error
    except (CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, SSOError) as error:
        raise UserError(
            f"{uri}: no AWS credentials: {error}: configure a profile, a role or AWS_ACCESS_KEY_ID"
        ) from error
    except (Boto3Error, BotoCoreError) as error:
        raise fault(f"{uri}: {error}: check the network, the region and AWS_ENDPOINT_URL") from error
