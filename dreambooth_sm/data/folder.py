"""The files of a folder, by what they are: pictures, their masks and captions, and what is left out. No torch.

One walk answers for the job and for the client, which sends what the job will read.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dreambooth_sm.data.pictures import SUFFIXES, is_picture
from dreambooth_sm.manifest import MANIFEST_NAME

DATASET_INFO = "dataset_info.json"
METADATA = ("metadata.jsonl", "metadata.csv")
_TABLES = frozenset({*METADATA, DATASET_INFO})
_CAPTION_SUFFIXES = (".txt", ".caption")
# Folders beside pictures that hold their masks, under the pictures' names.
_MASK_FOLDERS = ("mask", "masks")
# ``duck-mask.png``, ``duck_mask.PNG``, ``duck.jpg.mask.png``, and OneTrainer's ``duck-masklabel.png``.
_KINDS = "|".join(sorted(suffix[1:] for suffix in SUFFIXES))
_MASK = re.compile(rf"(.+?)(?:\.(?:{_KINDS}))?[-_. ]mask(?:label)?\.(?:{_KINDS})", re.IGNORECASE | re.DOTALL)
# What OneTrainer conditions on beside a picture.
_CONDITION = re.compile(rf"(.+?)-condlabel\.(?:{_KINDS})", re.IGNORECASE | re.DOTALL)
# What operating systems, archives and network drives leave behind; hidden files and folders are left out as well.
_LITTER_FOLDERS = ("__macosx", "$recycle.bin", "#recycle", "@recycle", "@eadir", "@tmp", "lost+found")
_LITTER = frozenset(
    {*_LITTER_FOLDERS, "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)
# What jobs and the launcher leave beside pictures: class images (class_cache.Recipe), and a list of what was sent.
_MADE = re.compile(rf"class-[0-9a-f]{{20}}-\d{{6}}\.(safetensors|\d+\.partial)|{re.escape(MANIFEST_NAME)}")
_SHOWN = 5


@dataclass(frozen=True)
class Folder:
    """The files below a directory, by what they are; each sorted.

    Attributes:
        pictures: files that hold a picture, or whose name says so.
        companions: masks, captions, and tables of them.
        left_out: everything else, but litter and hidden files.
        unpaired: pictures that are named like a mask of a picture that is not there.
        unreadable: folders that can't be looked into, with the reason.
    """

    directory: Path
    pictures: tuple[Path, ...]
    companions: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()
    unpaired: tuple[Path, ...] = ()
    unreadable: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """A line for each kind of thing that is not used, or not as its name says."""
        lines = []
        if self.left_out:
            lines.append(
                f"left out, being neither pictures that can be read nor captions of one: {self._named(self.left_out)}"
            )
        if self.unpaired:
            lines.append(
                "named like the mask of a picture that is not there, and trained as pictures: "
                + self._named(self.unpaired)
            )
        return lines

    def _named(self, paths: Iterable[Path]) -> str:
        return shortened([path.relative_to(self.directory).as_posix() for path in paths])


def shortened(items: list[str]) -> str:
    """``a, b, c, d, e and 3 more``."""
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + rest


class Names:
    """The names in one folder, found whatever their case."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)
        self._pictures: dict[str, list[str]] = defaultdict(list)
        self._masks: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            self._names[name.casefold()].append(name)
            self._pictures[Path(name).stem.casefold()] += [name] if _has_suffix(name) else []
            if match := _MASK.fullmatch(name):
                self._masks[match[1].casefold()].append(name)

    def find(self, *wanted: str) -> list[str]:
        """Those that are there of ``wanted``, in this order."""
        return [name for text in wanted for name in self._names.get(text.casefold(), ())]

    def pictures(self, stem: str) -> list[str]:
        """The names of pictures with this stem."""
        return self._pictures.get(stem.casefold(), [])

    def masks(self, stem: str) -> list[str]:
        """The names of masks of a picture with this stem."""
        return self._masks.get(stem.casefold(), [])

    def belongs_to_another(self, name: str) -> bool:
        """Whether a file is named like the mask, or what OneTrainer conditions on, of a picture that is there."""
        matches = [pattern.fullmatch(name) for pattern in (_MASK, _CONDITION)]
        return any(match and (self.pictures(match[1]) or self.find(match[1])) for match in matches)


def names_in(directory: Path) -> Names:
    """The names in a folder; none where it can't be looked into."""
    try:
        return Names(path.name for path in directory.iterdir())
    except OSError:
        return Names(())


def masks_of(picture: Path, names_of: Callable[[Path], Names] = names_in) -> list[Path]:
    """The masks of a picture, the one that is used first: beside it, or in a folder ``masks`` beside it."""
    place, names = picture.parent, names_of(picture.parent)
    folders = [place / name for name in names.find(*_MASK_FOLDERS)]
    inside = [folder / name for folder in folders for name in names_of(folder).pictures(picture.stem)]
    return [*(place / name for name in names.masks(picture.stem)), *inside]


def captions_of(picture: Path, names_of: Callable[[Path], Names] = names_in) -> list[Path]:
    """The caption files of a picture, the one that is used first."""
    wanted = [base + suffix for suffix in _CAPTION_SUFFIXES for base in (picture.name, picture.stem)]
    return [picture.parent / name for name in names_of(picture.parent).find(*wanted)]


def scan(directory: Path) -> Folder:
    """Finds out what the files below a directory are; links to folders are followed, once each."""
    folders, files, unreadable = _walk(directory) if directory.is_dir() else ({}, [], [])

    def names_of(folder: Path) -> Names:
        return folders.get(folder, Names(()))

    def in_masks(path: Path) -> bool:
        return path.parent != directory and path.parent.name.casefold() in _MASK_FOLDERS

    def is_mask(path: Path) -> bool:
        inside = in_masks(path) and names_of(path.parent.parent).pictures(path.stem)
        return bool(inside) or names_of(path.parent).belongs_to_another(path.name)

    pictures = [path for path in files if not is_mask(path) and (_has_suffix(path.name) or is_picture(path))]
    used = {path for picture in pictures for path in masks_of(picture, names_of)[:1]}
    used |= {path for picture in pictures for path in captions_of(picture, names_of)[:1]}
    used |= {path for path in files if path.name in _TABLES}
    return Folder(
        directory,
        pictures=tuple(sorted(pictures)),
        companions=tuple(sorted(used.difference(pictures))),
        left_out=tuple(sorted(set(files).difference(pictures, used))),
        unpaired=tuple(sorted(path for path in pictures if _MASK.fullmatch(path.name) or in_masks(path))),
        unreadable=tuple(unreadable),
    )


def list_pictures(directory: Path) -> list[Path]:
    """The pictures below a directory, sorted, without masks."""
    return list(scan(directory).pictures)


def _walk(directory: Path) -> tuple[dict[Path, Names], list[Path], list[str]]:
    """The names in each folder, all files, both without litter, and which folders can't be looked into."""
    folders: dict[Path, Names] = {}
    files: list[Path] = []
    unreadable: list[str] = []
    seen: set[str] = set()
    walk = os.walk(
        directory,
        followlinks=True,
        onerror=lambda error: unreadable.append(f"{error.filename} can't be looked into: {error.strerror}"),
    )
    for place, subfolders, names in walk:
        if (real := os.path.realpath(place)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _is_litter(name))
        own = [name for name in names if not _is_litter(name)]
        folders[Path(place)] = Names([*own, *subfolders])
        files += [Path(place, name) for name in own]
    return folders, files, unreadable


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _LITTER or _MADE.fullmatch(name) is not None


def _has_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES
