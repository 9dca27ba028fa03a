"""The reference of all knobs."""

from __future__ import annotations

from dreambooth_sm.knobs.declare import Knobs
from dreambooth_sm.knobs.takes import expected


def markdown_table(knobs: type[Knobs]) -> str:
    """The reference of all hyperparameters, as the docs show it."""
    lines: list[str] = []
    group = ""
    for name, field in knobs.model_fields.items():
        if knobs.group_of(name) != group:
            group = knobs.group_of(name)
            lines += ["", f"### {group}", "", "| name | default | takes | meaning |", "|---|---|---|---|"]
        lines.append(f"| `{name}` | `{field.default}` | {expected(field)} | {field.description} |")
    return "\n".join(lines).strip()
