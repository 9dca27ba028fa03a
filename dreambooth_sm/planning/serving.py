"""Memory of a server, and with it how many pictures it can draw at a time on a card."""

from __future__ import annotations

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import Card
from dreambooth_sm.planning.memory import sampling_peak_gb


def serving_peak_gb(pictures: int, h: Hyperparameters) -> float:
    """Highest allocation while pictures are drawn together, in GB: all parts of the model stay on the card.

    Args:
        pictures: drawn at a time, of the size that the model was trained on.
        h: what the model was trained with.
    """
    model = h.facts.footprint
    # What draws class images lets go of these before.
    kept = 2e-3 * model.text_read if model.has_language_model else 0.0
    return sampling_peak_gb(pictures, h) + kept


def pictures_at_a_time(h: Hyperparameters, card: Card, most: int) -> int:
    """The largest number of pictures, up to ``most``, that fits a card; 0 where not even one does, or where it has no
    bf16 and the model needs that."""
    if h.facts.overflows and not card.has_bf16:
        return 0
    return next((n for n in range(most, 0, -1) if serving_peak_gb(n, h) <= card.budget_gb), 0)


def why_none(h: Hyperparameters, card: Card) -> str:
    """Why a card draws no picture."""
    if h.facts.overflows and not card.has_bf16:
        return f"{card.name} has no bf16, which {h.facts.title} needs"
    return f"a picture takes {serving_peak_gb(1, h):.1f} GB, and {card.name} has {card.budget_gb:.1f}"
