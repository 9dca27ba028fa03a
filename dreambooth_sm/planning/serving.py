"""Memory of a server, and with it how many pictures it can draw at a time on a card, and whether by CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import Card
from dreambooth_sm.planning.memory import decoding_gb, drawn_gb, sampling_models_gb


@dataclass(frozen=True)
class ServingPlan:
    """What a server draws with on a card.

    Attributes:
        pictures: at a time.
        has_graphs: whether each step is one CUDA graph.
        most_by_graphs: pictures at a time that they have room for; 0 for none.
        peak_gb: highest allocation, predicted.
    """

    pictures: int
    has_graphs: bool
    most_by_graphs: int
    peak_gb: float

    def notes(self) -> list[str]:
        """What people should know of it."""
        if self.has_graphs:
            return []
        advice = f"; batch={self.most_by_graphs} leaves it" if self.most_by_graphs else ""
        return [f"steps are drawn without CUDA graphs, which is slower: their memory has no room on the card{advice}"]


def padded(rows: int) -> int:
    """The number of rows that a batch is computed with by a graph: the next power of two, or half more than one."""
    power = 1 << (rows - 1).bit_length()
    between = power * 3 // 4
    return between if rows <= between and power >= 16 else power


def serving_peak_gb(pictures: int, h: Hyperparameters, *, has_graphs: bool = False) -> float:
    """Highest allocation while pictures are drawn together, in GB: all parts of the model stay on the card.

    Without graphs, the activations of a step and of the VAE's decoding take turns. With them, those of the largest step
    are held in the graphs' pool, which smaller ones share, and what is computed kernel by kernel comes beside it: the
    VAE's decoding of one picture, or the first run of the next smaller step before that is captured. Text encoders
    take less than either.

    A picture's activations and the VAE's are figures (``drawn_gb``, ``decoding_gb``; their sources say which of them
    were measured). That a row takes an equal share of them, and that a pool takes what its largest step does, is
    arithmetic: no server's graphs were measured for it.

    Args:
        pictures: drawn at a time, of the size that the model was trained on.
        h: what the model was trained with.
    """
    model = h.facts.footprint
    # What draws class images lets go of these before.
    language_model = 2e-3 * model.text_read if model.has_language_model else 0.0
    stays, decoding = sampling_models_gb(h) + language_model, decoding_gb(h)
    if not has_graphs:
        return stays + max(pictures * drawn_gb(h), decoding)
    rows_each = 1 if h.facts.drawing.told else 2
    largest = padded(pictures * rows_each)
    smaller = max((rows for rows in map(padded, range(1, largest)) if rows < largest), default=0)
    row_gb = drawn_gb(h) / rows_each
    return stays + largest * row_gb + max(smaller * row_gb, decoding)


def serving_plan(h: Hyperparameters, card: Card, most: int) -> ServingPlan | None:
    """How up to ``most`` pictures are drawn at a time on a card; None where not even one is.

    As the server does where memory runs out, it gives up graphs first, and pictures at a time after that.
    """
    pictures = pictures_at_a_time(h, card, most)
    if not pictures:
        return None
    by_graphs = _fitting(h, card, pictures, has_graphs=True)
    has_graphs = by_graphs == pictures
    return ServingPlan(pictures, has_graphs, by_graphs, serving_peak_gb(pictures, h, has_graphs=has_graphs))


def pictures_at_a_time(h: Hyperparameters, card: Card, most: int) -> int:
    """The largest number of pictures, up to ``most``, that fits a card; 0 where not even one does, or where it has no
    bf16 and the model needs that."""
    if h.facts.overflows and not card.has_bf16:
        return 0
    return _fitting(h, card, most)


def _fitting(h: Hyperparameters, card: Card, most: int, *, has_graphs: bool = False) -> int:
    fits = (n for n in range(most, 0, -1) if serving_peak_gb(n, h, has_graphs=has_graphs) <= card.budget_gb)
    return next(fits, 0)


def why_none(h: Hyperparameters, card: Card) -> str:
    """Why a card draws no picture."""
    if h.facts.overflows and not card.has_bf16:
        return f"{card.name} has no bf16, which {h.facts.title} needs"
    return f"a picture takes {serving_peak_gb(1, h):.1f} GB, and {card.name} has {card.budget_gb:.1f}"
