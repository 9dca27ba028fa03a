"""Ladders of settings: the VRAM tiers. Each method has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["fp32", "master", "residual", "stochastic"]
BaseWeights = Literal["plain", "int8", "nf4"]
Optimizer = Literal["adamw", "adamw8bit", "blockwise", "adafactor", "lion", "prodigy", "schedule_free"]


@dataclass(frozen=True)
class Rung:
    """One line of the ladder of settings.

    Attributes:
        from_gib: smallest card that this rung is for, as its driver reports it; below, the memory goes to headroom.
        weights: ``master``: 16-bit weights, which are rounded copies of fp32 ones; ``residual``: 16-bit weights, and a
            16-bit residual that stands in for an fp32 master; ``stochastic``: 16-bit weights alone, rounded
            stochastically.
        state_bits: bits of each of Adam's two moments.
        keeps_gradients: gradients are kept until the end of the backward pass, and can be clipped; otherwise each
            parameter is updated, and its gradient dropped, inside the backward pass.
        optimizer, base_weights: see :class:`~dreambooth_sm.planning.plan.Plan`.
    """

    name: str
    from_gib: float
    weights: Weights
    state_bits: Literal[4, 8, 32]
    keeps_gradients: bool
    gradient_checkpointing: bool
    train_text_encoder: bool
    use_ema: bool
    optimizer: Optimizer = "blockwise"
    base_weights: BaseWeights = "plain"
