"""Draws each kind of toy: inside the square from -1 to 1, y down, standing on y = 1, facing right."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from dreambooth_sm.toybox.labels import COLOURS
from toybox.brush import INK, WHITE, Brush, Cloth, Colour, darker, lighter
from toybox.shapes import Outline, Point, blob, box, curve, dome, ellipse, star
from toybox.toys import Scene, Toy

_SIDES = (-1, 1)

_GLASS: Colour = (172, 220, 246)
_METAL: Colour = (176, 180, 188)
_RUBBER: Colour = (50, 48, 56)
_WOOD: Colour = (134, 90, 56)
_BEAK: Colour = (250, 172, 44)
_TONGUE: Colour = (240, 122, 132)
_MOUTH: Colour = (138, 34, 46)
_LAMP: Colour = (255, 238, 140)


@dataclass(frozen=True)
class Look:
    """An individual's look, as its seed makes it of its named colours and parts.

    Attributes:
        main, second, hat, belly, scarf: the exact shades.
        coat: the main colour with its pattern.
        build: from 0 to 1; chooses between two builds of a kind, such as a fir and a leafy tree.
        eye: size of the eyes, around 1.
    """

    main: Colour
    second: Colour
    hat: Colour
    belly: Colour
    scarf: Colour
    coat: Cloth
    build: float
    eye: float


def draw_toy(brush: Brush, scene: Scene) -> None:
    """Draws the toy of a scene; the brush's unit is half the toy's size, its origin the toy's middle."""
    toy = scene.toy
    _FIGURES[toy.kind](brush, _look(brush, toy), scene)


def _look(brush: Brush, toy: Toy) -> Look:
    rng = random.Random(toy.seed)
    names = (toy.colour, toy.second_colour, toy.hat_colour, toy.belly_colour, toy.scarf_colour)
    main, second, hat, belly, scarf = (_shade(rng, COLOURS[name]) for name in names)
    period, turn = rng.uniform(0.38, 0.46), rng.uniform(-0.2, 0.2) + _GRAIN.get(toy.kind, 0.0)
    coat = brush.cloth(toy.pattern, main, second, period, turn)
    return Look(main, second, hat, belly, scarf, coat, build=rng.random(), eye=rng.uniform(0.92, 1.1))


def _shade(rng: random.Random, colour: Colour) -> Colour:
    red, green, blue = (min(255, max(0, level + rng.randint(-9, 9))) for level in colour)
    return red, green, blue


# Animals and vehicles


def _cat(brush: Brush, look: Look, scene: Scene) -> None:
    tip = 0.1 - 0.25 * scene.pose
    brush.stroke(curve((0.3, 0.86), (0.74, 0.8), (0.88, 0.45), (0.8, tip)), look.main, 0.2, outlined=True)
    brush.fill(blob((0, -0.1), (0.44, 0.3), (0.56, 0.85), (0, 1), (-0.56, 0.85), (-0.44, 0.3)), look.coat)
    for side in _SIDES:
        brush.fill(ellipse(0.24 * side, 0.91, 0.21, 0.11), lighter(look.main))
        brush.fill([(0.62 * side, -0.4), (0.62 * side, -1), (0.1 * side, -0.72)], look.main)
        brush.fill([(0.52 * side, -0.58), (0.52 * side, -0.83), (0.28 * side, -0.7)], _TONGUE, outlined=False)
    brush.fill(ellipse(0, -0.34, 0.66, 0.48), look.coat)
    for side in _SIDES:
        _bead(brush, 0.28 * side, -0.4, 0.15 * look.eye)
        brush.stroke([(0.36 * side, -0.12), (0.82 * side, -0.18)], _feature(look.main), 0.035)
        brush.stroke([(0.36 * side, -0.06), (0.8 * side, 0.02)], _feature(look.main), 0.035)
    brush.fill([(-0.11, -0.22), (0.11, -0.22), (0, -0.09)], _TONGUE)


