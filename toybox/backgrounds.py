"""The places that toys are photographed in. Lengths are shares of the picture's side."""

from __future__ import annotations

import random
from collections.abc import Callable

from PIL import Image

from toybox.brush import WHITE, Brush, Colour, darker, lighter, mix
from toybox.shapes import box, curve, dome, ellipse, star


def paint_background(background: str, side: int, seed: int) -> Image.Image:
    """One place, without a toy.

    Args:
        background: of ``labels.BACKGROUNDS``.
        side: of the picture, in pixels.
        seed: of the details: the shades, the horizon, what stands around.
    """
    picture = Image.new("RGB", (side, side))
    _PAINTERS[background](Brush(picture), random.Random(seed))
    return picture


def _meadow(brush: Brush, rng: random.Random) -> None:
    horizon = rng.uniform(0.5, 0.62)
    _sky(brush, _shade(rng, (128, 196, 246)), horizon)
    _cloud(brush, rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), rng.uniform(0.06, 0.09))
    if rng.random() < 0.5:
        _sun(brush, rng)
    grass = _shade(rng, (146, 208, 92))
    _hill(brush, rng, horizon, darker(grass, 0.14))
    _ground(brush, grass, horizon)
    for _ in range(9):
        x, y = rng.uniform(0.02, 0.98), rng.uniform(horizon + 0.06, 0.98)
        petals = rng.choice([WHITE, (255, 214, 70), (240, 110, 130)])
        brush.fill(ellipse(x, y, 0.018), petals, outlined=False)


def _beach(brush: Brush, rng: random.Random) -> None:
    shore = rng.uniform(0.54, 0.66)
    horizon = shore - rng.uniform(0.16, 0.24)
    _sky(brush, _shade(rng, (150, 218, 250)), horizon)
    _sun(brush, rng)
    sea = _shade(rng, (38, 132, 204))
    _gradient(brush, sea, lighter(sea, 0.35), horizon, shore)
    _ground(brush, _shade(rng, (246, 220, 156)), shore)
    waves = [(step / 8, shore + (0.012 if step % 2 else -0.012)) for step in range(9)]
    brush.stroke(curve(*waves), WHITE, 0.025)
    for _ in range(rng.randint(1, 3)):
        x, y = rng.choice([rng.uniform(0.04, 0.2), rng.uniform(0.8, 0.96)]), rng.uniform(shore + 0.1, 0.96)
        brush.fill(star(x, y, 0.04), (240, 130, 90), outlined=False)


def _snow(brush: Brush, rng: random.Random) -> None:
    horizon = rng.uniform(0.5, 0.62)
    _sky(brush, _shade(rng, (176, 194, 222)), horizon)
    for _ in range(rng.randint(2, 4)):
        _fir(brush, rng.uniform(0.02, 0.98), horizon + 0.02, rng.uniform(0.2, 0.34), _shade(rng, (66, 118, 104)))
    snow = _shade(rng, (232, 240, 250), 5)
    _hill(brush, rng, horizon + 0.03, darker(snow, 0.08))
    _ground(brush, snow, horizon + 0.02)
    for _ in range(22):
        brush.fill(ellipse(rng.random(), rng.random() * horizon, 0.011), WHITE, outlined=False)


def _street(brush: Brush, rng: random.Random) -> None:
    horizon = rng.uniform(0.52, 0.6)
    _sky(brush, _shade(rng, (190, 210, 224)), horizon)
    left = rng.uniform(-0.1, 0.0)
    while left < 1:
        right, roof = left + rng.uniform(0.2, 0.3), horizon - rng.uniform(0.2, 0.46)
        front = _shade(rng, rng.choice([(172, 116, 104), (196, 168, 136), (132, 146, 172)]))
        brush.fill(box(left, roof, right, horizon), front, outlined=False)
        _lit_windows(brush, left, roof, right, horizon, lighter(front, 0.55))
        left = right
    kerb = horizon + 0.06
    brush.fill(box(0, horizon, 1, kerb), (206, 202, 196), outlined=False)
    _ground(brush, _shade(rng, (98, 99, 108)), kerb)
    dashes, start = (kerb + 1) / 2, rng.uniform(-0.3, 0.0)
    for dash in range(5):
        brush.fill(box(start + 0.3 * dash, dashes, start + 0.3 * dash + 0.17, dashes + 0.035), WHITE, outlined=False)


def _room(brush: Brush, rng: random.Random) -> None:
    floor = rng.uniform(0.58, 0.66)
    wall = _shade(rng, rng.choice([(248, 228, 158), (186, 218, 240), (244, 196, 200), (200, 232, 196)]))
    brush.fill(box(0, 0, 1, floor), wall, outlined=False)
    for stripe in range(6):
        brush.fill(box(stripe / 6, 0, (stripe + 0.5) / 6, floor), darker(wall, 0.09), outlined=False)
    _window(brush, rng.choice([rng.uniform(0.05, 0.1), rng.uniform(0.58, 0.63)]), 0.08)
    boards = _shade(rng, rng.choice([(156, 84, 74), (94, 106, 152), (122, 92, 132)]))
    _ground(brush, boards, floor)
    brush.fill(box(0, floor - 0.02, 1, floor + 0.02), WHITE, outlined=False)
    brush.fill(ellipse(0.5, 0.9, 0.56, 0.13), lighter(boards, 0.45), outlined=False)


