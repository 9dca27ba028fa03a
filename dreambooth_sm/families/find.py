"""Finds a base model's family, before it is downloaded or read. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from dreambooth_sm.families import DEFAULT, FAMILIES, Facts

_LONGEST_HEADER = 100_000_000


def find_family(name: str) -> str:
    """The family of a base model: by what lies at a local path, or else by its name.

    Args:
        name: hub id, ``s3://`` location or path; of each the last two parts count.
    """
    others = [family.facts for family in FAMILIES.values() if family.facts.name != DEFAULT]
    words = "/".join(name.rstrip("/").split("/")[-2:])
    found = _look(Path(name), others)
    if found is None:
        found = [facts for facts in others if facts.names and facts.names.search(words)]
    return found[0].name if found else DEFAULT


def _look(path: Path, families: list[Facts]) -> list[Facts] | None:
    """Those of the families that a directory or a safetensors file is of; None where that can't be seen."""
    from dreambooth_sm.stored.locate import INDEX, SAFETENSORS, find_kind, look_for_model  # brings S3's client

    try:
        model = look_for_model(path)
        if model is None or (model.is_file() and find_kind(model) != SAFETENSORS):
            return None
        if model.is_dir():
            said = _class_name(model / INDEX)
            return [facts for facts in families if facts.pipeline == said] or [
                facts for facts in families if facts.folder and (model / facts.folder).is_dir()
            ]
        with model.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _LONGEST_HEADER))
            return [facts for facts in families if facts.tensor and facts.tensor in header]
    except (OSError, ValueError):  # names can be anything
        return None


def _class_name(index: Path) -> str | None:
    """The class that a pipeline's index names; None where it can't be read."""
    try:
        said = json.loads(index.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return str(said.get("_class_name")) if isinstance(said, dict) else None
