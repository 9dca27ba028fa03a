"""Draws flat shapes with dark outlines on a picture, in coordinates of the drawer's choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from toybox.shapes import Outline, Point, box, ellipse, moved

Colour = tuple[int, int, int]

WHITE: Colour = (252, 251, 248)
INK: Colour = (28, 24, 32)

# Of a picture's side: 1.5 pixels of 128.
_OUTLINE = 1.5 / 128


def mix(colour: Colour, other: Colour, share: float) -> Colour:
    """A colour with a share, from 0 to 1, of another one."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def darker(colour: Colour, share: float = 0.2) -> Colour:
    return mix(colour, INK, share)


def lighter(colour: Colour, share: float = 0.4) -> Colour:
    return mix(colour, WHITE, share)


@dataclass(frozen=True)
class Cloth:
    """The cloth that a patterned toy is covered with.

    Attributes:
        colour: the main colour.
        layer: the pattern, as large as the picture; None for a plain toy.
    """

    colour: Colour
    layer: Image.Image | None = None


class Brush:
    """Draws shapes on a picture.

    Args:
        picture: RGB and square; changed in place.
        origin: where the point (0, 0) lies, in pixels.
        unit: how long 1 is, in pixels; left out, the picture's side.
        tilt: turns everything about the origin, in radians, clockwise.
        mirrored: flips everything from left to right, before it is turned.
    """

    def __init__(
        self,
        picture: Image.Image,
        origin: Point = (0.0, 0.0),
        unit: float | None = None,
        tilt: float = 0.0,
        mirrored: bool = False,
    ) -> None:
        self.picture = picture
        self.unit = unit or float(picture.width)
        self._origin = origin
        self._tilt = tilt
        self._flip = -1 if mirrored else 1
        self._draw = ImageDraw.Draw(picture)
        self._outline = max(1, round(picture.width * _OUTLINE))

    def fill(self, shape: Outline, ink: Colour | Cloth, *, outlined: bool = True) -> None:
        """Fills a shape; its outline is centred on its edge."""
        pixels = self._pixels(shape)
        if not isinstance(ink, Cloth):
            self._draw.polygon(pixels, fill=ink)
        elif ink.layer is None:
            self._draw.polygon(pixels, fill=ink.colour)
        else:
            self._cut_out(ink.layer, pixels)
        if outlined:
            colour = ink.colour if isinstance(ink, Cloth) else ink
            self._draw.line([*pixels, *pixels[:2]], _outline_of(colour), self._outline, joint="curve")

    def stroke(self, line: Sequence[Point], colour: Colour, width: float, *, outlined: bool = False) -> None:
        """Draws a line with round ends; the width is in the brush's own unit, outline not included."""
        pixels = self._pixels(line)
        thickness = max(1, round(width * self.unit))
        if outlined:
            self._stroke_pixels(pixels, _outline_of(colour), thickness + self._outline)
            thickness -= self._outline
        self._stroke_pixels(pixels, colour, thickness)

    def shade(self, shape: Outline, strength: float) -> None:
        """Darkens what lies under a shape; a strength of 1 makes it black."""
        mask = Image.new("L", self.picture.size)
        ImageDraw.Draw(mask).polygon(self._pixels(shape), fill=round(255 * strength))
        self.picture.paste((0, 0, 0), mask=mask)

    def cloth(self, pattern: str, colour: Colour, second: Colour, period: float, turn: float) -> Cloth:
        """A pattern that moves with the brush's coordinates.

        Args:
            pattern: ``plain``, ``striped`` or ``spotted``.
            period: from one stripe or row of spots to the next.
            turn: of the stripes, in radians; 0 is level.
        """
        if pattern == "plain":
            return Cloth(colour)
        layer = Image.new("RGB", self.picture.size, colour)
        motifs = _stripes(period) if pattern == "striped" else _spots(period)
        draw = ImageDraw.Draw(layer)
        for motif in motifs:
            draw.polygon(self._pixels([moved(point, (0.0, 0.0), turn) for point in motif]), fill=second)
        return Cloth(colour, layer)

    def _pixels(self, shape: Sequence[Point]) -> Outline:
        cos, sin = self.unit * math.cos(self._tilt), self.unit * math.sin(self._tilt)
        left, top = self._origin
        flip = self._flip
        return [(left + flip * x * cos - y * sin, top + flip * x * sin + y * cos) for x, y in shape]

    def _cut_out(self, layer: Image.Image, pixels: Outline) -> None:
        xs, ys = zip(*pixels, strict=True)
        left, top = max(0, math.floor(min(xs))), max(0, math.floor(min(ys)))
        right, bottom = min(layer.width, math.ceil(max(xs)) + 1), min(layer.height, math.ceil(max(ys)) + 1)
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in pixels], fill=255)
        self.picture.paste(layer.crop((left, top, right, bottom)), (left, top), mask)

    def _stroke_pixels(self, pixels: Outline, colour: Colour, thickness: int) -> None:
        self._draw.line(pixels, colour, thickness, joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            radius = thickness / 2
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _stripes(period: float) -> list[Outline]:
    # narrower than the gaps: the main colour has to be told from the second one
    return [box(-2, row * period, 2, (row + 0.38) * period) for row in _rows(period)]


def _spots(period: float) -> list[Outline]:
    return [
        ellipse((column + row % 2 / 2) * period * 1.1, row * period * 0.9, 0.3 * period)
        for row in _rows(period * 0.9)
        for column in _rows(period * 1.1)
    ]


def _rows(period: float) -> range:
    """Enough to cover a toy, from -1.5 to 1.5, however it is turned."""
    count = math.ceil(1.5 / period)
    return range(-count, count + 1)


def _outline_of(colour: Colour) -> Colour:
    """Dark; around a dark colour light, or the parts of a black toy would melt into one another."""
    return mix(colour, WHITE, 0.35) if max(colour) < 80 else mix(colour, INK, 0.7)
