"""Where the subjects of a fleet come from: a folder of folders, a table or a list, here or in S3, or Python objects."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dreambooth_sm.errors import UserError
from dreambooth_sm.fleet.subjects import FleetSubject, parse_subjects, read_lines
from dreambooth_sm.storage import S3Uri, get_object
from launcher.aws.lookup import s3_text

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Subjects = str | Path | Iterable[Mapping[str, object]]
_LISTS = (".csv", ".jsonl")


def read_subjects(subjects: Subjects, client: Callable[[], S3Client]) -> tuple[FleetSubject, ...]:
    """The subjects, with the places of their pictures as this machine knows them.

    Args:
        subjects: a folder with a folder of pictures for each; a ``.csv`` with a line of names first, or a ``.jsonl``,
            here or at ``s3://``; or dictionaries.
        client: of S3, made where the list lies there.

    Raises:
        UserError: with everything that is wrong with any of them.
    """
    if location := s3_text(subjects):
        uri = S3Uri.parse(location)
        if not uri.prefix.lower().endswith(_LISTS):
            raise UserError(f"subjects: {location} is not a list; name a .csv or .jsonl object, or a folder here")
        content = get_object(uri, client=client())
        if content is None:
            raise UserError(f"subjects: {location} can't be found: check bucket and key")
        return parse_subjects(_rows(content, uri.prefix))
    if isinstance(subjects, str | Path):
        path = Path(subjects).expanduser()
        if path.is_dir():
            return parse_subjects(_folders(path))
        if path.suffix.lower() not in _LISTS:
            raise UserError(f"subjects: {path} is not a folder of folders, and not a .csv or .jsonl file")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"subjects: {path} can't be read: {error.strerror}") from None
        return _from(path.parent, parse_subjects(_rows(content, path.name)))
    rows = [dict(row) if isinstance(row, Mapping) else row for row in subjects]
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("images"), Path):
            row["images"] = str(row["images"])
    found = parse_subjects((f"subject {number}", row) for number, row in enumerate(rows, start=1))
    return _from(Path(), found)


def _folders(path: Path) -> list[tuple[str, object]]:
    folders = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not folders:
        raise UserError(f"subjects: {path} holds no folders; give each subject a folder with its pictures")
    return [(str(each), {"id": each.name, "images": str(each.resolve())}) for each in folders]


def _rows(content: bytes, name: str) -> list[tuple[str, object]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"subjects: {name} is not a text in UTF-8") from None
    if not name.lower().endswith(".csv"):
        return read_lines(text, name)
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        return [(f"{name}, line {reader.line_num}", _without_rest(row)) for row in reader]
    except csv.Error as error:
        raise UserError(f"subjects: {name} can't be read as CSV: {error}") from None


def _without_rest(row: Mapping[str | None, object]) -> object:
    """What stands in a line; None for one that has more fields than there are names."""
    return None if None in row else dict(row)


def _from(folder: Path, subjects: tuple[FleetSubject, ...]) -> tuple[FleetSubject, ...]:
    """The subjects, with paths from a folder on as paths of this machine."""
    return tuple(
        each if each.images.startswith("s3://") else replace(each, images=str((folder / each.images).resolve()))
        for each in subjects
    )
