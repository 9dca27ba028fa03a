"""``manifest.json``: what a directory in S3 consists of, written when all of it is there."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MANIFEST_NAME = "manifest.json"

# What S3 and Linux's file systems can name, in bytes, and the largest object that S3 takes.
_LONGEST_KEY = 1024
_LONGEST_NAME = 255
_LARGEST_OBJECT = 50 * 2**40


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
    """The files of a complete upload.

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
            found = cls(**fields | {"files": tuple(map(_read_entry, fields["files"]))})
            _expect(isinstance(found.created, str), "created", found.created)
            _expect(isinstance(found.job, str), "job", found.job)
            _expect(found.step is None or _is_count(found.step), "step", found.step)
            paths = [entry.path for entry in found.files]
            _expect(len(set(paths)) == len(paths), "files", "two files of one name")
            if unfit := unfit_names(paths):
                raise ValueError(unfit[0])
        except RecursionError:
            raise ValueError("not a manifest: it is nested too deeply") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a manifest: {error}") from error
        return found


def _read_entry(fields: dict[str, Any]) -> ManifestEntry:
    path, size, checksum = fields["path"], fields["size"], fields.get("crc64nvme", "")
    _expect(isinstance(path, str), "path", path)
    _expect(_is_count(size) and size <= _LARGEST_OBJECT, "size", size)
    _expect(isinstance(checksum, str) and re.fullmatch(r"([A-Za-z0-9+/]{11}=)?", checksum), "crc64nvme", checksum)
    return ManifestEntry(path, size, checksum)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _expect(right: object, name: str, value: object) -> None:
    if not right:
        raise ValueError(f"{name} can't be {str(value)[:80]!r}")


def unfit_names(names: Iterable[str]) -> list[str]:
    """Finds the relative paths that can't be keys in S3 and files below a directory, each with the reason."""
    whole = set(names)
    reasons = {name: _unfitness(name, whole) for name in sorted(whole)}
    return [f"{name!r:.300} {reason}" for name, reason in reasons.items() if reason]


def _unfitness(name: str, whole: set[str]) -> str | None:
    segments = name.split("/")
    above = next((up for n in range(1, len(segments)) if (up := "/".join(segments[:n])) in whole), None)
    try:
        sizes = [len(segment.encode()) for segment in segments]
    except UnicodeEncodeError:
        return "is not a text in UTF-8"
    if not {"", ".", ".."}.isdisjoint(segments) or (os.sep != "/" and os.sep in name):
        return "leads out of the directory, or has an empty or '.' segment"
    if "\0" in name:
        return "holds a NUL character"
    if max(sizes) > _LONGEST_NAME or sum(sizes) + len(sizes) > _LONGEST_KEY:
        return f"is longer than {_LONGEST_NAME} bytes between two slashes, or than {_LONGEST_KEY} in all"
    return above and f"lies below {above!r:.300}, which is a file itself"


def _sha256_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