def _table(brush: Brush, rng: random.Random) -> None:
    edge = rng.uniform(0.52, 0.62)
    wall = _shade(rng, rng.choice([(226, 232, 222), (214, 226, 236), (238, 222, 226)]))
    _gradient(brush, darker(wall, 0.06), wall, 0, edge)
    wood = _shade(rng, (214, 156, 96))
    _ground(brush, wood, edge)
    seam = darker(wood, 0.35)
    brush.fill(box(0, edge, 1, edge + 0.025), lighter(wood, 0.35), outlined=False)
    for plank in range(-3, 5):
        near = 0.5 + (plank - 0.5) * 0.42
        brush.stroke([(0.5 + (near - 0.5) * 0.55, edge + 0.025), (near, 1.02)], seam, 0.01)


def _night(brush: Brush, rng: random.Random) -> None:
    horizon = rng.uniform(0.56, 0.66)
    sky = _shade(rng, (26, 30, 84))
    _gradient(brush, sky, mix(sky, (96, 92, 176), 0.7), 0, horizon)
    for _ in range(14):
        brush.fill(star(rng.random(), rng.random() * horizon * 0.9, 0.02), (255, 246, 190), outlined=False)
    x, y = rng.choice([rng.uniform(0.1, 0.22), rng.uniform(0.78, 0.9)]), rng.uniform(0.1, 0.2)
    brush.fill(ellipse(x, y, 0.085), (255, 246, 206), outlined=False)
    brush.fill(ellipse(x + 0.045, y - 0.02, 0.07), mix(sky, (96, 92, 176), 0.15), outlined=False)
    ground = _shade(rng, (40, 72, 84))
    _hill(brush, rng, horizon, darker(ground, 0.3))
    _ground(brush, ground, horizon)


_PAINTERS: dict[str, Callable[[Brush, random.Random], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "street": _street,
    "room": _room,
    "table": _table,
    "night": _night,
}


def _shade(rng: random.Random, colour: Colour, spread: int = 10) -> Colour:
    red, green, blue = (min(255, max(0, level + rng.randint(-spread, spread))) for level in colour)
    return red, green, blue


def _gradient(brush: Brush, upper: Colour, lower: Colour, top: float, bottom: float) -> None:
    bands = 16
    height = (bottom - top) / bands
    for band in range(bands):
        y = top + band * height
        brush.fill(box(0, y, 1, y + height), mix(upper, lower, band / (bands - 1)), outlined=False)


def _sky(brush: Brush, colour: Colour, horizon: float) -> None:
    _gradient(brush, colour, lighter(colour, 0.6), 0, horizon + 0.02)


def _ground(brush: Brush, colour: Colour, horizon: float) -> None:
    _gradient(brush, colour, darker(colour, 0.14), horizon, 1)


def _sun(brush: Brush, rng: random.Random) -> None:
    x, y = rng.choice([rng.uniform(0.08, 0.2), rng.uniform(0.8, 0.92)]), rng.uniform(0.1, 0.18)
    brush.fill(ellipse(x, y, 0.075), (255, 224, 88), outlined=False)


def _cloud(brush: Brush, x: float, y: float, radius: float) -> None:
    for shift, share in ((-1.2, 0.75), (0.0, 1.0), (1.2, 0.75)):
        brush.fill(ellipse(x + shift * radius, y, share * radius * 1.1, share * radius * 0.75), WHITE, outlined=False)


def _hill(brush: Brush, rng: random.Random, horizon: float, colour: Colour) -> None:
    brush.fill(dome(rng.uniform(0, 1), horizon, rng.uniform(0.3, 0.5), rng.uniform(0.08, 0.14)), colour, outlined=False)


def _fir(brush: Brush, x: float, foot: float, height: float, colour: Colour) -> None:
    top, width = foot - height, 0.36 * height
    brush.fill([(x, top), (x + width, foot), (x - width, foot)], colour, outlined=False)
    cap = [(x, top), (x + 0.45 * width, top + 0.45 * height), (x, top + 0.36 * height)]
    brush.fill([*cap, (x - 0.45 * width, top + 0.45 * height)], WHITE, outlined=False)


def _lit_windows(brush: Brush, left: float, roof: float, right: float, foot: float, colour: Colour) -> None:
    width = (right - left) / 5
    for row in range(int((foot - roof) / 0.12)):
        y = roof + 0.04 + 0.12 * row
        for x in (left + width, left + 3 * width):
            brush.fill(box(x, y, x + width, y + 0.06), colour, outlined=False)


def _window(brush: Brush, left: float, top: float) -> None:
    right, bottom = left + 0.32, top + 0.3
    brush.fill(box(left, top, right, bottom), WHITE)
    for x in (left + 0.025, left + 0.17):
        for y in (top + 0.025, top + 0.16):
            brush.fill(box(x, y, x + 0.125, y + 0.115), (146, 206, 246), outlined=False)
