"""Looks up what an option names in S3: an object, a folder, keys with one start, a manifest, or a list of these.

What is there decides, not how it is called; where nobody can look, the name has to do.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dreambooth_sm.data.folder import Names
from dreambooth_sm.data.pictures import SUFFIXES, is_picture
from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import MANIFEST_NAME, S3Uri, TransferError, get_object, list_objects
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.channels import FOLDER, MANIFEST, PREFIX, SINGLE_FILES, Channel, read_manifest, write_manifest
from launcher.staging import Files

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MANIFEST_FILE = "objects.manifest"
_MANIFESTS = (".manifest", ".json", ".jsonl")
# More is not a manifest that a person or a labelling job made for pictures of a subject.
_MOST_MANIFEST_BYTES = 16 * 2**20
_WORKERS = 16
# So many folders of one parent are listed together.
_MANY_FOLDERS = 10
# Objects without the name of a picture that are looked at, and bytes of each: cameras put a preview before the size.
_LOOKED_AT, _HEADER = 8, 256 * 2**10


@dataclass(frozen=True)
class Listed:
    """Objects that no single location names: the manifest that does, which has to be put into S3."""

    files: Files
    uris: list[S3Uri]

    @property
    def objects(self) -> tuple[str, ...]:
        """Their keys."""
        return tuple(uri.prefix for uri in self.uris)


def s3_text(value: object) -> str | None:
    """The ``s3://`` location that a value is, as a text or as a path, which loses a slash; None for anything else."""
    text = str(value)
    if isinstance(value, Path) and text.startswith("s3:/"):
        return f"s3://{text.removeprefix('s3:').lstrip('/')}"
    return text if isinstance(value, str) and text.startswith("s3://") else None


class Lookup:
    """Looks at locations in S3.

    Args:
        client: makes the client that looks; None: nobody looks.
        strict: what can't be looked at is an error; otherwise its name has to do.
    """

    def __init__(self, client: Callable[[], S3Client] | None = None, *, strict: bool = True) -> None:
        self._client, self._strict = client, strict
        self._known: dict[S3Uri, tuple[str, ...]] = {}

    def look_ahead(self, texts: Iterable[str]) -> None:
        """Lists folders that lie side by side together: many of them with a request, and not each with one. What is
        not found like this is looked at when it is asked for."""
        beside: dict[S3Uri, set[str]] = defaultdict(set)
        for text in texts:
            uri = S3Uri.parse(text)
            above, _, name = uri.prefix.rpartition("/")
            beside[S3Uri(uri.bucket, above)].add(name)
        for parent, names in beside.items():
            if self._client is not None and len(names) >= _MANY_FOLDERS:
                self._known |= _side_by_side(parent, names, self._client())

    def find(self, texts: Sequence[str]) -> Channel | Listed:
        """Finds what lies at one location, or at several together.

        Raises:
            UserError: there is nothing, or it can't be looked at.
        """
        places = [(text, S3Uri.parse(text)) for text in texts]
        if len(places) > 1:
            if len({uri.bucket for _, uri in places}) > 1:
                raise UserError("a list of objects is of one bucket; name a folder, or copy them into one")
            return self._listed([uri for place in places for uri in self._objects(self._at(*place))])
        found = self._at(*places[0])
        return found if isinstance(found, Channel) else self._listed(found)

    def have_headers(self, found: Channel | Listed) -> bool:
        """Whether one of the first objects holds a picture, though its name does not say so."""
        if self._client is None:
            return False
        s3 = self._client()
        with tempfile.TemporaryDirectory(prefix="dreambooth-sm-") as scratch:
            path = Path(scratch, "header")
            for uri in (found.uris or ())[:_LOOKED_AT]:
                with asking(str(uri)):
                    answer = s3.get_object(Bucket=uri.bucket, Key=uri.prefix, Range=f"bytes=0-{_HEADER}")
                    path.write_bytes(answer["Body"].read())
                if is_picture(path):
                    return True
        return False

    def _at(self, text: str, uri: S3Uri) -> Channel | list[S3Uri]:
        """A location as a channel; objects of an augmented manifest, which SageMaker only pipes."""
        if self._client is None:
            return _by_name(text, uri)
        if known := self._known.get(uri):
            return Channel(uri, FOLDER, known)
        try:
            return _look(text, uri, self._client())
        except (TransferError, UserError, ServiceError) as error:
            if self._strict or isinstance(error, _UnusableError):
                raise UserError(str(error)) from None
        return _by_name(text, uri)

    def _objects(self, found: Channel | list[S3Uri]) -> list[S3Uri]:
        if not isinstance(found, Channel):
            return found
        if found.uris is None:
            if found.kind == PREFIX:
                return [found.uri]
            raise UserError(f"{found.uri} can't be looked at, and a list needs the names of its objects; name them")
        return found.uris

    def _listed(self, objects: list[S3Uri]) -> Listed:
        objects = list(dict.fromkeys(objects))
        if len({uri.bucket for uri in objects}) > 1:
            raise UserError("a manifest names objects of one bucket; copy them into one")
        return Listed({MANIFEST_FILE: write_manifest(objects)}, objects)


