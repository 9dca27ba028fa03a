"""Paints scenes: the background, the toy's shadow, and the toy, drawn large and reduced for smooth edges."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from dreambooth_sm.toybox.backgrounds import paint_background
from dreambooth_sm.toybox.brush import Brush
from dreambooth_sm.toybox.figures import draw_toy
from dreambooth_sm.toybox.shapes import ellipse
from dreambooth_sm.toybox.toys import Scene

# A picture is drawn this many times as large, then each square of pixels is averaged.
_SUPERSAMPLING = 4


def paint(scene: Scene, side: int = 128) -> Image.Image:
    """The picture of a scene: RGB, ``side`` pixels a side; the same scene always gives the same pixels."""
    canvas_side = side * _SUPERSAMPLING
    picture = paint_background(scene.background, canvas_side, scene.seed)
    unit = canvas_side * scene.size / 2
    middle = (canvas_side * scene.x, canvas_side * scene.foot - unit)
    Brush(picture, middle, unit).shade(ellipse(0, 0.97, 0.8, 0.1), 0.28)
    draw_toy(Brush(picture, middle, unit, scene.tilt, scene.mirrored), scene)
    return picture.reduce(_SUPERSAMPLING)


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row, on white.

    Raises:
        ValueError: where there is no picture.
    """
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(picture, (column * width, row * height))
    return sheet
