"""A directory goes up to S3 verified, with a manifest written last, and comes down verified.

Nothing local is ever deleted here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_sm.errors import UserError
from dreambooth_sm.manifest import MANIFEST_NAME, Manifest, ManifestEntry, unfit_names
from dreambooth_sm.s3 import DownloadError, Found, NoSuchObject, Store, TransferError, UploadError, s3_client
from dreambooth_sm.s3_uri import DEFAULTS, S3Options, S3Uri
from dreambooth_sm.transfers import Download, Upload, do_all, files_below, in_parallel

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = [
    "MANIFEST_NAME",
    "PROBE_NAME",
    "DownloadError",
    "Manifest",
    "ManifestEntry",
    "S3Options",
    "S3Uri",
    "TransferError",
    "UploadError",
    "Verification",
    "check_takes_objects",
    "check_writable",
    "delete_directory",
    "download_directory",
    "download_object",
    "find_object",
    "find_objects",
    "get_object",
    "list_objects",
    "parse_manifest",
    "probing_client",
    "put_object",
    "read_manifest",
    "s3_client",
    "upload_directory",
    "verify",
]

# Larger files travel in parts of this size, several at a time: each that is sent is in memory, and a chunk of each that
# comes.
PART_SIZE = 16 * 2**20
_COMING = 4 * PART_SIZE
# Requests at a time, which hide the network's latency.
WORKERS = min(32, max(16, 4 * (os.cpu_count() or 1)))
# Of small files alone: their requests are the processor's work, and more threads of Python only wait for each other.
_SMALL_AT_ONCE = 8
# What checks write, and delete again.
PROBE_NAME = ".upload-check"

TransferProgress = Callable[[int, int], None]


def check_writable(target: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> None:
    """Does what an upload to `target` does, with a few bytes: whether it could is known in well under 20 s.

    It lists, writes an object at once and one in parts, verifies both and deletes them. Where deleting is forbidden,
    as in an archive, an upload works anyway: there the object, some bytes, stays, always the same one.

    Raises:
        UserError: it could not; the message names the URI and what to do.
    """
    store, probe = Store(client or probing_client(), options), target / PROBE_NAME
    upload = ""
    try:
        store.sizes(target)
        store.put(probe, b"An upload to this place was tried.")
        upload = store.begin(probe)
        store.complete(probe, upload, [store.send_part(probe, upload, 1, b"An upload in parts was tried.")])
    except TransferError as error:
        if upload:
            store.abort(probe, upload)
        raise UserError(str(error)) from error
    with suppress(UserError, TransferError):
        store.delete(probe)


def check_takes_objects(target: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> None:
    """Does what :func:`put_object` does below `target`, and no more: rights to list or to delete are not needed.

    Raises:
        UserError: it is refused; the message names the URI and what to do.
        UploadError: the server can't be reached or fails.
    """
    store, probe = Store(client or probing_client(), options), target / PROBE_NAME
    store.put(probe, b"An object at this place was tried.")
    with suppress(UserError, TransferError):
        store.delete(probe)


def probing_client() -> S3Client:
    """A client that gives up soon."""
    return s3_client(attempts=2, timeout=5)


def list_objects(source: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> dict[str, int]:
    """The objects below a prefix: relative key -> size in bytes.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        DownloadError: the server can't be reached or fails.
    """
    return Store(client or s3_client(), options).sizes(source)


def find_objects(source: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> dict[str, Found]:
    """As :func:`list_objects`, with the objects' entity tags."""
    return Store(client or s3_client(), options).listed(source)


