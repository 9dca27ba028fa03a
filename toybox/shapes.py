"""Outlines as lists of points, in whatever unit the caller draws in; y points down."""

from __future__ import annotations

import math

Point = tuple[float, float]
Outline = list[Point]


def ellipse(x: float, y: float, width: float, height: float | None = None, *, tilt: float = 0.0) -> Outline:
    """An ellipse around (x, y) from its half axes; a circle where the height is left out. The tilt is in radians."""
    height = width if height is None else height
    points = [(width * math.cos(turn), height * math.sin(turn)) for turn in _turns(28)]
    return [moved(point, (x, y), tilt) for point in points]


def dome(x: float, y: float, width: float, height: float) -> Outline:
    """The upper half of an ellipse around (x, y), from its half axes."""
    return [(x + width * math.cos(turn), y - height * math.sin(turn)) for turn in _turns(28) if turn <= math.pi] + [
        (x - width, y)
    ]


def box(left: float, top: float, right: float, bottom: float, corner: float = 0.0) -> Outline:
    """A box with rounded corners of the given radius."""
    if not corner:
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    centres = [(right - corner, bottom - corner), (left + corner, bottom - corner)]
    centres += [(left + corner, top + corner), (right - corner, top + corner)]
    return [
        (
            x + corner * math.cos((quarter + step / 5) * math.pi / 2),
            y + corner * math.sin((quarter + step / 5) * math.pi / 2),
        )
        for quarter, (x, y) in enumerate(centres)
        for step in range(6)
    ]


def blob(*points: Point, steps: int = 6) -> Outline:
    """A smooth closed outline through the points (Catmull-Rom)."""
    count = len(points)
    return [
        spot
        for at in range(count)
        for spot in _arc(points[at - 1], points[at], points[(at + 1) % count], points[(at + 2) % count], steps)
    ]


def curve(*points: Point, steps: int = 6) -> Outline:
    """A smooth open line through the points (Catmull-Rom)."""
    ends = [points[0], *points, points[-1]]
    return [
        spot
        for at in range(len(points) - 1)
        for spot in _arc(ends[at], ends[at + 1], ends[at + 2], ends[at + 3], steps)
    ] + [points[-1]]


def star(x: float, y: float, radius: float) -> Outline:
    """A star of five points, one of them up."""
    return [
        (x + reach * math.sin(turn), y - reach * math.cos(turn))
        for turn, reach in zip(_turns(10), [radius, 0.45 * radius] * 5, strict=True)
    ]


def moved(point: Point, to: Point, tilt: float) -> Point:
    """A point turned about the origin, clockwise in radians, then shifted."""
    (x, y), cos, sin = point, math.cos(tilt), math.sin(tilt)
    return to[0] + x * cos - y * sin, to[1] + x * sin + y * cos


def _turns(count: int) -> list[float]:
    return [2 * math.pi * step / count for step in range(count)]


def _arc(before: Point, start: Point, end: Point, after: Point, steps: int) -> Outline:
    """From ``start`` to just before ``end``."""

    def between(a: float, b: float, c: float, d: float, t: float) -> float:
        return b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - a - 3 * c + d)))

    times = [step / steps for step in range(steps)]
    xs, ys = zip(before, start, end, after, strict=True)
    return [(between(*xs, t), between(*ys, t)) for t in times]
