"""Plans for each card, as a table."""

from __future__ import annotations

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.cards import CARDS, find_card
from dreambooth_sm.planning.choice import make_plan

_COLUMNS = (
    "card",
    "tier",
    "precision",
    "weights",
    "Adam's state",
    "checkpointing",
    "text encoder",
    "EMA",
    "class images at a time",
    "predicted peak",
)


def tier_rows(h: Hyperparameters) -> list[dict[str, str]]:
    """Plans for each card: a row a card, with an ``error`` where it can't be trained on."""
    rows = []
    for name in [*CARDS, "24GB", "16GB", "12GB", "10GB", "8GB", "6GB", "4GB"]:
        try:
            plan = make_plan(h, find_card(name))
        except UserError as error:
            rows.append({"card": name, "error": str(error)})
            continue
        cells = [
            name,
            plan.tier,
            plan.precision,
            plan.weights,
            f"{plan.state_bits} bits",
            "yes" if plan.gradient_checkpointing else "no",
            "yes" if plan.train_text_encoder else "no",
            plan.ema,
            str(plan.sample_batch_size),
            f"{plan.predicted_peak_gb:.1f} GB" if plan.device == "cuda" else "",
        ]
        rows.append(dict(zip(_COLUMNS, cells, strict=True)))
    return rows


def tier_table(h: Hyperparameters) -> str:
    """The same as a Markdown table."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for row in tier_rows(h):
        cells = [row["card"], row["error"], *[""] * (len(_COLUMNS) - 2)] if "error" in row else row.values()
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
