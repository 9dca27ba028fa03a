"""Objects in S3, through boto3's own requests: written and read verified; what goes wrong becomes one sentence.

Credentials, region, endpoint, proxies, certificates and the style of addresses come from the standard AWS settings
(`AWS_PROFILE`, `AWS_DEFAULT_REGION`, `AWS_ENDPOINT_URL`, ...).
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dreambooth_sm.checksums import checksum_of, combined, encoded, extended
from dreambooth_sm.errors import UserError
from dreambooth_sm.s3_uri import DEFAULTS, S3Options, S3Uri

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

# Is received, checksummed and written at a time.
_CHUNK = 2**20
_LONGEST_PAUSE = 20.0

T = TypeVar("T")
Write = Callable[[int, bytes], object]


class TransferError(Exception):
    """A transfer failed although the request was right: network, server, or a copy that differs."""


class UploadError(TransferError):
    """The objects in S3 are incomplete or differ from the local files."""


class DownloadError(TransferError):
    """The files read from S3 are incomplete or differ from their manifest."""


class NoSuchObject(DownloadError):  # noqa: N818 - what it means is said best like this
    """There is no object of this key."""


def s3_client(
    session: Session | None = None,
    *,
    endpoint_url: str | None = None,
    addressing_style: str | None = None,
    attempts: int = 8,
    timeout: float = 60,
) -> S3Client:
    """A client that retries.

    Args:
        session: where all settings come from; default: the standard AWS settings.
        endpoint_url: default: that of the settings.
        addressing_style: `path` or `virtual`, where the bucket's name is in an address. Default: that of the settings,
            or else botocore's: in the host of AWS, in the path of any other endpoint.
        attempts: tries a request, the first included, with growing pauses of 20 s at most.
        timeout: seconds without any answer after which a try has failed.

    Raises:
        UserError: the AWS settings name a profile or an endpoint that does not exist.
    """
    import boto3.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    style: Any = {"addressing_style": addressing_style} if addressing_style else None
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=min(timeout, 10),
        read_timeout=timeout,
        max_pool_connections=64,
        # Every request that needs a checksum brings its own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3=style,
    )
    try:
        session = session or boto3.session.Session()
        client = session.client("s3", endpoint_url=endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"the AWS settings do not work: {error}") from error
    # The checksum is signed; unless the settings ask for it, another one of the same bytes is not made to be signed.
    settings: Any = client.meta.config
    settings.s3 = {"payload_signing_enabled": False} | (settings.s3 or {})
    return client


@dataclass(frozen=True)
class Part:
    """A part of an object that was sent.

    Attributes:
        md5: where the server told that it has the part, by no checksum but by its MD5 sum.
    """

    etag: str
    checksum: int
    size: int
    md5: bytes | None


@dataclass(frozen=True)
class Found:
    """An object, as its server describes it.

    Attributes:
        checksum: its CRC-64/NVME in base64; empty where the server keeps none.
    """

    size: int
    etag: str
    checksum: str


# What servers answer to a condition: that it is not met, that another write is on its way, that they know none.
_CONDITION = re.compile(
    "PreconditionFailed|412|ConditionalRequestConflict|NotImplemented|501|InvalidArgument|InvalidRequest"
)
# Endpoints that refuse requests with CRC-64/NVME checksums: these get MD5 sums.
_without_checksums: set[str] = set()


class Store:
    """The objects that a client reaches, written and read with the same options; for several threads at a time.

    Every method raises UserError where the reader can put it right (no such bucket, no permission, no credentials).
    """

    def __init__(self, client: S3Client, options: S3Options = DEFAULTS) -> None:
        self.client: Any = client
        self.options = options
        config: Any = client.meta.config
        self._tries: int = (config.retries or {}).get("total_max_attempts", 5)

    def sizes(self, prefix: S3Uri) -> dict[str, int]:
        """The objects below a prefix: relative key -> size in bytes. Raises DownloadError."""
        return {key: found.size for key, found in self.listed(prefix).items()}

    def listed(self, prefix: S3Uri) -> dict[str, Found]:
        """The objects below a prefix, by relative key; lists tell no checksums. Raises DownloadError."""
        start = f"{prefix.prefix}/" if prefix.prefix else ""
        request = {"Bucket": prefix.bucket, "Prefix": start, **self.options.reading()}
        objects: dict[str, Found] = {}
        token: str | None = ""
        while token is not None:
            with explained(prefix, DownloadError):
                page = self.client.list_objects_v2(**request)
            for item in page.get("Contents", []):
                objects[item["Key"].removeprefix(start)] = Found(item["Size"], item.get("ETag", ""), "")
            request["ContinuationToken"] = token = page.get("NextContinuationToken")
        # Consoles make "folders": empty objects whose key ends with a slash.
        return {key: found for key, found in objects.items() if key and not key.endswith("/")}

    def put(self, uri: S3Uri, body: bytes) -> None:
        """Writes an object, and makes sure that it is what was sent. Raises UploadError."""
        with explained(uri, UploadError):
            sent, kept = self._send("put_object", uri, body, self.options.writing())
            if not sent.md5:
                self._verify(uri, len(body), sent.checksum, kept)

    def create(self, uri: S3Uri, body: bytes) -> bool:
        """Writes an object unless another one is there; whether this one is there now. Raises UploadError.

        A server that refuses conditional writes is asked before, which leaves a moment for others.
        """
        from botocore.exceptions import ClientError

        digest = b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        with explained(uri, UploadError):
            request = {"Bucket": uri.bucket, "Key": uri.prefix, "Body": body, "ContentMD5": digest}
            try:
                self.client.put_object(**request, IfNoneMatch="*", **self.options.writing())
                return True
            except ClientError as error:
                if not _CONDITION.search(str(error.response.get("Error", {}).get("Code", ""))):
                    raise
            try:
                answer = self.client.get_object(Bucket=uri.bucket, Key=uri.prefix, **self.options.reading())
                # It is this one where the answer to a first try was lost.
                return bool(answer["Body"].read() == body)
            except ClientError as error:
                if str(error.response.get("Error", {}).get("Code", "")) not in ("NoSuchKey", "404", "NotFound"):
                    raise
        self.put(uri, body)
        return True

    def begin(self, uri: S3Uri) -> str:
        """Starts an object that comes in parts; its id. Raises UploadError."""
        kind = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        with explained(uri, UploadError):
            answer = self._ask("create_multipart_upload", uri, kind, dict, **self.options.writing())
        if not answer.get("UploadId"):
            raise UploadError(f"{uri}: {_NOT_S3}")
        return answer["UploadId"]

    def send_part(self, uri: S3Uri, upload: str, number: int, body: bytes) -> Part:
        """Sends a part; they are counted from 1. Raises UploadError."""
        with explained(uri, UploadError):
            place = {"UploadId": upload, "PartNumber": number, **self.options.reading()}
            return self._send("upload_part", uri, body, place)[0]

    def complete(self, uri: S3Uri, upload: str, parts: list[Part]) -> None:
        """Makes an object of its parts, and makes sure that it is what was sent. Raises UploadError."""
        size, whole = sum(part.size for part in parts), combined((part.checksum, part.size) for part in parts)
        plain = [{"PartNumber": number, "ETag": part.etag} for number, part in enumerate(parts, start=1)]
        checked = [
            item | {"ChecksumCRC64NVME": encoded(part.checksum)} for item, part in zip(plain, parts, strict=True)
        ]
        with explained(uri, UploadError):
            answer = self._ask(
                "complete_multipart_upload",
                uri,
                {
                    "MultipartUpload": {"Parts": checked},
                    "ChecksumCRC64NVME": encoded(whole),
                    "ChecksumType": "FULL_OBJECT",
                },
                lambda: {"MultipartUpload": {"Parts": plain}},
                UploadId=upload,
                **self.options.reading(),
            )
            kept = answer.get("ChecksumCRC64NVME", "")
            if kept or _bare(answer.get("ETag")) != _etag_of(parts):
                self._verify(uri, size, whole, kept)

    def abort(self, uri: S3Uri, upload: str) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        # Without the right to abort, the bucket's lifecycle rule tidies up; the error that led here matters more.
        with suppress(BotoCoreError, ClientError):
            self.client.abort_multipart_upload(**_place(uri), UploadId=upload, **self.options.reading())

    def find(self, uri: S3Uri) -> Found:
        """Asks the server about an object. Raises DownloadError."""
        with explained(uri, DownloadError):
            found = self._ask("head_object", uri, {"ChecksumMode": "ENABLED"}, dict, **self.options.reading())
        etag = found.get("ETag", "")  # some servers tell an empty one
        return Found(found["ContentLength"], etag if _bare(etag) else "", found.get("ChecksumCRC64NVME", ""))

    def is_same(self, uri: S3Uri, size: int, checksum: str) -> bool:
        """Compares an object with its checksum: by the one that the server keeps, or else by reading the object."""
        found = self.find(uri)
        return found.size == size and (found.checksum or encoded(self.read(uri, size=size))) == checksum

    def read(
        self,
        uri: S3Uri,
        write: Write = lambda offset, chunk: None,
        *,
        size: int | None = None,
        span: tuple[int, int] | None = None,
        etag: str = "",
    ) -> int:
        """Reads an object or a part of it; a body that breaks off, or arrives damaged, is read again.

        Args:
            write: gets each chunk with its offset in the object, in order; from the start in each try.
            size: bytes that the whole object should have.
            span: first byte and size of the part.
            etag: of the object that is meant, as the server told it.

        Returns:
            the CRC of what was read.

        Raises:
            DownloadError: the object was replaced; the server can't be reached or fails.
        """
        for number in range(1, self._tries + 1):
            with explained(uri, DownloadError):
                try:
                    return self._read_once(uri, write, size, span, etag)
                except _Damaged:  # botocore only sees to the start of an answer
                    if number == self._tries:
                        raise
            _pause(number)
        raise AssertionError

    def _read_once(self, uri: S3Uri, write: Write, size: int | None, span: tuple[int, int] | None, etag: str) -> int:
        request = self.options.reading() | ({"IfMatch": etag} if etag else {})
        if span:
            request["Range"] = f"bytes={span[0]}-{sum(span) - 1}"
        # Of a part, S3 tells no checksum.
        kind = {} if span else {"ChecksumMode": "ENABLED"}
        answer = self._ask("get_object", uri, kind, dict, **request)
        with closing(answer["Body"]) as body:
            total = answer.get("ContentRange", f"/{answer.get('ContentLength', size)}").rpartition("/")[2]
            if (size is not None and total != str(size)) or (etag and answer.get("ETag", etag) != etag):
                raise DownloadError(f"{uri}: {_REPLACED}")
            if span and "ContentRange" not in answer and span != (0, size):
                raise DownloadError(f"{uri}: the server sends whole objects only, where a part is asked for")
            first, checksum = span[0] if span else 0, 0
            offset = first
            while chunk := _receive(body):
                checksum = extended(checksum, chunk)
                write(offset, chunk)
                offset += len(chunk)
        expected = span[1] if span else size
        if expected not in (None, offset - first):
            raise _Damaged(f"{offset - first} bytes came instead of {expected}")
        if answer.get("ChecksumCRC64NVME", encoded(checksum)) != encoded(checksum):
            raise _Damaged("what arrived differs from the checksum that came with it")
        return checksum

    def delete(self, uri: S3Uri) -> None:
        """Raises TransferError."""
        with explained(uri, TransferError):
            self.client.delete_object(**_place(uri), **self.options.reading())

    def _ask(
        self,
        operation: str,
        uri: S3Uri,
        checksums: Mapping[str, Any],
        instead: Callable[[], Mapping[str, Any]],
        **arguments: Any,
    ) -> dict[str, Any]:
        """A request with what it has of checksums, or where the server refuses that, with something else instead."""
        from botocore.exceptions import ClientError

        act, endpoint = getattr(self.client, operation), self.client.meta.endpoint_url
        if not checksums:
            return act(**_place(uri), **arguments)
        if endpoint not in _without_checksums:
            try:
                return act(**_place(uri), **arguments, **checksums)
            except ClientError as error:
                if not _may_mean_the_checksums(error):
                    raise
        answer = act(**_place(uri), **arguments, **instead())
        _without_checksums.add(endpoint)
        return answer

    def _send(self, operation: str, uri: S3Uri, body: bytes, arguments: Mapping[str, Any]) -> tuple[Part, str]:
        """Returns what was sent, and the checksum that the server tells of it."""
        from botocore.exceptions import ClientError

        checksum = checksum_of(body)
        kind = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumCRC64NVME": encoded(checksum)}
        for number in range(1, self._tries + 1):
            try:
                answer = self._ask(
                    operation, uri, kind, lambda: {"ContentMD5": b64encode(_md5(body)).decode()}, Body=body, **arguments
                )
                break
            except ClientError as error:  # damaged on its way: botocore takes that for an answer
                if number == self._tries or error.response["Error"]["Code"] not in _DAMAGED:
                    raise
            _pause(number)
        kept, etag = answer.get("ChecksumCRC64NVME", ""), answer.get("ETag", "")
        if not etag:
            raise UploadError(f"{uri}: {_NOT_S3}")
        has_md5 = not kept and re.fullmatch(r"[0-9a-f]{32}", _bare(etag)) and _bare(etag) == _md5(body).hex()
        return Part(etag, checksum, len(body), bytes.fromhex(_bare(etag)) if has_md5 else None), kept

    def _verify(self, uri: S3Uri, size: int, checksum: int, kept: str) -> None:
        """Raises UploadError unless the server has what was sent: by its answer, or by a closer look."""
        if not (kept == encoded(checksum) if kept else self.is_same(uri, size, encoded(checksum))):
            raise UploadError(f"{uri}: the object in S3 differs from the local file: upload it again")


class _Damaged(Exception):  # noqa: N818 - is tried again, and told as a transfer's error
    """The bytes that arrived are not those that were sent."""


def _receive(body: Any) -> bytes:
    """The next bytes of an answer's body; none at its end."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    try:
        return body.read(_CHUNK)
    except (BotoCoreError, HTTPError) as error:
        raise _Damaged(str(error)) from error


