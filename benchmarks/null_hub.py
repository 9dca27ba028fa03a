"""A model hub that costs next to nothing, with one repository: what it is asked for the kernel sends from files.

    python -m benchmarks.null_hub --directory DIRECTORY [--delay-ms MILLISECONDS] [--mb-per-s RATE]

Waits that long before each answer, as a network would, and sends no faster than that in all. Prints its address. The
repository ``owner/model`` holds the files of DIRECTORY/model. Large files can be had as the hub's own client asks for
them, by chunks of Xet's storage, for which DIRECTORY/xet holds a second copy, made by :func:`lay_chunks`: uncompressed,
where the hub's are mostly LZ4; or by HTTP, as from a mirror. Linux only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.null_http import NullHandler, serve

REPOSITORY = "owner/model"
COMMIT = "c" * 40
# Files that are larger are chunked.
_LARGE = 2**20
# Bytes of a chunk without its header, and chunks of a xorb, which is what chunks are stored in.
_CHUNK, _CHUNKS, _HEADER = 2**16, 1000, 8


def lay_chunks(model: Path, xet: Path) -> None:
    """Writes the large files once more, cut into chunks, each behind the header of an uncompressed one."""
    for name, path in _files(model).items():
        if path.stat().st_size < _LARGE:
            continue
        xet.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, (xet / _hash(name)).open("wb") as target:
            while chunk := source.read(_CHUNK):
                length = len(chunk).to_bytes(3, "little")
                target.write(b"\0" + length + b"\0" + length + chunk)


def _files(model: Path) -> dict[str, Path]:
    return {path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()}


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


class NullHub(NullHandler):
    """One connection."""

    def _get(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        assert self.directory
        files = _files(self.directory / "model")
        api = f"/api/models/{REPOSITORY}"
        if path.startswith(f"{api}/xet-read-token/"):
            endpoint = {
                "X-Xet-Cas-Url": self.address,
                "X-Xet-Access-Token": "token",
                "X-Xet-Token-Expiration": f"{10**10}",
            }
            self.answer(json.dumps({"casUrl": self.address, "accessToken": "token", "exp": 10**10}), headers=endpoint)
        elif path.startswith(f"{api}/tree/"):
            self.answer(json.dumps([_entry(name, file.stat().st_size) for name, file in files.items()]))
        elif path.startswith(api):
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}))
        elif found := re.fullmatch(r"/v1/reconstructions/(\w+)", path):
            self.answer(json.dumps(self._reconstruction(found[1], headers.get("range", ""))))
        elif found := re.fullmatch(r"/xorbs/(\w+)", path):
            self.send_part(self.directory / "xet" / found[1], headers["range"], {})
        else:
            file = files.get(path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/"))
            if file is None:
                self.answer(status=404)
            else:
                name = file.relative_to(self.directory / "model").as_posix()
                self.send_part(file, headers.get("range", ""), self._about(name, file.stat().st_size))

    def _head(self, path: str, query: dict[str, list[str]], headers: Mapping[str, str], body: int) -> None:
        assert self.directory
        name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        file = _files(self.directory / "model").get(name)
        if file is None:
            self.answer(status=404)
        else:
            size = file.stat().st_size
            self.answer(headers={**self._about(name, size), "Content-Length": str(size)})

    def _about(self, name: str, size: int) -> dict[str, str]:
        about = {"ETag": f'"{_hash(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if size < _LARGE:
            return about
        route = f"{self.address}/api/models/{REPOSITORY}/xet-read-token/{COMMIT}"
        return about | {"X-Xet-Hash": _hash(name), "X-Xet-Refresh-Route": route}

    def _reconstruction(self, file: str, asked: str) -> dict[str, Any]:
        """Which chunks a file, or a range of it, is made of."""
        assert self.directory
        stored = (self.directory / "xet" / file).stat().st_size
        size = stored - _HEADER * -(-stored // (_CHUNK + _HEADER))
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        first, last = (int(found[1]), min(int(found[2] or size - 1), size - 1)) if found else (0, size - 1)
        terms, fetches = [], {}
        for xorb, start, stop in _xorbs(first // _CHUNK, last // _CHUNK + 1):
            name = f"{xorb:08x}{file[8:]}"
            chunks = {"start": start - xorb * _CHUNKS, "end": stop - xorb * _CHUNKS}
            length = min(stop * _CHUNK, size) - start * _CHUNK
            terms.append({"hash": name, "unpacked_length": length, "range": chunks})
            span = start * (_CHUNK + _HEADER), min(stop * (_CHUNK + _HEADER), stored) - 1
            where = {"url": f"{self.address}/xorbs/{file}", "url_range": {"start": span[0], "end": span[1]}}
            fetches[name] = [{"range": chunks, **where}]
        return {"offset_into_first_range": first % _CHUNK, "terms": terms, "fetch_info": fetches}


def _xorbs(first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The number of each xorb that has some of these chunks of a file, and which."""
    for xorb in range(first // _CHUNKS, (stop - 1) // _CHUNKS + 1):
        yield xorb, max(first, xorb * _CHUNKS), min(stop, (xorb + 1) * _CHUNKS)


def _entry(name: str, size: int) -> dict[str, Any]:
    """A file as the repository's list of files has it."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": _hash(name)[:40]}
    if size < _LARGE:
        return entry
    return entry | {"lfs": {"oid": _hash(name), "size": size, "pointerSize": 134}, "xetHash": _hash(name)}


if __name__ == "__main__":
    serve(NullHub, __doc__)