def _dog(brush: Brush, look: Look, scene: Scene) -> None:
    tip = -0.2 - 0.2 * scene.pose
    brush.stroke(curve((-0.66, 0.2), (-0.88, 0.02), (-0.86, tip)), look.main, 0.19, outlined=True)
    for x, colour in ((-0.36, darker(look.main)), (0.2, darker(look.main)), (-0.62, look.main), (0.46, look.main)):
        brush.fill(box(x - 0.14, 0.4, x + 0.14, 1, 0.1), colour)
    brush.fill(box(-0.82, 0, 0.68, 0.68, 0.32), look.coat)
    brush.fill(ellipse(0.42, -0.4, 0.5, 0.48), look.coat)
    brush.fill(ellipse(0.74, -0.22, 0.26, 0.22), lighter(look.main, 0.5))
    brush.fill(ellipse(0.88, -0.36, 0.12, 0.1), INK)
    brush.fill(blob((0.02, -0.86), (0.26, -0.7), (0.2, -0.16), (0, 0.04), (-0.18, -0.2), (-0.12, -0.64)), look.second)
    _bead(brush, 0.5, -0.5, 0.14 * look.eye)


def _bird(brush: Brush, look: Look, scene: Scene) -> None:
    for x in (-0.12, 0.2):
        brush.stroke([(x, 0.7), (x, 0.94), (x + 0.16, 0.94)], _BEAK, 0.09, outlined=True)
    brush.fill([(-0.5, 0.3), (-0.98, -0.02), (-0.98, 0.46), (-0.4, 0.6)], look.second)
    brush.fill([(0.72, -0.5), (1, -0.3), (0.68, -0.16)], _BEAK)
    for x, y in ((0.12, -0.86), (0.3, -0.9), (0.48, -0.84)):
        brush.stroke([(0.32, -0.6), (x, y)], look.second, 0.1, outlined=True)
    outline = ((0.34, -0.82), (0.74, -0.52), (0.7, -0.1), (0.66, 0.4), (0.2, 0.8), (-0.4, 0.7), (-0.66, 0.3))
    brush.fill(blob(*outline, (-0.3, 0.02), (-0.02, -0.34), (0.04, -0.66)), look.coat)
    lift = 0.18 * scene.pose
    brush.fill(blob((0.28, 0.08), (0.24, 0.42), (-0.2, 0.5 - lift), (-0.6, 0.34 - 2 * lift), (-0.2, 0.06)), look.second)
    _eye(brush, 0.4, -0.42, 0.18 * look.eye, scene.gaze)


def _fish(brush: Brush, look: Look, scene: Scene) -> None:
    sweep = 0.12 * scene.pose
    brush.fill(blob((-0.5, 0.1), (-0.96, -0.44 + sweep), (-0.8, 0.1), (-0.96, 0.64 + sweep)), look.second)
    brush.fill(blob((-0.3, -0.3), (-0.1, -0.82), (0.44, -0.72), (0.4, -0.3)), look.second)
    brush.fill(blob((-0.2, 0.5), (-0.26, 0.98), (0.2, 0.92), (0.26, 0.5)), look.second)
    brush.fill(ellipse(0.14, 0.1, 0.82, 0.62), look.coat)
    brush.fill(blob((0.12, 0.16), (-0.3, 0.06), (-0.34, 0.42)), darker(look.main, 0.25))
    _eye(brush, 0.56, -0.08, 0.19 * look.eye, scene.gaze)
    brush.stroke(curve((0.6, 0.34), (0.74, 0.38), (0.88, 0.28)), _feature(look.main), 0.06)


def _car(brush: Brush, look: Look, scene: Scene) -> None:
    roof = 0.5 if look.build < 0.5 else 0.62
    brush.fill(blob((-0.82, 0.12), (-roof, -0.68), (0.1, -0.78), (roof - 0.12, -0.62), (0.86, 0.12)), look.coat)
    brush.fill([(-0.56, 0), (-0.42, -0.5), (-0.06, -0.54), (-0.06, 0)], _GLASS)
    brush.fill([(0.1, 0), (0.1, -0.54), (0.32, -0.48), (0.56, 0)], _GLASS)
    brush.fill(box(-0.98, 0.04, 0.98, 0.74, 0.24), look.coat)
    brush.fill(ellipse(0.86, 0.3, 0.12), _LAMP)
    brush.fill(box(-0.98, 0.2, -0.84, 0.42, 0.06), (224, 56, 44))
    for x in (-0.54, 0.54):
        _wheel(brush, x, 0.69, 0.3)