def _place(uri: S3Uri) -> dict[str, str]:
    return {"Bucket": uri.bucket, "Key": uri.prefix}


def _pause(number: int) -> None:
    time.sleep(min(_LONGEST_PAUSE, 2 ** (number - 1) * random.random()))


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


def _bare(etag: str | None) -> str:
    return (etag or "").strip('"')


def _etag_of(parts: list[Part]) -> str | None:
    """The entity tag of an object made of these parts, where the server told the MD5 sum of each."""
    md5s = b"".join(part.md5 for part in parts if part.md5)
    return f"{_md5(md5s).hex()}-{len(parts)}" if len(md5s) == 16 * len(parts) else None


# A body that was damaged on its way to the server.
_DAMAGED = {"BadDigest", "XAmzContentChecksumMismatch"}
# What tells of a request that was understood.
_UNDERSTOOD = {"InvalidPart", "InvalidPartOrder"}
_NOT_S3 = "what answers is not an S3 server: check the network and AWS_ENDPOINT_URL"
_REPLACED = "the object was replaced by another while it was read: download it again"
_CREDENTIALS = "the AWS credentials are wrong or have expired: renew them"
_DENIED = (
    "access denied: allow s3:PutObject, s3:GetObject, s3:DeleteObject, s3:ListBucket and s3:AbortMultipartUpload there "
    "(and the bucket's KMS key, if it has one) to the role or user in use, and send what the bucket's policy demands "
    "(s3_encryption, s3_kms_key_id, s3_acl)"
)
_ELSEWHERE = "the bucket is in another region: set AWS_DEFAULT_REGION to it"
_IN_THE_HOST = (
    "the server wants the bucket's name in the host's: set s3_addressing_style=virtual, or for a profile "
    "`aws configure set s3.addressing_style virtual`"
)
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
    "SecondLevelDomainForbidden": _IN_THE_HOST,
    "PathStyleDomainForbidden": _IN_THE_HOST,
}


