"""Aspect-ratio buckets: in which shape each picture is trained on, so that little of it is cut off. No torch.

The idea is NovelAI's ("Improvements on Stable Diffusion", 2022). A shape has at most ``resolution`` squared pixels, so
that the plan's memory holds for all of them, and at least 90 % of that. Each picture gets the shape that shows most of
it. As every shape costs a CUDA graph, one is kept only where it earns its place: :func:`plan_buckets`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from dreambooth_sm.data.pictures import Shape

# Share of resolution squared that a shape has at least.
FEWEST_PIXELS = 0.9
# What a shape has to spare from being cut off, in whole pictures, or as a share of all pictures if that is more.
_WORTH = 0.1
_WORTH_SHARE = 0.01


def shapes_for(resolution: int, step: int) -> list[Shape]:
    """The square, and the highest shape of each width and the widest of each height, of sides that are multiples of
    ``step`` and at least half of ``resolution``."""
    sides = [side for side in range(step, 2 * resolution + 1, step) if 2 * side >= resolution]
    pairs = [(side, resolution**2 // side // step * step) for side in sides]
    tall = {pair for pair in pairs if pair[0] * pair[1] >= FEWEST_PIXELS * resolution**2 and 2 * pair[1] >= resolution}
    return sorted({(resolution, resolution), *tall, *((height, width) for width, height in tall)})


def shown(size: Shape, shape: Shape) -> float:
    """The share of a picture of ``size`` that is seen in ``shape``, from 0 to 1."""
    ratio = size[0] * shape[1] / (size[1] * shape[0])
    return min(ratio, 1 / ratio)


def enlargement(size: Shape, shape: Shape) -> float:
    """Returns by how much each side of a picture of ``size`` grows to cover ``shape``; below 1, it shrinks."""
    return max(shape[0] / size[0], shape[1] / size[1])


def plan_buckets(sizes: Sequence[Shape], resolution: int, step: int) -> list[Shape]:
    """The shape that each picture is trained in.

    First each picture has the shape that shows most of it. Then the shape that is missed least is given up, and its
    pictures go to the next best one, as long as no more than a tenth of a picture in all (or 1 % of all pictures, if
    that is more) is cut off by it. A picture is never enlarged more than the square crop would enlarge it.

    Args:
        sizes: width and height of each picture.

    Returns:
        width and height for each picture, from :func:`shapes_for`.
    """
    shapes = shapes_for(resolution, step)
    square = (resolution, resolution)
    price = max(_WORTH, _WORTH_SHARE * len(sizes))
    kinds = Counter(sizes)  # pictures of one size are planned once
    ranked = {
        size: sorted(
            (shape for shape in shapes if enlargement(size, shape) <= max(1.0, enlargement(size, square))),
            key=lambda shape: (shown(size, shape), shape[0] * shape[1], shape),
            reverse=True,
        )
        for size in kinds
    }
    used = {ranking[0] for ranking in ranked.values()}
    ranked = {size: [shape for shape in ranking if shape in used] for size, ranking in ranked.items()}
    while len(used) > 1:
        cost = dict.fromkeys(sorted(used), 0.0)
        for size, count in kinds.items():
            first, *others = (shape for shape in ranked[size] if shape in used)
            cost[first] += count * (shown(size, first) - shown(size, others[0])) if others else math.inf
        spared, least = min((spared, shape) for shape, spared in cost.items())
        if spared > price:
            break
        used.discard(least)
    return [next(shape for shape in ranked[size] if shape in used) for size in sizes]


def class_shapes(instances: Sequence[Shape], count: int) -> list[Shape]:
    """The shape that each class picture has to have: class pictures share batches with instance pictures.

    The shapes in use get class pictures in proportion to their instance pictures, each one at first. Picture k's shape
    does not depend on ``count``.

    Args:
        instances: the shape of each instance picture, as :func:`plan_buckets` gives them.

    Returns:
        ``count`` shapes.
    """
    share = {shape: number / len(instances) for shape, number in sorted(Counter(instances).items())}
    given: Counter[Shape] = Counter()
    chosen: list[Shape] = []
    for number in range(1, count + 1):
        chosen.append(max(share, key=lambda shape: (given[shape] == 0, share[shape] * number - given[shape], shape)))
        given[chosen[-1]] += 1
    return chosen


def assign(sizes: Sequence[Shape], shapes: Sequence[Shape]) -> list[Shape]:
    """Gives each class picture one of ``shapes`` (as many as pictures), so that those that suit it best come first.

    Args:
        sizes: width and height of each picture.

    Returns:
        the same shapes, in the order of the pictures.
    """
    left = Counter(shapes)
    pairs = [(-shown(size, shape), number, shape) for number, size in enumerate(sizes) for shape in left]
    result: dict[int, Shape] = {}
    for _, number, shape in sorted(pairs):
        if number not in result and left[shape]:
            result[number] = shape
            left[shape] -= 1
    return [result[number] for number in range(len(sizes))]
