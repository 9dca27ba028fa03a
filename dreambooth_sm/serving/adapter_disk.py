"""Adapters on this machine's disk: what was fetched once is not fetched again after it has left the host's memory.

An adapter is a directory, which is renamed to its name when it is whole. Other processes may use the same disk: an
entry that one of them reads is locked, and removed by none.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dreambooth_sm.checksums import checksum_of, encoded
from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import safe
from dreambooth_sm.private_directory import make_private

# Checksums of an entry's other files, by their names.
_SUMS = "checksums.json"
# What is not whole yet, and the age in seconds from which on nobody writes it any more.
_UNFINISHED, _ABANDONED = ".partial-", 3600
# Is in memory, and can be written to where the file system is read-only.
_SHARED_MEMORY = "/dev/shm"


class AdapterDisk:
    """A directory of adapters' files, bounded by bytes; for several threads and processes.

    Where the directory can't be written to, one line of the log says so, and nothing is kept.

    Args:
        place: the directory; None: one of this user's, among temporary files.
        size: bytes that all of them may take; those that were read last stay.
    """

    def __init__(self, place: str | None, size: int) -> None:
        self._size = size
        self._directory: Path | None = None
        if size:
            try:
                self._directory = _made(place)
            except (UserError, OSError) as error:
                self._turn_off(error)

    @contextmanager
    def files(self, identity: str, fetch: Callable[[Path], None]) -> Iterator[Path]:
        """A directory with an adapter's files: those that are kept, or else what is fetched.

        Args:
            identity: of the content, as a file's name; empty: it is not kept.
            fetch: writes the files to a directory. They are kept unless the block raises.
        """
        entry = self._directory / identity if self._directory and identity else None
        if entry:
            with _held(entry) as is_there:
                if is_there and _is_sound(entry):
                    _touch(entry)
                    yield entry
                    return
            with self._or_off():
                _remove(entry)  # damaged, if it is there
        with self._fetched(fetch) as folder:
            yield Path(folder)
            if entry and self._directory:
                with self._or_off():
                    _keep(Path(folder), entry, self._size)

    def _fetched(self, fetch: Callable[[Path], None]) -> tempfile.TemporaryDirectory[str]:
        if self._directory:
            with self._or_off():
                return _filled(str(self._directory), fetch)
        return _filled(_scratch(), fetch)

    @contextmanager
    def _or_off(self) -> Iterator[None]:
        """Keeps nothing more where the disk takes no more."""
        try:
            yield
        except OSError as error:
            self._turn_off(error)

    def _turn_off(self, error: Exception) -> None:
        self._directory = None
        print(f"adapters: none are kept on disk: {safe(str(error))}", flush=True)


def _made(place: str | None) -> Path:
    """The directory, which was written to; without what ended processes left half-written."""
    named = Path(place) if place else Path(tempfile.gettempdir()) / f"dreambooth-sm-adapters-{os.getuid()}"
    directory = make_private(named, "adapters", "SERVE_ADAPTER_DISK")
    Path(tempfile.mkdtemp(dir=directory, prefix=_UNFINISHED)).rmdir()
    for path in directory.glob(f"{_UNFINISHED}*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
    return directory


def _filled(place: str, fetch: Callable[[Path], None]) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(dir=place, prefix=_UNFINISHED, ignore_cleanup_errors=True)
    try:
        fetch(Path(folder.name))
    except BaseException:
        folder.cleanup()
        raise
    return folder


def _scratch() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return _SHARED_MEMORY


@contextmanager
def _held(entry: Path) -> Iterator[bool]:
    """Whether an entry is there; then nobody removes it meanwhile."""
    try:
        file = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield _is_at(file, entry)
    finally:
        os.close(file)


def _is_at(file: int, entry: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), entry.stat())
    except FileNotFoundError:
        return False


def _is_sound(entry: Path) -> bool:
    """Whether its files are what they were."""
    try:
        sums = json.loads((entry / _SUMS).read_bytes())
        return all(encoded(checksum_of((entry / name).read_bytes())) == sum_ for name, sum_ in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _keep(folder: Path, entry: Path, most: int) -> None:
    """Makes an entry of a directory, and removes those that were not read for longest, down to so many bytes."""
    if _bytes(folder) > most:
        return
    sums = {path.name: encoded(checksum_of(path.read_bytes())) for path in folder.iterdir()}
    (folder / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
    _touch(folder)
    try:
        folder.rename(entry)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was sooner
            return
        raise
    others = [path for path in entry.parent.iterdir() if not path.name.startswith(_UNFINISHED) and path != entry]
    sizes = {path: _bytes(path) for path in others}
    over = sum(sizes.values()) + _bytes(entry) - most
    for path in sorted(others, key=_last_read):
        if over <= 0:
            return
        if _remove(path):
            over -= sizes[path]


def _touch(folder: Path) -> None:
    now = time.time_ns()  # finer than the file system's own clock
    os.utime(folder, ns=(now, now))


def _bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:  # removed by another process
        return 0


def _last_read(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0


def _remove(entry: Path) -> bool:
    """Whether it could be removed: nobody reads it."""
    try:
        file = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, entry):  # otherwise another process was sooner
            gone = Path(tempfile.mkdtemp(dir=entry.parent, prefix=_UNFINISHED))
            entry.rename(gone / "gone")
            shutil.rmtree(gone, ignore_errors=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)
