"""The reference of all knobs."""

from __future__ import annotations

from pydantic import BaseModel

from dreambooth_sm.knobs.takes import expected


def markdown_table(knobs: type[BaseModel]) -> str:
    """The reference of all hyperparameters, as the docs show it."""
    lines: list[str] = []
    group = ""
    for name, field in knobs.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        if extra["group"] != group:
            group = str(extra["group"])
            lines += ["", f"### {group}", "", "| name | default | takes | meaning |", "|---|---|---|---|"]
        lines.append(f"| `{name}` | `{field.default}` | {expected(field)} | {field.description} |")
    return "\n".join(lines).strip()
