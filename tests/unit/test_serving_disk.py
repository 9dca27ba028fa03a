"""Adapters' files on the disk of an endpoint: kept whole, verified and bounded, whoever else uses the disk."""

from __future__ import annotations

import errno
import json
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dreambooth_sm.serving.adapter_disk import AdapterDisk


def content_of(identity: str) -> bytes:
    return random.Random(identity).randbytes(1000)


class Fetched:
    """Counts what was fetched."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()

    def of(self, identity: str) -> Callable[[Path], None]:
        def fetch(folder: Path) -> None:
            self.times[identity] += 1
            (folder / "weights").write_bytes(content_of(identity))

        return fetch

    def read(self, disk: AdapterDisk, identity: str) -> bytes:
        with disk.files(identity, self.of(identity)) as folder:
            return (folder / "weights").read_bytes()


def entries(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_what_was_fetched_is_not_fetched_again_unless_it_is_damaged(tmp_path: Path) -> None:
    fetched, place = Fetched(), tmp_path / "disk"
    for _ in range(2):  # the next process finds it as well
        disk = AdapterDisk(str(place), 10_000)
        assert fetched.read(disk, "duck") == fetched.read(disk, "duck") == content_of("duck")
    assert fetched.times == {"duck": 1}
    for damage in (b"other", content_of("hat")):
        (place / "duck" / "weights").write_bytes(damage)
        assert fetched.read(disk, "duck") == content_of("duck")
    (place / "duck" / "checksums.json").write_text("[]")
    assert fetched.read(disk, "duck") == content_of("duck")
    assert fetched.times == {"duck": 4}
    assert entries(place) == {"duck"}


def test_what_can_not_be_read_or_told_apart_is_not_kept(tmp_path: Path) -> None:
    fetched = Fetched()
    disk = AdapterDisk(str(tmp_path / "disk"), 10_000)
    with pytest.raises(ValueError, match="poisoned"), disk.files("bad", fetched.of("bad")):
        raise ValueError("poisoned")
    assert fetched.read(disk, "") == content_of("")
    assert entries(tmp_path / "disk") == set()
    none = AdapterDisk(str(tmp_path / "none"), 0)
    assert fetched.read(none, "duck") == fetched.read(none, "duck")
    assert fetched.times["duck"] == 2
    assert not (tmp_path / "none").exists()


def test_those_that_were_read_last_stay_and_those_that_are_read_now(tmp_path: Path) -> None:
    fetched, place = Fetched(), tmp_path / "disk"
    disk = AdapterDisk(str(place), 3500)  # three, with their checksums
    with disk.files("first", fetched.of("first")):
        pass
    for name in ("second", "third", "first", "fourth"):
        assert fetched.read(disk, name) == content_of(name)
    assert entries(place) == {"first", "third", "fourth"}
    with disk.files("third", fetched.of("third")) as folder:
        for name in ("fifth", "sixth", "seventh"):
            fetched.read(disk, name)
        assert (folder / "weights").read_bytes() == content_of("third")
    assert entries(place) == {"third", "sixth", "seventh"}
    assert fetched.times["third"] == 1
    small = AdapterDisk(str(place), 500)
    assert fetched.read(small, "eighth") == content_of("eighth")
    assert "eighth" not in entries(place)


def test_several_use_one_disk(tmp_path: Path) -> None:
    """Each has an object of its own, as processes have: all that they share is the file system."""
    place = tmp_path / "disk"

    def use(seed: int) -> int:
        fetched, disk, pick = Fetched(), AdapterDisk(str(place), 4500), random.Random(seed)
        for _ in range(100):
            name = f"adapter-{min(int(pick.expovariate(0.3)), 15)}"
            assert fetched.read(disk, name) == content_of(name)
        return fetched.times.total()

    with ThreadPoolExecutor(4) as threads:
        times = list(threads.map(use, range(4)))
    assert sum(times) < 400
    AdapterDisk(str(place), 4500)
    kept = entries(place)
    assert len(kept) <= 4 + 4  # each may have added one at the same moment
    for name in kept:
        assert json.loads((place / name / "checksums.json").read_text()).keys() == {"weights"}


def test_where_nothing_can_be_written_nothing_is_kept_and_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    fetched = Fetched()
    disk = AdapterDisk(str(tmp_path / "file" / "disk"), 10_000)
    assert fetched.read(disk, "duck") == fetched.read(disk, "duck") == content_of("duck")
    assert fetched.times["duck"] == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("adapters: none are kept on disk: ")

    place = tmp_path / "full"
    disk = AdapterDisk(str(place), 10_000)

    def fetch(folder: Path) -> None:
        if place in folder.parents:
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "weights").write_bytes(b"1")

    for _ in range(2):
        with disk.files("duck", fetch) as folder:
            assert (folder / "weights").read_bytes() == b"1"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("No space left on device")
    assert entries(place) == set()
