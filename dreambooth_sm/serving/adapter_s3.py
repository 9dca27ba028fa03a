"""An adapter that lies in S3: what is needed of it, and how it comes here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dreambooth_sm import storage
from dreambooth_sm.checksums import checksum_of, encoded
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.manifest import MANIFEST_NAME, Manifest
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.s3 import Found, NoSuchObject
from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.report import REPORT

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_SAFETENSORS = ".safetensors"
# Bytes of a file: an adapter has some MB, and a learned word some KB.
_LARGEST, _WORD = 2**30, 2**20
# Of an adapter's files, at a time: the network's latency is what each takes.
_REQUESTS = 8


@dataclass(frozen=True)
class AdapterInS3:
    """What S3 says of an adapter's files.

    Attributes:
        objects: by key below ``prefix``; nothing else that a job left beside them.
    """

    name: str
    prefix: S3Uri
    objects: Mapping[str, Found]

    @classmethod
    def find(cls, name: str, source: S3Uri, client: S3Client) -> Self:
        """Looks at what lies there.

        Args:
            source: a prefix, or a file's object.

        Raises:
            Refusal: where it is not there, or can't be an adapter.
            UserError, TransferError: it can't be looked at.
        """
        unknown = Refusal(f"adapters: {short(name)} is not known here", 404)
        if source.prefix.endswith(_SAFETENSORS):
            above, _, key = source.prefix.rpartition("/")
            try:
                objects = {key: storage.find_object(source, client=client)}
            except NoSuchObject:
                raise unknown from None
            source = S3Uri(source.bucket, above)
        else:
            objects = _needed(storage.find_objects(source, client=client))
        if not objects:
            raise unknown
        if large := [key for key, each in objects.items() if each.size > _LARGEST]:
            size = objects[large[0]].size
            raise Refusal(f"adapters: {name}: {large[0]} has {size:,} bytes, as no adapter has", 422)
        return cls(name, source, objects)

    @property
    def identity(self) -> str:
        """A name that place and content determine; empty where the server does not tell content apart."""
        if not all(each.etag for each in self.objects.values()):
            return ""
        said = sorted((key, each.size, each.etag) for key, each in self.objects.items())
        return hashlib.sha256(json.dumps([str(self.prefix), said]).encode()).hexdigest()

    def download(self, folder: Path, client: S3Client) -> None:
        """Brings its files here.

        Raises:
            Refusal: where they are not what their manifest says.
            UserError, TransferError: they can't be had.
        """
        contents = _contents(self.prefix, self.objects, client)
        if gone := {key for key in self.objects if key.endswith(_SAFETENSORS)} - contents.keys():
            raise Refusal(f"adapters: {self.name}: {min(gone)} was removed meanwhile; ask again", 404)
        if (written := contents.pop(MANIFEST_NAME, None)) is not None:
            _check(storage.parse_manifest(self.prefix, written), contents, self.name)
        for key, content in contents.items():
            (folder / key).write_bytes(content)


def _needed(found: Mapping[str, Found]) -> dict[str, Found]:
    """Of what a job left, the adapter, its words, its report and the manifest."""
    files = {key for key in found if key.endswith(_SAFETENSORS) and "/" not in key}
    if FILE in files:  # the others are learned words, or the same adapter once more
        files = {key for key in files if key == FILE or found[key].size <= _WORD}
    beside = {REPORT, MANIFEST_NAME} if files else set()
    return {key: each for key, each in found.items() if key in files | beside}


def _contents(source: S3Uri, keys: Iterable[str], client: S3Client) -> dict[str, bytes]:
    """Of the objects that are there, by key."""
    ordered = sorted(keys)
    with ThreadPoolExecutor(_REQUESTS) as threads:
        found = threads.map(lambda key: storage.get_object(source / key, client=client), ordered)
        return {key: content for key, content in zip(ordered, found, strict=True) if content is not None}


def _check(manifest: Manifest, contents: dict[str, bytes], name: str) -> None:
    """Raises Refusal where a file is not the one that its manifest lists."""
    for entry in manifest.files:
        content = contents.get(entry.path)
        if content is not None and entry.crc64nvme and encoded(checksum_of(content)) != entry.crc64nvme:
            raise Refusal(f"adapters: {name}: {entry.path} is not what its manifest says; send it again", 422)