class _UnusableError(UserError):
    """A location that was looked at, and can't be used."""


def pictures_in(objects: Sequence[str]) -> int:
    """Counts the names that are those of pictures, and not of their masks."""
    folders: dict[PurePosixPath, list[str]] = defaultdict(list)
    for path in map(PurePosixPath, objects):
        folders[path.parent].append(path.name)
    return sum(
        PurePosixPath(name).suffix.lower() in SUFFIXES and not Names(names).belongs_to_another(name)
        for names in folders.values()
        for name in names
    )


def _by_name(text: str, uri: S3Uri) -> Channel:
    suffix = PurePosixPath(uri.prefix).suffix.lower()
    if not text.endswith("/") and suffix in (*SUFFIXES, *SINGLE_FILES, ".gz", ".tgz", ".tar"):
        return Channel(uri, PREFIX)
    return Channel(uri, MANIFEST if suffix in _MANIFESTS and not text.endswith("/") else FOLDER)


def _look(text: str, uri: S3Uri, s3: S3Client) -> Channel | list[S3Uri]:
    below = list_objects(uri, client=s3)
    if below:
        # A list of what the launcher or an upload sent is not part of it.
        return Channel(uri, FOLDER, tuple(name for name in below if name != MANIFEST_NAME))
    with asking(str(uri)):
        keys = {} if text.endswith("/") or not uri.prefix else _starting_with(uri, s3)
    if not keys:
        raise UserError(f"there is nothing below {uri}")
    if uri.prefix not in keys:
        return Channel(uri, PREFIX, tuple(keys))
    if keys[uri.prefix] <= _MOST_MANIFEST_BYTES and _starts_as_json(uri, s3):
        return _read(uri, s3)
    return Channel(uri, PREFIX, tuple(keys))


def _side_by_side(parent: S3Uri, names: Collection[str], s3: S3Client) -> dict[S3Uri, tuple[str, ...]]:
    """What lies in folders of one parent; nothing where it takes more requests than half of them, or is not allowed."""
    start = f"{parent.prefix}/" if parent.prefix else ""
    found: dict[S3Uri, list[str]] = defaultdict(list)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=parent.bucket, Prefix=start)
    try:
        with asking(str(parent)):
            for number, page in enumerate(pages):
                if number >= len(names) // 2:
                    return {}
                for item in page.get("Contents", []):
                    name, _, below = item["Key"].removeprefix(start).partition("/")
                    if name in names and below and not below.endswith("/") and below != MANIFEST_NAME:
                        found[parent / name].append(below)
    except ServiceError:
        return {}
    return {uri: tuple(below) for uri, below in found.items()}


def _starting_with(uri: S3Uri, s3: S3Client) -> dict[str, int]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=uri.bucket, Prefix=uri.prefix)
    return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}


def _starts_as_json(uri: S3Uri, s3: S3Client) -> bool:
    with asking(str(uri)):
        start = s3.get_object(Bucket=uri.bucket, Key=uri.prefix, Range="bytes=0-63")["Body"].read()
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")


def _read(uri: S3Uri, s3: S3Client) -> Channel | list[S3Uri]:
    """A manifest's objects, each of which has to be there."""
    body = get_object(uri, client=s3) or b""
    try:
        if body.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            objects = _augmented(body, str(uri))
            found: Channel | list[S3Uri] = objects
        else:
            objects = [each for each, _ in read_manifest(body, str(uri))]
            found = Channel(uri, MANIFEST, tuple(each.prefix for each in objects))
    except UserError as error:
        raise _UnusableError(error.problems) from None
    with ThreadPoolExecutor(_WORKERS) as pool:
        missing = [each for each in pool.map(lambda each: _missing(each, s3), objects) if each]
    if missing:
        raise _UnusableError(f"{uri}: there is no {each}" for each in missing[:10])
    return found


def _augmented(body: bytes, name: str) -> list[S3Uri]:
    """The objects of an augmented manifest, as a labelling job leaves it: JSON lines with a ``source-ref`` each."""
    objects = []
    for number, line in enumerate(body.decode("utf-8-sig", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            objects.append(S3Uri.parse(row["source-ref"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            expected = '{"source-ref": "s3://bucket/1.jpg"}'
            raise UserError(f"{name}, line {number}, is not a line of a manifest, such as {expected}") from None
    return objects


def _missing(uri: S3Uri, s3: S3Client) -> S3Uri | None:
    try:
        with asking(str(uri)):
            s3.head_object(Bucket=uri.bucket, Key=uri.prefix)
    except ServiceError as error:
        if error.kind is not Kind.MISSING:
            raise
        return uri
    return None
