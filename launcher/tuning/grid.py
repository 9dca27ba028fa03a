"""Pictures of the best trials, side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.tuning.status import Trial, short

if TYPE_CHECKING:
    from PIL import Image

# Side of a picture, width of the words before a row of them, and space around both, in pixels.
_TILE, _WORDS, _GAP = 160, 220, 8
_LINE = 14
_MOST_COLUMNS = 6


class TrialGrid(list["tuple[Trial, Sequence[Image.Image]]"]):
    """Trials with their pictures, the best first; as the last value of a notebook's cell they are shown in rows, each
    after the trial's objective and values.

    Args:
        objective: the measure that was to be best.
    """

    def __init__(self, objective: str, rows: Sequence[tuple[Trial, Sequence[Image.Image]]]) -> None:
        super().__init__(rows)
        self._objective = objective

    def image(self) -> Image.Image | None:
        """All rows as one picture; None without any."""
        from PIL import Image, ImageDraw, ImageOps

        if not self:
            return None
        columns = min(_MOST_COLUMNS, max(len(pictures) for _, pictures in self))
        sheet = Image.new("RGB", (_WORDS + columns * (_TILE + _GAP), len(self) * (_TILE + _GAP)), "white")
        draw = ImageDraw.Draw(sheet)
        for row, (trial, pictures) in enumerate(self):
            top = row * (_TILE + _GAP)
            lines = [f"trial {trial.number}: {self._objective} {trial.objective:.4g}"]
            lines += [f"{name} {short(value)}" for name, value in trial.values.items()]
            for number, line in enumerate(lines[: _TILE // _LINE]):
                draw.text((_GAP, top + number * _LINE), line[:36], fill="black")
            for column, picture in enumerate(pictures[:columns]):
                tile = ImageOps.pad(picture.convert("RGB"), (_TILE, _TILE), color="white")
                sheet.paste(tile, (_WORDS + column * (_TILE + _GAP), top))
        return sheet

    def _repr_png_(self) -> bytes | None:
        sheet = self.image()
        if sheet is None:
            return None
        file = io.BytesIO()
        sheet.save(file, "png")
        return file.getvalue()
