"""Files on their way to and from S3: in parts, where they are large, and several requests at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from dreambooth_sm.checksums import combined, encoded, extended
from dreambooth_sm.errors import UserError
from dreambooth_sm.manifest import MANIFEST_NAME, ManifestEntry
from dreambooth_sm.s3 import DownloadError, Part, Store, UploadError, explained
from dreambooth_sm.s3_uri import S3Uri

# What is on its way here is called so until it was compared with its checksum.
UNCHECKED = ".unchecked"
_MOST_PARTS = 10_000
_CHUNK = 2**20

T = TypeVar("T")


class Upload:
    """One file on its way: begun, where it goes in parts, sent, and finished or else aborted."""

    def __init__(self, store: Store, path: Path, name: str, target: S3Uri, part_size: int) -> None:
        self.store, self.path, self.name, self.uri = store, path, name, target / name
        with explained(self.uri, UploadError):
            self.size = path.stat().st_size
        self.spans = spans(self.size, max(part_size, -(-self.size // _MOST_PARTS)))
        self.parts: dict[int, Part] = {}
        self.checksum = ""
        self.upload_id = ""
        self.is_there = False

    @property
    def entry(self) -> ManifestEntry:
        """Of a file that was sent, or found there."""
        return ManifestEntry(self.name, self.size, self.checksum)

    def look(self) -> None:
        """Finds out whether the object holds this file already, as far as the server says."""
        if not (kept := self.store.find(self.uri).checksum):
            return
        checksum = 0
        with explained(self.uri, UploadError), self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                checksum = extended(checksum, chunk)
        self.checksum = encoded(checksum)
        self.is_there = kept == self.checksum

    def begin(self) -> None:
        self.upload_id = self.store.begin(self.uri)

    def sends(self) -> Iterator[Callable[[], int]]:
        """Requests that send the file and return their bytes: one for a small file, else one a part."""
        yield from (partial(self._send, number) for number in range(len(self.spans)))

    def _send(self, number: int) -> int:
        first, size = self.spans[number]
        # What is checksummed is what is sent, whatever becomes of the file.
        with explained(self.uri, UploadError), self.path.open("rb") as file:
            file.seek(first)
            body = file.read(size)
        if len(body) != size:
            raise UploadError(f"{self.path}: the file changed while it was uploaded: upload it again")
        if self.upload_id:
            self.parts[number] = self.store.send_part(self.uri, self.upload_id, number + 1, body)
        else:
            self.checksum = encoded(extended(0, body))
            self.store.put(self.uri, body)
        return size

    def finish(self) -> None:
        parts = [self.parts[number] for number in range(len(self.spans))]
        self.checksum = encoded(combined((part.checksum, part.size) for part in parts))
        self.store.complete(self.uri, self.upload_id, parts)

    def abort(self) -> None:
        if self.upload_id:
            self.store.abort(self.uri, self.upload_id)


class Download:
    """One file on its way: written under another name, and given its own when its last part is there."""

    def __init__(self, store: Store, uri: S3Uri, entry: ManifestEntry, path: Path, part_size: int) -> None:
        self.store, self.uri, self.entry, self.path = store, uri, entry, path
        self.unchecked = path.with_name(f".{uuid4().hex}{UNCHECKED}")
        self.spans = spans(entry.size, part_size)
        # What the parts have to be of, as the server tells it.
        self.etag, self.kept = "", ""
        self.checksums: dict[int, int] = {}
        self.lock = threading.Lock()

    def begin(self) -> None:
        found = self.store.find(self.uri)
        self.etag, self.kept = found.etag, found.checksum
        with explained(self.uri, DownloadError), self.unchecked.open("wb") as stream:
            stream.truncate(self.entry.size)

    def fetches(self) -> Iterator[Callable[[], None]]:
        yield from (partial(self._fetch, number) for number in range(len(self.spans)))

    def _fetch(self, number: int) -> None:
        span = self.spans[number] if len(self.spans) > 1 else None
        with explained(self.uri, DownloadError), self.unchecked.open("r+b" if span else "wb") as stream:

            def write(offset: int, chunk: bytes) -> None:
                if offset == self.spans[number][0]:  # the first one of each try
                    stream.seek(offset)
                stream.write(chunk)

            checksum = self.store.read(self.uri, write, size=self.entry.size, span=span, etag=self.etag)
        with self.lock:
            self.checksums[number] = checksum
            if len(self.checksums) == len(self.spans):
                self._finish()

    def _finish(self) -> None:
        """Checks the file and gives it its name."""
        whole = encoded(combined((self.checksums[number], size) for number, (_, size) in enumerate(self.spans)))
        if self.entry.crc64nvme not in ("", whole):
            raise DownloadError(f"{self.uri}: its checksum is not the one in its {MANIFEST_NAME}: upload it again")
        if self.kept not in ("", whole):
            raise DownloadError(f"{self.uri}: what came has not the checksum that S3 keeps: download it again")
        with explained(self.uri, DownloadError):
            self.unchecked.replace(self.path)

    def discard(self) -> None:
        """Removes what was not finished."""
        self.unchecked.unlink(missing_ok=True)


@contextmanager
def in_parallel(tasks: Iterable[Callable[[], T]], workers: int) -> Iterator[Iterator[T]]:
    """Runs tasks in threads; gives their results as they come. After a failure, or when the block is left, no more are
    begun; leaving it waits for those that run."""
    pool = ThreadPoolExecutor(workers, "transfer")

    failed = threading.Event()

    def run(task: Callable[[], T]) -> T:
        if failed.is_set():
            raise CancelledError
        try:
            return task()
        except BaseException:
            failed.set()
            raise

    try:
        futures = [pool.submit(run, task) for task in tasks]
        yield (f.result() for f in as_completed(futures) if not isinstance(f.exception(), CancelledError))
    finally:
        pool.shutdown(cancel_futures=True)


def do_all(tasks: Iterable[Callable[[], object]], workers: int) -> None:
    with in_parallel(tasks, workers) as results:
        for _ in results:
            pass


def spans(size: int, part_size: int) -> list[tuple[int, int]]:
    """First byte and size of each part of a file; an empty file has one."""
    return [(first, min(part_size, size - first)) for first in range(0, max(1, size), part_size)]


def files_below(directory: Path) -> dict[str, Path]:
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