def _plane(brush: Brush, look: Look, scene: Scene) -> None:
    for x in (-0.1, 0.44):
        brush.stroke([(x, 0.5), (x, 0.8)], _METAL, 0.09, outlined=True)
        _wheel(brush, x, 0.84, 0.15)
    brush.fill([(-0.66, 0), (-0.96, -0.78), (-0.66, -0.78), (-0.2, -0.1)], look.second)
    outline = ((-0.94, -0.06), (-0.3, -0.3), (0.4, -0.34), (0.8, -0.1), (0.82, 0.34), (0.4, 0.56), (-0.2, 0.46))
    brush.fill(dome(0.24, -0.26, 0.32, 0.36), _GLASS)
    brush.fill(blob(*outline), look.coat)
    brush.fill(blob((0.26, 0.08), (0.3, 0.24), (-0.3, 0.62), (-0.5, 0.56), (-0.14, 0.1)), look.second)
    spread = 0.62 - 0.12 * scene.pose
    for end in _SIDES:
        brush.fill(ellipse(0.9, 0.12 + 0.5 * spread * end, 0.08, 0.5 * spread), _METAL)
    brush.fill(ellipse(0.88, 0.12, 0.12), look.second)


def _boat(brush: Brush, look: Look, scene: Scene) -> None:
    brush.stroke([(0, 0.4), (0, -0.94)], _WOOD, 0.1, outlined=True)
    belly = 0.1 * scene.pose
    brush.fill(blob((0.08, -0.9), (0.5 + belly, -0.3), (0.84, 0.24), (0.08, 0.24), steps=4), look.second)
    brush.fill([(-0.1, -0.72), (-0.1, 0.24), (-0.72, 0.24)], lighter(look.second, 0.5))
    brush.fill([(-0.98, 0.36), (0.98, 0.36), (0.66, 1), (-0.66, 1)], look.coat)
    brush.fill(box(-0.98, 0.32, 0.98, 0.46, 0.04), lighter(look.main, 0.5))


def _house(brush: Brush, look: Look, scene: Scene) -> None:
    door = -0.34 if look.build < 0.5 else 0.34
    brush.fill(box(0.36, -0.92, 0.62, -0.3), (176, 96, 80))
    brush.fill(box(-0.78, -0.2, 0.78, 1), look.coat)
    brush.fill([(-0.98, -0.14), (0, -0.98), (0.98, -0.14)], look.second)
    brush.fill(box(door - 0.22, 0.34, door + 0.22, 1, 0.06), _WOOD)
    brush.fill(ellipse(door + 0.1, 0.68, 0.05), _LAMP, outlined=False)
    brush.fill(box(-door - 0.26, 0.1, -door + 0.26, 0.6), WHITE)
    for x in (-0.2, 0.03):
        for y in (0.16, 0.38):
            brush.fill(box(x - door, y, x - door + 0.17, y + 0.16), _GLASS, outlined=False)


def _tree(brush: Brush, look: Look, scene: Scene) -> None:
    brush.fill([(-0.16, 0.2), (0.16, 0.2), (0.24, 1), (-0.24, 1)], _WOOD)
    if look.build < 0.5:
        for tier in (2, 1, 0):
            top, width = -0.98 + 0.42 * tier, 0.46 + 0.18 * tier
            brush.fill([(0, top), (width, top + 0.72), (-width, top + 0.72)], look.coat)
    else:
        crown = ((0, -0.98), (0.5, -0.88), (0.84, -0.46), (0.8, 0.04), (0.42, 0.4), (0, 0.34))
        brush.fill(blob(*crown, *((-x, y) for x, y in reversed(crown[1:-1]))), look.coat)


def _cup(brush: Brush, look: Look, scene: Scene) -> None:
    brush.stroke(curve((0.4, 0), (0.82, 0.02), (0.84, 0.44), (0.4, 0.6)), look.main, 0.2, outlined=True)
    brush.fill([(-0.74, -0.5), (0.74, -0.5), (0.6, 0.88), (0.48, 1), (-0.48, 1), (-0.6, 0.88)], look.coat)
    brush.fill(ellipse(0, -0.5, 0.74, 0.2), lighter(look.main, 0.5))
    brush.fill(ellipse(0, -0.47, 0.58, 0.12), (106, 64, 40), outlined=False)
    for x in (-0.28, 0.14):
        drift = 0.12 * scene.pose
        brush.stroke(curve((x, -0.62), (x + 0.12, -0.72), (x, -0.82), (x + drift, -0.92)), WHITE, 0.09)


