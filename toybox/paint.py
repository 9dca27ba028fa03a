"""Paints scenes: the background, the toy's shadow, and the toy, drawn large and reduced for smooth edges."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from toybox.backgrounds import paint_background
from toybox.brush import Brush
from toybox.drawings import draw_toy
from toybox.shapes import ellipse
from toybox.toys import Scene, Toy, scenes_of

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


def paint_photos_of(toy: Toy, directory: Path, count: int = 5, seed: int = 0) -> Path:
    """Writes photos of one toy as ``0.png``, ``1.png``, ..., and returns the directory, which it makes.

    Those that come with the runtime (``dreambooth_sm.toybox.PHOTOS``) are made so of ``HELD_OUT["teal_hatter"]``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes_of(toy, count, seed)):
        paint(scene).save(directory / f"{number}.png", optimize=True)
    return directory
