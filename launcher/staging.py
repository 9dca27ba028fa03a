"""Files on their way to S3, below a name made of their content: what is there already is not sent again."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_sm.data.folder import scan
from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import MANIFEST_NAME, S3Options, S3Uri, list_objects, upload_directory

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# Names in S3 to files here, or to what they hold.
Files = Mapping[str, Path | bytes]


def picture_files(images: Path | Sequence[Path]) -> dict[str, Path]:
    """Lists what a job reads of a folder (pictures, masks, captions), or a list's files, by the names they get in S3.

    Raises:
        UserError: two files of a list have the same name; a file is missing.
    """
    if isinstance(images, Path):
        folder = scan(images)
        return {path.relative_to(images).as_posix(): path for path in sorted({*folder.pictures, *folder.companions})}
    problems = [f"images: there is no file {path}" for path in images if not path.is_file()]
    named = {path.name: path for path in images}
    if len(named) < len(images):
        problems.append("images: two files have the same name; put them into a folder, and name the folder")
    if problems:
        raise UserError(problems)
    return named


def all_files(directory: Path) -> dict[str, Path]:
    """Every file below a directory but hidden ones, by its relative POSIX path, sorted."""
    found = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        relative.as_posix(): path
        for relative, path in found.items()
        if not any(part.startswith(".") for part in relative.parts) and relative.as_posix() != MANIFEST_NAME
    }


def digest(files: Files) -> str:
    """Sixteen hexadecimal digits that names and contents of files determine."""
    whole = hashlib.sha256()
    for name, source in sorted(files.items()):
        if isinstance(source, bytes):
            content = hashlib.sha256(source).hexdigest()
        else:
            with source.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{content} {name}\n".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()[:16]


def stage(files: Files, target: S3Uri, client: S3Client, options: S3Options) -> bool:
    """Sends files to a prefix that is named after their :func:`digest`; whether there was anything to send.

    The manifest is written last: where it is, everything is.

    Args:
        options: encryption, ACL and the like of the objects.

    Raises:
        UserError: no such bucket, no permission.
        TransferError: the transfer failed in spite of retries.
    """
    if MANIFEST_NAME in list_objects(target, options, client=client):
        return False
    with tempfile.TemporaryDirectory(prefix="dreambooth-sm-") as scratch:
        lay_out_files(files, Path(scratch))
        upload_directory(Path(scratch), target, options, client=client)
    return True


def lay_out_files(files: Files, directory: Path) -> None:
    """Makes a directory of links to files, or of copies, and of files with what the others hold."""
    for name, source in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            target.write_bytes(source)
        else:
            link_or_copy(source, target, os.symlink, os.link)


def link_or_copy(source: str | Path, target: str | Path, *links: Callable[[str, str], None]) -> None:
    """Puts a file into another place: by the first link that the system lets this user make, or as a copy.

    Windows gives a right to links to few, and a hard link needs the same file system.
    """
    for link in links:
        try:
            return link(os.path.realpath(source), str(target))
        except (OSError, NotImplementedError):
            continue
    shutil.copy2(source, target)
