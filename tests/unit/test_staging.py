"""Files on their way to S3: links where the system lets the user make them, copies elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launcher.local.tree import lay_out
from launcher.staging import digest, lay_out_files


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


@pytest.mark.parametrize("refused", [(), ("symlink",), ("symlink", "link")])
def test_files_come_along_with_whatever_links_there_are(
    refused: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "duck.jpg").write_bytes(b"duck")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "duck.jpg")
    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    files = {"a/duck.jpg": tmp_path / "duck.jpg", "link.jpg": tmp_path / "link.jpg", "note.txt": b"note"}
    lay_out_files(files, tmp_path / "out")
    out = tmp_path / "out"
    read = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert read == {"a/duck.jpg": b"duck", "link.jpg": b"duck", "note.txt": b"note"}
    assert digest({name: out / name for name in files}) == digest(files)
    lay_out(tmp_path / "opt-ml", {}, {"images": str(out)})
    (tmp_path / "duck.jpg").unlink()
    channel = tmp_path / "opt-ml" / "input" / "data" / "images"
    assert (channel / "a" / "duck.jpg").read_bytes() == b"duck"
    assert not (channel / "link.jpg").is_symlink()