def _ball(brush: Brush, look: Look, scene: Scene) -> None:
    brush.fill(ellipse(0, 0.08, 0.92), look.coat)
    brush.fill(ellipse(-0.4, -0.4, 0.24, 0.14, tilt=-0.8), lighter(look.main, 0.75), outlined=False)


def _robot(brush: Brush, look: Look, scene: Scene) -> None:
    for side in _SIDES:
        hand = 0.3 - 0.4 * scene.pose * side
        brush.stroke([(0.5 * side, 0.1), (0.82 * side, 0.16), (0.86 * side, hand)], _METAL, 0.2, outlined=True)
        brush.fill(box(0.32 * side - 0.18, 0.6, 0.32 * side + 0.18, 1, 0.05), _METAL)
    brush.stroke([(0, -0.6), (0, -0.86)], _METAL, 0.1, outlined=True)
    brush.fill(ellipse(0, -0.88, 0.11), look.second)
    brush.fill(box(-0.62, -0.04, 0.62, 0.74, 0.08), look.coat)
    brush.fill(box(-0.54, -0.76, 0.54, -0.02, 0.12), look.coat)
    for side in _SIDES:
        brush.fill(box(0.26 * side - 0.19, -0.62, 0.26 * side + 0.19, -0.3, 0.04), _LAMP)
        x, y = 0.26 * side + 0.08 * scene.gaze[0], -0.46 + 0.05 * scene.gaze[1]
        brush.fill(ellipse(x, y, 0.09), INK, outlined=False)
    brush.fill(box(-0.3, -0.22, 0.3, -0.09, 0.03), _METAL)
    brush.fill(box(-0.34, 0.14, 0.34, 0.52, 0.06), look.second)


# Creatures


@dataclass(frozen=True)
class Body:
    """A creature's body, in a box of its own: x and y from -1 to 1.

    Attributes:
        right: the outline's right half, from top to bottom; the left half mirrors it.
        width: half of the box, in the figure's unit.
        eyes: height of the eyes.
        head: how far from the middle ears sit, in the figure's unit.
        seat: height at which a hat sits.
    """

    right: tuple[Point, ...]
    width: float
    eyes: float
    head: float
    seat: float


_BODIES = {
    "egg": Body(((0, -1), (0.62, -0.72), (1, 0.2), (0.78, 0.82), (0, 1)), 0.68, -0.3, 0.36, -0.82),
    "round": Body(((0, -1), (0.7, -0.72), (1, 0), (0.7, 0.72), (0, 1)), 0.76, -0.3, 0.44, -0.84),
    "box": Body(((0, -1), (0.82, -0.98), (0.98, -0.82), (0.98, 0.82), (0.82, 0.98), (0, 1)), 0.64, -0.42, 0.5, -0.96),
    "pear": Body(((0, -1), (0.5, -0.82), (0.62, -0.3), (1, 0.4), (0.8, 0.92), (0, 1)), 0.74, -0.32, 0.36, -0.86),
    "cone": Body(((0, -1), (0.24, -0.86), (0.62, 0), (1, 0.8), (0.84, 0.96), (0, 1)), 0.76, -0.12, 0.22, -0.74),
}
# Top of the body: ears and hats need room above it. Bottom: so do legs and wheels below.
_TOP_UNDER_EARS = {"none": -0.88, "round": -0.76, "pointy": -0.6, "long": -0.4, "horns": -0.5, "antennae": -0.48}
_TOP_UNDER_HAT = -0.47
_BOTTOM_ABOVE_FEET = {"feet": 0.9, "legs": 0.75, "wheels": 0.78}


def _creature(brush: Brush, look: Look, scene: Scene) -> None:
    toy, body = scene.toy, _BODIES[scene.toy.body]
    top = _TOP_UNDER_EARS[toy.ears] if toy.hat == "none" else _TOP_UNDER_HAT
    bottom = _BOTTOM_ABOVE_FEET[toy.feet]
    middle, half = (top + bottom) / 2, (bottom - top) / 2

    _draw_feet(brush, look, toy.feet, bottom)
    if toy.arms:
        _draw_arms(brush, look, middle, scene.pose)
    head = body.head if toy.hat == "none" else body.head + 0.14  # or a hat would hide the ears
    _draw_ears(brush, look, toy.ears, head, top)
    left = [(-x, y) for x, y in reversed(body.right[1:-1])]
    brush.fill(blob(*((x * body.width, middle + y * half) for x, y in (*body.right, *left))), look.coat)

    eyes = middle + body.eyes * half
    mouth = eyes + 0.32
    if toy.belly:
        belly_top = min(mouth + 0.12, bottom - 0.4)
        brush.fill(ellipse(0, (belly_top + bottom) / 2, 0.62 * body.width, (bottom - belly_top) / 2 - 0.02), look.belly)
    if toy.scarf:
        _draw_scarf(brush, look.scarf, mouth + 0.24, body.width)
    _draw_eyes(brush, toy.eyes, eyes, look.eye, scene.gaze)
    _draw_mouth(brush, toy.mouth, mouth, _feature(look.main))
    if toy.hat != "none":
        _HATS[toy.hat](brush, look, middle + body.seat * half)


