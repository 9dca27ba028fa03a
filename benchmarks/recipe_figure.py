"""The recipes of :mod:`benchmarks.recipes` as points in a figure: what is learned against what is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.recipe_table import Line

# Pixels: the width of the figure, the heights of its panels, and the room for axes and headings.
_WIDTH, _HEIGHTS, _MARGIN = 900, (360, 620), 60
# The second panel shows what is as near to the reference as this, in similarity and in kept diversity.
_NEAR = (0.12, 0.045)
_LETTER, _LINE, _DOT = 6.0, 12.0, 3.5


@dataclass(frozen=True)
class _Box:
    """A rectangle that is taken."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


@dataclass(frozen=True)
class _Panel:
    """Two axes with round numbers, and where they lie in the figure."""

    across: Sequence[float]
    up: Sequence[float]
    top: float
    height: float

    def place(self, similarity: float, kept: float) -> tuple[float, float]:
        right = (similarity - self.across[0]) / (self.across[-1] - self.across[0]) * (_WIDTH - 2 * _MARGIN)
        above = (kept - self.up[0]) / (self.up[-1] - self.up[0]) * (self.height - 2 * _MARGIN)
        return round(_MARGIN + right, 1), round(self.top + self.height - _MARGIN - above, 1)


def svg(lines: Sequence[Line], reference: str) -> str:
    """Points of similarity to the subject (x) and kept diversity of the class (y), with their standard errors: all of
    them, and those near the reference once more, enlarged. Names stand where there is room, and in all points' titles.
    """
    (middle,) = (line for line in lines if line.recipe == reference)
    centre = _point(middle)
    near = [line for line in lines if all(abs(a - b) <= c for a, b, c in zip(_point(line), centre, _NEAR, strict=True))]
    far = [line for line in lines if line not in near or line is middle]
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {sum(_HEIGHTS)}" font-family="sans-serif" '
        'font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    drawn += _drawn("all recipes", lines, far, reference, 0, _HEIGHTS[0])
    drawn += _drawn(f"near {reference}, enlarged", near, near, reference, _HEIGHTS[0], _HEIGHTS[1])
    return "\n".join([*drawn, "</svg>\n"])


def _drawn(
    heading: str, lines: Sequence[Line], named: Sequence[Line], reference: str, top: float, height: float
) -> list[str]:
    """A panel."""
    xs, ys = zip(*(_point(line) for line in lines), strict=True)
    panel = _Panel(_axis(xs), _axis(ys), top, height)
    drawn = [
        f'<text x="{_WIDTH / 2}" y="{top + 30}" text-anchor="middle" font-weight="bold">{escape(heading)}</text>',
        *_axes(panel),
    ]
    taken = []
    for line in lines:
        x, y = panel.place(*_point(line))
        taken.append(_Box(x - _DOT, y - _DOT, x + _DOT, y + _DOT))
        errors = [line.figures[name].deviation / math.sqrt(line.runs) for name in ("subject", "kept")]
        low, high = (
            panel.place(*(mean + sign * error for mean, error in zip(_point(line), errors, strict=True)))
            for sign in (-1, 1)
        )
        colour = "#c00" if line.recipe == reference else "#06c"
        drawn.append(f'<path d="M{low[0]} {y}H{high[0]}M{x} {low[1]}V{high[1]}" stroke="{colour}" opacity="0.2"/>')
        drawn.append(
            f'<circle cx="{x}" cy="{y}" r="{_DOT}" fill="{colour}"><title>{escape(line.recipe)}</title></circle>'
        )
    # Those that differ most from the reference find room first.
    for line in sorted(named, key=lambda line: (line.recipe != reference, _likeness(line))):
        drawn += _name(line.recipe, panel.place(*_point(line)), taken)
    return drawn


def _likeness(line: Line) -> float:
    """How little a recipe's point differs from the reference's, of what is beyond noise."""
    figures = [line.figures[name] for name in ("subject", "kept", "score")]
    return -max((abs(figure.difference) for figure in figures if not figure.is_noise), default=0.0)


def _name(text: str, point: tuple[float, float], taken: list[_Box]) -> list[str]:
    """The name of a point at the first place beside it that is free, which is taken then; nothing where none is."""
    (x, y), width = point, _LETTER * len(text)
    away = _DOT + 3
    places = [
        ("start", x + away, y + 4),
        ("end", x - away, y + 4),
        ("middle", x, y - away),
        ("middle", x, y + away + 8),
    ]
    for anchor, left, base in places:
        start = left - {"start": 0, "middle": width / 2, "end": width}[anchor]
        box = _Box(start, base - _LINE + 2, start + width, base + 2)
        if not any(box.meets(other) for other in taken) and box.left > 0 and box.right < _WIDTH:
            taken.append(box)
            return [f'<text x="{left}" y="{base}" text-anchor="{anchor}">{escape(text)}</text>']
    return []


def _axes(panel: _Panel) -> list[str]:
    drawn = []
    for value in panel.across:
        x, y = panel.place(value, panel.up[0])
        drawn.append(f'<path d="M{x} {y}V{panel.top + _MARGIN}" stroke="#ddd"/>')
        drawn.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{value:.2f}</text>')
    for value in panel.up:
        x, y = panel.place(panel.across[0], value)
        drawn.append(f'<path d="M{x} {y}H{_WIDTH - _MARGIN}" stroke="#ddd"/>')
        drawn.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{value:.0%}</text>')
    bottom, middle = panel.top + panel.height, panel.top + panel.height / 2
    drawn.append(f'<text x="{_WIDTH / 2}" y="{bottom - 24}" text-anchor="middle">similarity to the subject</text>')
    drawn.append(
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">'
        "diversity of the class, of the base model's</text>"
    )
    return drawn


def _point(line: Line) -> tuple[float, float]:
    return line.figures["subject"].mean, line.figures["kept"].mean


def _axis(values: Sequence[float]) -> list[float]:
    """Round numbers from below all values to above them."""
    low, high = min(values), max(values)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if high - low < 10 * step or step == 0.2)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
