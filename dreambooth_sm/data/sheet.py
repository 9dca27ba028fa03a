"""A folder as the model will see it, for people: as a table, and as a contact sheet. No torch."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dreambooth_sm.data.buckets import shown
from dreambooth_sm.data.check import Picture, printable
from dreambooth_sm.data.masks import keep_subject
from dreambooth_sm.data.pictures import View, crop, open_picture

# Pixels: longest side of a picture, least width of a tile, margin, and height of a line of text.
_SIDE, _NARROWEST, _MARGIN, _LINE = 256, 96, 8, 16
_LINES = 5
_COLUMNS = 5


def contact_sheet(pictures: Sequence[Picture]) -> Image.Image:
    """The pictures row by row, each cropped to its shape, with its prompt; of random crops the centre is shown.

    All tiles are as large as the largest picture and the longest text need.

    Raises:
        ValueError: where there is not a picture.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    seen = [_as_seen(picture) for picture in pictures]
    width = max(_NARROWEST, *(view.width for view in seen))
    font = ImageFont.load_default(size=12)
    letters = int(width / (font.getlength("photo of a toy") / 14))
    texts = [_words(picture, letters) for picture in pictures]
    high, lines = max(view.height for view in seen), max(map(len, texts))
    tile = (width + 2 * _MARGIN, high + lines * _LINE + 2 * _MARGIN)
    columns = min(_COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * tile[0], -(-len(pictures) // columns) * tile[1]), "white")
    for number, (view, words) in enumerate(zip(seen, texts, strict=True)):
        drawn = Image.new("RGB", tile, "white")
        drawn.paste(view, ((tile[0] - view.width) // 2, _MARGIN + (high - view.height) // 2))
        ImageDraw.Draw(drawn).multiline_text((_MARGIN, _MARGIN + high), "\n".join(words), "black", font)
        row, column = divmod(number, columns)
        sheet.paste(drawn, (column * tile[0], row * tile[1]))
    return sheet


def _as_seen(picture: Picture) -> Image.Image:
    view = View()
    if picture.subject:
        view = keep_subject(view, picture.subject, picture.size, picture.shape)
    seen = crop(open_picture(picture.path, picture.shape), picture.shape, view)
    seen.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return seen


def _words(picture: Picture, letters: int) -> list[str]:
    """Name, shape and prompt in lines of at most so many letters."""
    title = f"{printable(picture.path.name)}: {picture.shape[0]} x {picture.shape[1]}"
    return [*textwrap.wrap(title, letters)[:2], *textwrap.wrap(picture.prompt, letters, max_lines=_LINES - 2)]


def table(pictures: Sequence[Picture], directory: Path) -> str:
    """A line for each picture, and one for the shapes."""
    rows: list[tuple[str, ...]] = [("picture", "pixels", "trained in", "seen", "enlarged", "sharpness", "prompt")]
    for picture in pictures:
        enlarged = f"{picture.enlarged:.1f} x" if picture.enlarged > 1 else "no"
        name, seen = picture.path.relative_to(directory).as_posix(), f"{shown(picture.size, picture.shape):.0%}"
        sizes = [f"{width} x {height}" for width, height in (picture.size, picture.shape)]
        cells = (name, *sizes, seen, enlarged, f"{picture.sharpness:.0f}", picture.prompt)
        rows.append(tuple(map(printable, cells)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shapes = Counter(picture.shape for picture in pictures).most_common()
    counts = ", ".join(f"{count} in {width} x {height}" for (width, height), count in shapes)
    return "\n".join([*lines, f"{len(pictures)} pictures{': ' if counts else ''}{counts}"])