def _may_mean_the_checksums(error: Any) -> bool:
    """Whether a server may have refused what it does not know; each says it in other words."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = error.response["Error"]["Code"]
    return status in (400, 405, 411, 501) and code not in _DAMAGED | _UNDERSTOOD | _ADVICE.keys()


@contextmanager
def explained(uri: S3Uri, fault: type[Exception]) -> Iterator[None]:
    """Turns errors of boto3 and of the system into one sentence: UserError where the reader can put it right,
    else ``fault``."""
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
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if advice := _ADVICE.get(code):
            raise UserError(f"{uri}: {advice}") from error
        if code in ("404", "NoSuchKey"):
            raise NoSuchObject(f"{uri}: there is no such object: check the bucket and the key") from error
        if code in ("412", "PreconditionFailed"):
            raise fault(f"{uri}: {_REPLACED}") from error
        raise fault(f"{uri}: {error}") from error
    except (CredentialRetrievalError, NoCredentialsError, PartialCredentialsError, SSOError) as error:
        raise UserError(
            f"{uri}: no AWS credentials: {error}: configure a profile, a role or AWS_ACCESS_KEY_ID"
        ) from error
    # ValueError: no number where a number should be.
    except (_Damaged, Boto3Error, BotoCoreError, HTTPError, ResponseParserError, ValueError) as error:
        raise fault(f"{uri}: {error}: check the network, the region and AWS_ENDPOINT_URL") from error
    except OSError as error:  # a local file; some of botocore's errors are OSErrors as well
        raise fault(f"{uri}: {error}") from error
