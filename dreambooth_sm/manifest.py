"""``manifest.json``: what a directory in S3 consists of, written when all of it is there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class ManifestEntry:
    """One file.

    Attributes:
        path: POSIX path relative to the manifest.
        size: in bytes.
        crc64nvme: CRC-64/NVME of the whole file in base64, as S3 shows it; empty where it is not known (in manifests
            of version 0.1, which held checksums of another kind).
    """

    path: str
    size: int
    crc64nvme: str


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
        fields = vars(self) | {"files": [vars(entry) for entry in self.files]}
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
            files = (ManifestEntry(e["path"], e["size"], e.get("crc64nvme", "")) for e in fields["files"])
            return cls(**fields | {"files": tuple(files)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a manifest: {error}") from error


def _sha256_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
