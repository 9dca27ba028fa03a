"""A roofline: how long a step takes on a card, by what it computes and moves, and by the card's data sheet.

``python -m benchmarks.roofline`` counts operations and bytes, and fits what cards reach of their data sheets to what
was measured (``measured/roofline.json``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from dreambooth_sm.planning.figures import figure, figures_below


@dataclass(frozen=True)
class Reached:
    """What is reached of a data sheet.

    Attributes:
        arithmetic, bandwidth: shares of 16-bit arithmetic and of memory bandwidth.
        launch_s: seconds of a launch, on any card.
    """

    arithmetic: float
    bandwidth: float
    launch_s: float


def seconds(work: Mapping[str, float], card: str, reached: Reached) -> float:
    """Seconds of a step on a card.

    Args:
        work: ``launches``; and of each group of operations ``GROUP.tflop`` and ``GROUP.gb``, of which the one that
            takes longer counts.
    """
    tflops = figure("cards", f"{card}.tflops") * reached.arithmetic
    gb_per_s = figure("cards", f"{card}.tb_per_s") * 1e3 * reached.bandwidth
    groups = {name.partition(".")[0] for name in work if "." in name}
    longest = (max(work[f"{group}.tflop"] / tflops, work[f"{group}.gb"] / gb_per_s) for group in groups)
    return sum(longest) + work["launches"] * reached.launch_s


@functools.cache
def slowdown(card: str, family: str, *, whole: bool, base: str) -> float:
    """By how much a step is slower on a card than on another one.

    Args:
        family: of the base model.
        whole: whether all of the denoiser is trained, or something beside it.
        base: the other card.
    """
    work = figures_below("roofline", f"{family}.{'whole' if whole else 'beside'}.")
    reached = Reached(**figures_below("roofline", "reached."))
    return seconds(work, card, reached) / seconds(work, base, reached)
