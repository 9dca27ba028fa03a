"""Places in S3, and how objects are written there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from dreambooth_sm.errors import UserError


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
            raise UserError(f"{text!r} is not an S3 URI, such as s3://bucket/prefix")
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
    """Options for writing and reading objects; what is left out is the bucket's own choice.

    Attributes:
        kms_key: id or ARN of the KMS key that encrypts the objects.
        acl: canned ACL, such as ``bucket-owner-full-control``.
        tags: tags of every object.
        storage_class: such as ``INTELLIGENT_TIERING``.
        requester_pays: whether we pay for requests to a bucket of that kind.
        encryption: ``AES256``, ``aws:kms`` or ``aws:kms:dsse``; with a key the default is ``aws:kms``.
    """

    kms_key: str | None = None
    acl: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    storage_class: str | None = None
    requester_pays: bool = False
    encryption: str | None = None

    def reading(self) -> dict[str, Any]:
        """Arguments of boto3's requests that read, list, delete, or send a part."""
        return {"RequestPayer": "requester"} if self.requester_pays else {}

    def writing(self) -> dict[str, Any]:
        """Arguments of boto3's requests that make an object."""
        made = {
            "ACL": self.acl,
            "StorageClass": self.storage_class,
            "Tagging": urlencode(self.tags),
            "ServerSideEncryption": self.encryption or (self.kms_key and "aws:kms"),
            "SSEKMSKeyId": self.kms_key,
        }
        return {name: value for name, value in made.items() if value} | self.reading()


DEFAULTS = S3Options()
