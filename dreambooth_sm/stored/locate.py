"""Locates the model in a directory or an archive, by what files hold. Imports no torch."""

from __future__ import annotations

import hashlib
import lzma
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Literal

from dreambooth_sm import sources, warm_pool
from dreambooth_sm.errors import UserError

FileKind = Literal["safetensors", "pickle", "archive"]
SAFETENSORS: FileKind = "safetensors"
PICKLE: FileKind = "pickle"
ARCHIVE: FileKind = "archive"

INDEX = "model_index.json"
# For files that are cut off, whose first bytes say nothing.
_SUFFIXES: dict[str, FileKind] = {".safetensors": SAFETENSORS} | dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), PICKLE)
_LONGEST_HEADER = 100_000_000
# How torch.save began its files before it wrote zip files.
_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")
_TAR_MARK = slice(257, 262)
# Directories below the one that was named in which a model is looked for.
_DEPTH = 2


def find_kind(path: Path) -> FileKind | None:
    """Tells the kind of a model file; None for other files, and those that can't be read."""
    try:
        with path.open("rb") as file:
            start = file.read(_TAR_MARK.stop)
        if 2 <= int.from_bytes(start[:8], "little") <= _LONGEST_HEADER and start[8:9] == b"{":
            return SAFETENSORS
        if start.startswith(_TORCH) or (start.startswith(b"PK\3\4") and _holds_pickle(path)):
            return PICKLE
        if start.startswith(_COMPRESSED) or start[_TAR_MARK] == b"ustar":
            return ARCHIVE
    except OSError:
        return None
    return _SUFFIXES.get(path.suffix.lower())


def _holds_pickle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/data.pkl") for name in file.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return False


def find_model(path: Path, *, unpacked: bool = False) -> Path:
    """The model at a path: a pipeline's directory, or a checkpoint file.

    Args:
        path: one of both; a directory that holds one, itself or further down; or an archive of any of these, such as
            SageMaker's ``model.tar.gz``, which is unpacked once.
        unpacked: whether ``path`` is of an archive, in which no other is looked for.

    Raises:
        UserError: where there is no model, or several.
    """
    if path.is_file():
        kind = find_kind(path)
        if kind is None or (kind == ARCHIVE and unpacked):
            raise UserError(
                f"{path} is a file, but not of a model; name a .safetensors or .ckpt file, or a diffusers directory"
            )
        return find_model(_unpack(path), unpacked=True) if kind == ARCHIVE else path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; name a hub id or a diffusers directory, such as a channel")
    found = _models(path, _DEPTH)
    if not found:
        raise UserError(f"{path} holds no {INDEX}; name a diffusers pipeline directory, or a checkpoint file")
    if len(found) > 1:
        names = ", ".join(str(each.relative_to(path)) for each in found[:5])
        raise UserError(f"{path} holds {len(found)} models ({names}); name one of them, such as {found[0]}")
    (model,) = found
    return find_model(model, unpacked=unpacked) if model.is_file() else model


def look_for_model(path: Path) -> Path | None:
    """The model that :func:`find_model` finds, without unpacking anything; None where that takes more than a look."""
    found = [path] if path.is_file() else _models(path, _DEPTH) if path.is_dir() else []
    return found[0] if len(found) == 1 and (found[0].is_dir() or find_kind(found[0]) != ARCHIVE) else None


def _models(directory: Path, depth: int) -> list[Path]:
    if (directory / INDEX).is_file():
        return [directory]
    if any((directory / denoiser).is_dir() for denoiser in ("unet", "transformer")):  # a pipeline that lost its index
        return []
    seen = [path for path in sorted(directory.iterdir()) if not path.name.startswith(".")]
    files = {path: find_kind(path) for path in seen if path.is_file()}
    checkpoints = [path for path, kind in files.items() if kind in (SAFETENSORS, PICKLE)]
    archives = [path for path, kind in files.items() if kind == ARCHIVE]
    # SageMaker puts an output.tar.gz beside it.
    if found := checkpoints or [path for path in archives if path.name.startswith("model.")] or archives:
        return found
    return [model for path in seen if path.is_dir() for model in _models(path, depth - 1)] if depth else []


def _unpack(archive: Path) -> Path:
    """The directory with an archive's files; later calls find it, until the archive changes."""
    about = archive.stat()
    identity = hashlib.sha256(f"{archive.resolve()} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()[:16]
    kept = sources.cache_directory()
    directory = kept / identity
    with sources.locked(kept / f"{identity}.lock"):
        if not directory.is_dir():
            partial = directory.with_suffix(warm_pool.UNFINISHED)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                _extract(archive, partial)
                partial.rename(directory)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return directory


def _extract(archive: Path, target: Path) -> None:
    room = shutil.disk_usage(target).free
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                room -= member.size
                if room < 0:
                    raise UserError(f"{archive} holds more than there is room for in {target.parent}")
                opened.extract(member, target, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"{archive} is refused: {error}") from None
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{archive} can't be unpacked ({error}); copy it again, or name a directory") from None
