"""The ladders of settings: the VRAM tiers, for each method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["fp32", "residual", "stochastic"]


@dataclass(frozen=True)
class Rung:
    """One line of the ladder of settings.

    Attributes:
        from_gib: smallest card that this rung is for, as its driver reports it; below, the memory goes to headroom.
        weights: ``residual``: 16-bit weights, and a 16-bit residual that stands in for an fp32 master;
            ``stochastic``: 16-bit weights alone, rounded stochastically.
        state_bits: bits of each of Adam's two moments.
        keeps_gradients: gradients are kept until the end of the backward pass, and can be clipped; otherwise each
            parameter is updated, and its gradient dropped, inside the backward pass.
    """

    name: str
    from_gib: float
    weights: Weights
    state_bits: Literal[4, 8]
    keeps_gradients: bool
    gradient_checkpointing: bool
    train_text_encoder: bool
    use_ema: bool


# From the most generous to the smallest. A card gets the first rung that it is large enough for and whose predicted
# peak fits: 40 GB cards and up `roomy`, A10G and L4 `large`, T4 to 10 GB `medium`, 8 GB `small`, 6 GB `tight`, and
# 4 GB `tiny`.
_FULL = (
    #     name      GiB  weights      bits  keeps grads  checkpoints  text encoder  EMA
    Rung("roomy", 36, "residual", 8, True, False, True, True),
    Rung("large", 20, "residual", 8, False, False, True, True),
    Rung("medium", 0, "residual", 8, False, False, True, False),
    Rung("small", 0, "residual", 8, False, True, True, False),
    Rung("lean", 0, "residual", 8, False, True, False, False),
    Rung("tight", 0, "stochastic", 8, False, True, False, False),
    Rung("tiny", 0, "stochastic", 4, False, True, False, False),
)
# By the name of the method.
LADDERS: dict[str, tuple[Rung, ...]] = {"full": _FULL}