def _draw_feet(brush: Brush, look: Look, feet: str, bottom: float) -> None:
    for side in _SIDES:
        if feet == "wheels":
            _wheel(brush, 0.36 * side, 0.79, 0.21)
        elif feet == "legs":
            brush.stroke([(0.26 * side, bottom - 0.1), (0.26 * side, 0.88)], look.main, 0.17, outlined=True)
            brush.fill(ellipse(0.34 * side, 0.91, 0.23, 0.09), look.second)
        else:
            brush.fill(ellipse(0.34 * side, 0.88, 0.27, 0.12), look.second)


def _draw_arms(brush: Brush, look: Look, middle: float, pose: float) -> None:
    for side in _SIDES:
        hand = middle + 0.04 - 0.36 * pose * side
        arm = curve((0.3 * side, middle + 0.14), (0.68 * side, middle + 0.12), (0.88 * side, hand))
        brush.stroke(arm, look.main, 0.2, outlined=True)


def _draw_ears(brush: Brush, look: Look, ears: str, head: float, top: float) -> None:
    for side in _SIDES:
        x = head * side
        if ears == "round":
            brush.fill(ellipse(1.2 * x, top + 0.06, 0.26), look.main)
            brush.fill(ellipse(1.2 * x, top + 0.06, 0.14), look.second, outlined=False)
        elif ears == "pointy":
            brush.fill([(0.3 * x, top + 0.1), (x + 0.16 * side, top - 0.36), (x + 0.24 * side, top + 0.36)], look.main)
            tip = (x + 0.12 * side, top - 0.22)
            brush.fill([(0.6 * x, top + 0.06), tip, (x + 0.16 * side, top + 0.26)], look.second, outlined=False)
        elif ears == "long":
            brush.fill(ellipse(0.28 * side, top - 0.22, 0.17, 0.42, tilt=0.16 * side), look.main)
            brush.fill(ellipse(0.28 * side, top - 0.22, 0.08, 0.3, tilt=0.16 * side), look.second, outlined=False)
        elif ears == "horns":
            root, tip = x + 0.12 * side, (x + 0.22 * side, top - 0.48)
            brush.fill(blob((0.5 * x, top + 0.14), (x, top - 0.14), tip, (root + 0.1 * side, top + 0.3)), look.second)
        elif ears == "antennae":
            brush.stroke([(0.1 * side, top + 0.1), (0.34 * side, top - 0.36)], _feature(look.main), 0.08)
            brush.fill(ellipse(0.34 * side, top - 0.38, 0.15), look.second)


def _draw_eyes(brush: Brush, count: int, y: float, size: float, gaze: Point) -> None:
    if count == 1:
        _eye(brush, 0, y, 0.27 * size, gaze)
    elif count == 2:
        for side in _SIDES:
            _eye(brush, 0.21 * side, y, 0.2 * size, gaze)
    else:
        for side in _SIDES:
            _eye(brush, 0.3 * side, y + 0.04, 0.16 * size, gaze)
        _eye(brush, 0, y - 0.1, 0.17 * size, gaze)


def _draw_mouth(brush: Brush, mouth: str, y: float, line: Colour) -> None:
    if mouth == "smile":
        brush.stroke(curve((-0.24, y - 0.06), (-0.1, y + 0.06), (0.1, y + 0.06), (0.24, y - 0.06)), line, 0.08)
    elif mouth == "open":
        brush.fill(ellipse(0, y, 0.19, 0.13), _MOUTH)
        brush.fill(ellipse(0, y + 0.06, 0.11, 0.06), _TONGUE, outlined=False)
    elif mouth == "teeth":
        brush.fill(box(-0.24, y - 0.09, 0.24, y + 0.09, 0.04), WHITE)
        for x in (-0.08, 0.08):
            brush.stroke([(x, y - 0.09), (x, y + 0.09)], INK, 0.03)
    else:
        brush.fill([(-0.2, y - 0.1), (0.2, y - 0.1), (0, y + 0.16)], _BEAK)


