"""Captions beside pictures, and the prompts that templates make of them. No torch.

A picture's caption is the text of a file beside it (``NAME.txt``, ``NAME.caption``, ``NAME.jpg.txt``), or else its
``text`` in a ``metadata.jsonl`` or ``metadata.csv`` (Hugging Face's imagefolder convention) of its folder or one above.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from dreambooth_sm.data.folder import DATASET_INFO, METADATA, Names, captions_of, names_in
from dreambooth_sm.errors import UserError
from dreambooth_sm.knobs.escapes import unescape_prompt
from dreambooth_sm.knobs.pictures import FILEWORDS

# Bytes of a file with captions; more are not captions.
_MOST_BYTES, _MOST_TABLE_BYTES = 1 << 20, 1 << 28
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What cameras, phones and messengers begin names with.
_NO_WORDS = frozenset({"img", "image", "dsc", "dscf", "dscn", "pxl", "mvimg", "screenshot", "whatsapp", "untitled"})


def read_captions(directory: Path, pictures: Sequence[Path]) -> dict[Path, str]:
    """The captions of those pictures below a directory that have one, which may be empty; each is one line.

    Raises:
        UserError: with everything about them that can't be read, and each picture that is named and missing.
    """
    problems: list[str] = []
    captions: dict[Path, str] = {}
    for folder in sorted({directory, *(parent for path in pictures for parent in _parents(path, directory))}):
        for name in METADATA:
            captions |= _read_metadata(folder / name, frozenset(pictures), problems)
    for path, text in caption_files(pictures).items():
        try:
            captions[path] = unescape_prompt(_read_text(text, _MOST_BYTES))
        except (OSError, ValueError) as error:
            problems.append(f"{text} can't be read as UTF-8 text ({error}); save it again as UTF-8")
    problems += [
        f"the caption of {path} holds a NUL; write it again" for path, text in captions.items() if "\0" in text
    ]
    if problems:
        raise UserError(problems)
    return {path: captions[path] for path in pictures if path in captions}


def caption_files(pictures: Sequence[Path]) -> dict[Path, Path]:
    """The caption file of each picture that has one beside it."""
    names: dict[Path, Names] = {folder: names_in(folder) for folder in {path.parent for path in pictures}}
    found = {path: captions_of(path, names.__getitem__)[:1] for path in pictures}
    return {path: files[0] for path, files in found.items() if files}


def fill(template: str, words: str) -> str:
    """A template with ``words`` for each ``[filewords]``; without words, neither blanks nor commas are left of it.

    >>> fill("photo of zwx toy, [filewords], outdoors", "on a table")
    'photo of zwx toy, on a table, outdoors'
    >>> fill("photo of zwx toy, [filewords], outdoors", "")
    'photo of zwx toy, outdoors'
    """
    if FILEWORDS not in template:
        return template
    text = " ".join(template.replace(FILEWORDS, words).split())
    return text if words else ", ".join(part.strip() for part in text.split(",") if part.strip())


def words_of(path: Path) -> str:
    """The words of a file name: what stands between its separators and is neither a number nor a camera's prefix.

    >>> words_of(Path("red-toy_on a table (2).jpg"))
    'red toy on a table'
    >>> words_of(Path("IMG_2041.HEIC"))
    ''
    """
    stem = path.stem.encode("utf-8", "ignore").decode()  # without bytes that are not text
    parts = re.split(r"[\s_\-.,()\[\]+~#]+", stem)
    return " ".join(p for p in parts if p and not re.search(r"\d", p) and p.lower() not in _NO_WORDS)


def read_dataset_info(directory: Path) -> dict[str, str]:
    """The prompts that ``dataset_info.json`` beside the pictures names (SageMaker JumpStart's convention).

    Returns:
        ``instance_prompt`` and ``class_prompt``, or those of the two that are there.

    Raises:
        UserError: where the file can't be read.
    """
    path = directory / DATASET_INFO
    try:
        content = json.loads(_read_text(path, _MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{DATASET_INFO} can't be read ({error.strerror or error}): {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}") from None
    prompts = {key: content.get(key) for key in ("instance_prompt", "class_prompt")} if _is_object(content) else {}
    if not prompts or not all(value is None or isinstance(value, str) for value in prompts.values()):
        raise UserError(
            f'{path} is not an object with prompts; write {{"instance_prompt": "...", "class_prompt": "..."}}'
        )
    return {key: text for key, value in prompts.items() if value and (text := unescape_prompt(value))}


def _parents(path: Path, directory: Path) -> Iterator[Path]:
    """The folders from a picture's own up to ``directory``."""
    for parent in path.parents:
        yield parent
        if parent == directory:
            return


def _read_metadata(path: Path, pictures: Set[Path], problems: list[str]) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    try:
        for row in _rows(path, io.StringIO(_read_text(path, _MOST_TABLE_BYTES), newline="")):
            name, text = row.get("file_name"), row.get("text")
            if not isinstance(name, str) or not isinstance(text, str):
                problems.append(f'{path}: {str(row)[:80]} names no "file_name" and "text"; write both')
            elif not (path.parent / name).is_file():
                problems.append(f"{path}: {name} does not exist; file names are relative to {path.parent}")
            elif path.parent / name not in pictures:
                problems.append(f"{path}: {name} is not among the pictures that are read; remove the line")
            else:
                captions[path.parent / name] = unescape_prompt(text)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        problems.append(f"{path} can't be read: {error}")
    return captions


def _rows(path: Path, file: Any) -> Iterator[Mapping[str, object]]:
    if path.suffix == ".csv":
        yield from csv.DictReader(file)
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            row = json.loads(line)
            if not _is_object(row):
                raise ValueError(f"line {number} is not a JSON object")
            yield row


def _read_text(path: Path, most: int) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says.

    Raises:
        OSError: it can't be read, is not a file (opening a pipe would wait for ever), or has more than ``most`` bytes.
        ValueError: it is neither.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"it has more than {most:,} bytes")
    encoding = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(encoding)


def _is_object(content: object) -> bool:
    return isinstance(content, dict)