def find_object(uri: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> Found:
    """What the server says of an object.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        NoSuchObject: there is none of this key.
        DownloadError: the server can't be reached or fails.
    """
    return Store(client or s3_client(), options).find(uri)


def get_object(uri: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> bytes | None:
    """The content of one object, checked by the server's checksum where it keeps one; None where there is none.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        DownloadError: the server can't be reached or fails.
    """
    content = bytearray()

    def write(offset: int, chunk: bytes) -> None:
        del content[offset:]  # of a try before
        content.extend(chunk)

    try:
        Store(client or s3_client(), options).read(uri, write)
    except NoSuchObject:
        return None
    return bytes(content)


def put_object(uri: S3Uri, body: bytes, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> None:
    """Writes one object, and makes sure that the server has what was sent.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        UploadError: the server can't be reached or fails.
    """
    Store(client or s3_client(), options).put(uri, body)


def create_object(uri: S3Uri, body: bytes, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> bool:
    """Writes one object unless another one is there; of several writers one does it.

    Returns:
        whether the object with this content is there.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        UploadError: the server can't be reached or fails.
    """
    return Store(client or s3_client(), options).create(uri, body)


def upload_directory(
    directory: Path,
    target: S3Uri,
    options: S3Options = DEFAULTS,
    *,
    names: Iterable[str] | None = None,
    job: str = "",
    step: int | None = None,
    progress: TransferProgress | None = None,
    workers: int = WORKERS,
    part_size: int = PART_SIZE,
    client: S3Client | None = None,
) -> Manifest:
    """Uploads files below `directory`, verifies every object, then writes `manifest.json`.

    A reader who finds the manifest finds everything that it lists: an earlier upload's manifest goes before any of
    its files is replaced. Files whose object is there already, with the same checksum, are not sent again. Links are
    followed. Other objects under the target stay.

    Args:
        directory: must hold at least one file, and none called `manifest.json` at its top.
        options: encryption, tags and the like of the objects.
        names: of the files, as relative POSIX paths; default: every file.
        job, step: for the manifest.
        progress: called with bytes done so far and bytes in all, always in the calling thread.
        workers: requests at a time.
        part_size: larger files go up in parts of this many bytes, at least 5 MiB; `workers` parts are in memory.
        client: default: `s3_client()`.

    Raises:
        UserError: the directory is empty or unfit; no such bucket, no permission, no credentials.
        UploadError: a transfer failed in spite of retries, or an object differs from its file.
    """
    files = files_below(directory) if names is None else {name: directory / name for name in sorted(names)}
    if not files:
        raise UserError(f"{directory}: there is no file to upload")
    if MANIFEST_NAME in files:
        raise UserError(f"{directory / MANIFEST_NAME}: the upload writes a file of this name: rename yours")
    if unfit := unfit_names(files):
        raise UserError(f"{directory}: {problem}: rename it" for problem in unfit)
    store = Store(client or s3_client(), options)
    try:
        there = store.sizes(target)
    except DownloadError as error:
        raise UploadError(str(error)) from error
    uploads = [Upload(store, path, name, target, part_size) for name, path in files.items()]
    total, done = sum(upload.size for upload in uploads), 0
    do_all((upload.look for upload in uploads if there.get(upload.name) == upload.size), workers)
    due = [upload for upload in uploads if not upload.is_there]
    if due and MANIFEST_NAME in there:
        store.delete(target / MANIFEST_NAME)
    done = total - sum(upload.size for upload in due)
    in_parts = [upload for upload in due if len(upload.spans) > 1]
    try:
        do_all((upload.begin for upload in in_parts), workers)
        at_once = workers if in_parts else min(workers, _SMALL_AT_ONCE)
        with in_parallel((send for upload in due for send in upload.sends()), at_once) as sizes:
            for size in sizes:
                done += size
                if progress:
                    progress(done, total)
        do_all((upload.finish for upload in in_parts), workers)
    except BaseException:
        for upload in in_parts:
            upload.abort()
        raise
    manifest = Manifest(tuple(u.entry for u in uploads), datetime.now(UTC).isoformat(timespec="seconds"), job, step)
    try:
        store.put(target / MANIFEST_NAME, manifest.to_json().encode())
    except BaseException:
        with suppress(UserError, TransferError):
            store.delete(target / MANIFEST_NAME)
        raise
    return manifest


def download_directory(
    source: S3Uri,
    directory: Path,
    options: S3Options = DEFAULTS,
    *,
    workers: int = WORKERS,
    part_size: int = _COMING,
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
        UserError: nothing lies there; keys that can't be files; too little space; no such bucket, no permission.
        DownloadError: a transfer failed in spite of retries, or a file differs from the manifest.
    """
    store = Store(client or s3_client(), options)
    manifest = _find_manifest(source, store)
    if manifest:
        entries = manifest.files
    else:
        listed = store.sizes(source)
        entries = tuple(ManifestEntry(name, size, "") for name, size in sorted(listed.items()))
    if not entries:
        raise UserError(f"{source}: there is nothing below this prefix: check the bucket and the prefix")
    if unfit := unfit_names(entry.path for entry in entries):
        raise UserError(f"{source}: {problem}: rename or remove it" for problem in unfit)
    inside, paths = directory.resolve(), [directory / entry.path for entry in entries]
    astray = {p for p in {path.parent for path in paths} if not p.resolve().is_relative_to(inside)}
    if links := [path for path in paths if path.parent in astray]:
        raise UserError(f"{path}: a link there leads out of {directory}: remove it" for path in links)
    _download([(source / e.path, e, path) for e, path in zip(entries, paths, strict=True)], store, workers, part_size)
    return paths


def download_object(
    uri: S3Uri,
    path: Path,
    options: S3Options = DEFAULTS,
    *,
    workers: int = WORKERS,
    part_size: int = _COMING,
    client: S3Client | None = None,
) -> None:
    """Downloads one object; it appears under its name only when it is whole, and as S3's own checksum says.

    Raises:
        UserError: there is no such object; too little space; no such bucket, no permission.
        DownloadError: the transfer failed in spite of retries.
    """
    store = Store(client or s3_client(), options)
    try:
        found = store.find(uri)
    except NoSuchObject as error:
        raise UserError(str(error)) from error
    _download([(uri, ManifestEntry(path.name, found.size, found.checksum), path)], store, workers, part_size)


def _download(wanted: list[tuple[S3Uri, ManifestEntry, Path]], store: Store, workers: int, part_size: int) -> None:
    for parent in {path.parent for _, _, path in wanted}:
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{parent}: the directory can't be made: {error.strerror}") from error
    size, free = sum(entry.size for _, entry, _ in wanted), shutil.disk_usage(wanted[0][2].parent).free
    if size > free:
        raise UserError(
            f"{wanted[0][0]}: {size / 1e9:.3g} GB are to come, and {wanted[0][2].parent} has {free / 1e9:.3g} GB of "
            "space left: make some, or choose another directory"
        )
    downloads = [Download(store, uri, entry, path, part_size) for uri, entry, path in wanted]
    try:
        do_all((download.begin for download in downloads if len(download.spans) > 1), workers)
        do_all((fetch for download in downloads for fetch in download.fetches()), workers)
    finally:
        for download in downloads:
            download.discard()


@dataclass(frozen=True)
class Verification:
    """A comparison of the objects below a prefix with the manifest there.

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
    store = Store(client or s3_client(), options)
    manifest = read_manifest(source, options, client=client)
    listed = store.sizes(source)
    names = {entry.path for entry in manifest.files}

    def compare(entry: ManifestEntry) -> tuple[str, bool]:
        same = listed[entry.path] == entry.size
        # Of a file without a checksum all that is known is its size.
        if same and entry.crc64nvme:
            same = store.is_same(source / entry.path, entry.size, entry.crc64nvme)
        return entry.path, same

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
    manifest = _find_manifest(source, Store(client or s3_client(), options))
    if manifest is None:
        raise UserError(f"{source}: there is no {MANIFEST_NAME}: no upload to this prefix was completed")
    return manifest


def _find_manifest(source: S3Uri, store: Store) -> Manifest | None:
    text = get_object(source / MANIFEST_NAME, store.options, client=store.client)
    return None if text is None else parse_manifest(source, text)


def parse_manifest(source: S3Uri, text: bytes) -> Manifest:
    """Reads what lies at a prefix as its manifest.

    Raises:
        UserError: it is something else.
    """
    try:
        return Manifest.from_json(text)
    except ValueError as error:
        raise UserError(f"{source / MANIFEST_NAME}: {error}: remove it or upload the directory again") from error


def delete_directory(target: S3Uri, options: S3Options = DEFAULTS, *, client: S3Client | None = None) -> None:
    """Deletes what lies below a prefix, the manifest first.

    Raises:
        UserError: no such bucket, no permission, no credentials.
        TransferError: the server can't be reached or fails.
    """
    store = Store(client or s3_client(), options)
    for name in sorted(store.sizes(target), key=lambda name: (name != MANIFEST_NAME, name)):
        store.delete(target / name)
