"""Captions beside pictures, and the prompts that templates make of them. No torch.

A picture's caption is the text of ``NAME.txt`` beside it, or else its ``text`` in a ``metadata.jsonl`` or
``metadata.csv`` (Hugging Face's imagefolder convention) of its folder or one above.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import FILEWORDS, unescape_prompt

DATASET_INFO = "dataset_info.json"
_METADATA = ("metadata.jsonl", "metadata.csv")
# What cameras, phones and messengers begin names with.
_NO_WORDS = frozenset({"img", "image", "dsc", "dscf", "dscn", "pxl", "mvimg", "screenshot", "whatsapp", "untitled"})


def read_captions(directory: Path, pictures: Sequence[Path]) -> dict[Path, str]:
    """The captions of those pictures below a directory that have one; each is one line.

    Raises:
        UserError: with everything about them that can't be read, and each picture that is named and missing.
    """
    problems: list[str] = []
    captions: dict[Path, str] = {}
    for folder in sorted({directory, *(parent for path in pictures for parent in _parents(path, directory))}):
        for name in _METADATA:
            captions |= _read_metadata(folder / name, problems)
    for path in pictures:
        text = path.with_suffix(".txt")
        if text.is_file():
            try:
                captions[path] = unescape_prompt(text.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError) as error:
                problems.append(f"{text} can't be read as UTF-8 text ({error}); save it anew")
    problems += [f"the caption of {path} holds a NUL; write it anew" for path, text in captions.items() if "\0" in text]
    if problems:
        raise UserError(problems)
    return {path: captions[path] for path in pictures if captions.get(path)}


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
    stem = path.stem.encode("utf-8", "ignore").decode()  # without bytes that are no text
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
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{DATASET_INFO} can't be read ({error.strerror}): {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}") from None
    prompts = {key: content.get(key) for key in ("instance_prompt", "class_prompt")} if _is_object(content) else {}
    if not prompts or not all(value is None or isinstance(value, str) for value in prompts.values()):
        raise UserError(f'{path} is no object with prompts; write {{"instance_prompt": "...", "class_prompt": "..."}}')
    return {key: text for key, value in prompts.items() if value and (text := unescape_prompt(value))}


def _parents(path: Path, directory: Path) -> Iterator[Path]:
    """The folders from a picture's own up to ``directory``."""
    for parent in path.parents:
        yield parent
        if parent == directory:
            return


def _read_metadata(path: Path, problems: list[str]) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in _rows(path, file):
                name, text = row.get("file_name"), row.get("text")
                if not isinstance(name, str) or not isinstance(text, str):
                    problems.append(f'{path}: {str(row)[:80]} names no "file_name" and "text"; write both')
                elif not (path.parent / name).is_file():
                    problems.append(f"{path}: {name} does not exist; file names are relative to {path.parent}")
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
                raise ValueError(f"line {number} is no JSON object")
            yield row


def _is_object(content: object) -> bool:
    return isinstance(content, dict)
