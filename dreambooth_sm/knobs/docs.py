"""Knobs as people read of them: the reference, and the help text of each."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from dreambooth_sm.families import FAMILIES
from dreambooth_sm.knobs.declare import Knobs
from dreambooth_sm.knobs.messages import listed
from dreambooth_sm.knobs.takes import expected


def markdown_table(knobs: type[Knobs]) -> str:
    """The reference of all hyperparameters, as the docs show it."""
    lines: list[str] = []
    group = ""
    for name, field in knobs.model_fields.items():
        if knobs.group_of(name) != group:
            group = knobs.group_of(name)
            lines += ["", f"### {group}", "", "| name | default | takes | meaning |", "|---|---|---|---|"]
        default = ", ".join([f"`{field.default}`", *_defaults_of_methods(name)])
        lines.append(f"| `{name}` | {default} | {expected(field)} | {field.description} |")
    return "\n".join(lines).strip()


def _defaults_of_methods(name: str) -> list[str]:
    """Those that are others for some method."""
    facts = [family.facts for family in FAMILIES.values()]
    values: dict[str, dict[str, object]] = {}  # by method and family, where there are any
    for each in facts:
        for method, defaults in each.methods.items():
            values.setdefault(method, {})[each.title] = defaults.get(name)
    said = []
    for method, by_family in values.items():
        own: dict[object, list[str]] = {}
        for title, value in by_family.items():
            if value is not None:
                own.setdefault(value, []).append(title)
        for value, titles in own.items():
            of = "" if len(titles) == len(by_family) else f" of {listed(titles)}"
            said.append(f"with method={method}{of} `{value}`")
    return said


def help_text(field: FieldInfo, default: object) -> str:
    """Describes a knob as a command line does."""
    said = f" Default: {str(default).lower() if isinstance(default, bool) else default}."
    return f"{field.description}{said if default not in (None, (), {}, '') else ''}"