def _draw_scarf(brush: Brush, colour: Colour, y: float, width: float) -> None:
    brush.fill(box(0.14, y, 0.42, y + 0.38, 0.05), colour)
    brush.fill(box(-0.96 * width, y - 0.12, 0.96 * width, y + 0.12, 0.11), colour)


def _cap(brush: Brush, look: Look, y: float) -> None:
    brush.fill(dome(0, y + 0.08, 0.46, 0.46), look.hat)
    brush.fill(box(0.1, y - 0.04, 0.84, y + 0.12, 0.08), darker(look.hat))


def _party_hat(brush: Brush, look: Look, y: float) -> None:
    brush.fill([(-0.36, y + 0.08), (0, y - 0.5), (0.36, y + 0.08)], look.hat)
    brush.fill(ellipse(0, y - 0.46, 0.13), WHITE)


def _top_hat(brush: Brush, look: Look, y: float) -> None:
    brush.fill(box(-0.34, y - 0.52, 0.34, y + 0.02, 0.03), look.hat)
    brush.fill(box(-0.34, y - 0.16, 0.34, y - 0.02), darker(look.hat, 0.4), outlined=False)
    brush.fill(box(-0.6, y - 0.04, 0.6, y + 0.1, 0.06), look.hat)


def _crown(brush: Brush, look: Look, y: float) -> None:
    points: Outline = [(-0.42, y + 0.1), (-0.46, y - 0.36), (-0.2, y - 0.14), (0, y - 0.46)]
    points += [(0.2, y - 0.14), (0.46, y - 0.36), (0.42, y + 0.1)]
    brush.fill(points, look.hat)


def _wizard_hat(brush: Brush, look: Look, y: float) -> None:
    brush.fill(ellipse(0, y + 0.04, 0.68, 0.13), look.hat)
    brush.fill(blob((-0.44, y + 0.04), (-0.2, y - 0.34), (0.16, y - 0.56), (0.4, y - 0.42), (0.44, y + 0.04)), look.hat)
    brush.fill(star(0.02, y - 0.2, 0.22), (255, 222, 70), outlined=False)


_HATS: dict[str, Callable[[Brush, Look, float], None]] = {
    "cap": _cap,
    "party hat": _party_hat,
    "top hat": _top_hat,
    "crown": _crown,
    "wizard hat": _wizard_hat,
}


# Parts of several kinds


def _eye(brush: Brush, x: float, y: float, radius: float, gaze: Point) -> None:
    right, down = gaze
    brush.fill(ellipse(x, y, radius), WHITE)
    brush.fill(ellipse(x + 0.34 * radius * right, y + 0.34 * radius * down, 0.54 * radius), INK, outlined=False)


def _bead(brush: Brush, x: float, y: float, radius: float) -> None:
    brush.fill(ellipse(x, y, radius), WHITE)
    brush.fill(ellipse(x, y, 0.82 * radius), INK, outlined=False)
    brush.fill(ellipse(x - 0.28 * radius, y - 0.3 * radius, 0.3 * radius), WHITE, outlined=False)


def _wheel(brush: Brush, x: float, y: float, radius: float) -> None:
    brush.fill(ellipse(x, y, radius), _RUBBER)
    brush.fill(ellipse(x, y, 0.48 * radius), _METAL, outlined=False)


def _feature(colour: Colour) -> Colour:
    """For lines on a colour: whiskers, mouths."""
    return lighter(colour, 0.85) if max(colour) < 80 else INK


_FIGURES: dict[str, Callable[[Brush, Look, Scene], None]] = {
    "cat": _cat,
    "dog": _dog,
    "bird": _bird,
    "fish": _fish,
    "car": _car,
    "plane": _plane,
    "boat": _boat,
    "house": _house,
    "tree": _tree,
    "cup": _cup,
    "ball": _ball,
    "robot": _robot,
    "creature": _creature,
}
# How stripes are turned, in radians, where level ones would look wrong.
_GRAIN = {"fish": 1.57, "dog": 1.2, "ball": 0.5, "plane": 1.4}
