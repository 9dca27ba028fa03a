"""What the model will see of a folder, for people: as a table, and as a contact sheet. No torch."""

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

# Pixels: side of the square that a picture has for itself, its margin, and a line of text.
_CELL, _MARGIN, _LINE = 256, 8, 16
_LINES = 5
_COLUMNS = 5


def contact_sheet(pictures: Sequence[Picture]) -> Image.Image:
    """The pictures row by row, each cropped to its shape, with its prompt; of random crops the centre is shown.

    Raises:
        ValueError: where there is no picture.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(_COLUMNS, len(pictures))
    width, height = _CELL + 2 * _MARGIN, _CELL + _LINES * _LINE + 2 * _MARGIN
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = column * width + _MARGIN, row * height + _MARGIN
        view = View()
        if picture.subject:
            view = keep_subject(view, picture.subject, picture.size, picture.shape)
        seen = crop(open_picture(picture.path, picture.shape), picture.shape, view)
        seen.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
        sheet.paste(seen, (left + (_CELL - seen.width) // 2, top + (_CELL - seen.height) // 2))
        shape = "{} x {}".format(*picture.shape)
        prompt = textwrap.wrap(picture.prompt, 42, max_lines=_LINES - 1)
        pen.multiline_text(
            (left, top + _CELL), "\n".join([printable(f"{picture.path.name}: {shape}")[:42], *prompt]), "black", font
        )
    return sheet


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
