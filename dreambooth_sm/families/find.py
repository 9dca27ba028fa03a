"""Finds a base model's family, before it is downloaded or read. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dreambooth_sm.families import DEFAULT, FAMILIES, Facts
from dreambooth_sm.toybox import SHIPPED

_LONGEST_HEADER = 100_000_000
# Of a pipeline's index: whether the model draws in a few steps alone.
DISTILLED = "is_distilled"


def find_family(name: str) -> str:
    """The family of a base model: by what lies at a local path, or else by its name.

    Args:
        name: hub id, ``s3://`` location or path, of which the last two parts count; or that of a model that comes with
            us.
    """
    others = [family.facts for family in FAMILIES.values() if family.facts.name != DEFAULT]
    words = "/".join(name.rstrip("/").split("/")[-2:])
    path = _at(name)
    found = _look(path, others) if path else None
    if found is None:
        found = [facts for facts in others if facts.names and facts.names.search(words)]
    return found[0].name if found else DEFAULT


def find_facts(family: str, name: str) -> Facts:
    """The facts of a base model: its family's, and those of its size where that can be told by the configuration that
    lies at a local path, or else by its name.

    Args:
        family: as :func:`find_family` found it, or the user said.
        name: as there.
    """
    facts = FAMILIES[family].facts
    if not facts.sizes:
        return facts
    model, words = _found(name), "/".join(name.rstrip("/").split("/")[-2:])
    config = _read_index(model / facts.denoiser / "config.json") if model and model.is_dir() else {}
    header = _header(model) if model and model.is_file() else None
    for size in facts.sizes:
        if config:
            is_its = config.items() >= size.config.items()
        else:
            is_its = size.tensor in header if header else bool(size.names.search(words))
        if is_its:
            return facts.of_size(size)
    return facts


def says_distilled(name: str) -> bool | None:
    """Whether the index of a pipeline's directory says that the model was distilled to draw in a few steps; None where
    a directory is not here, or does not say.

    Args:
        name: hub id, ``s3://`` location or path.
    """
    from dreambooth_sm.stored.locate import INDEX  # brings S3's client

    model = _found(name)
    said = _read_index(model / INDEX).get(DISTILLED) if model and model.is_dir() else None
    return said if isinstance(said, bool) else None


def _at(name: str) -> Path | None:
    """What lies at a local path, or came with us; None where nothing does. Planners ask about a hub id thousands of
    times, and pathlib takes ten times as long to say that it is not here."""
    place = os.path.expanduser(SHIPPED.get(name, name))  # noqa: PTH111
    return Path(place) if os.path.exists(place) else None  # noqa: PTH110


def _found(name: str) -> Path | None:
    """The model at a local path; None where there is none."""
    from dreambooth_sm.stored.locate import look_for_model  # brings S3's client

    path = _at(name)
    try:
        return look_for_model(path) if path else None
    except (OSError, RuntimeError, ValueError):  # names can be anything
        return None


def _look(path: Path, families: list[Facts]) -> list[Facts] | None:
    """Those of the families that a directory or a safetensors file is of; None where that can't be seen."""
    from dreambooth_sm.stored.locate import INDEX, look_for_model  # brings S3's client

    try:
        model = look_for_model(path)
        if model is None:
            return None
        if model.is_dir():
            said = _read_index(model / INDEX).get("_class_name")
            return [facts for facts in families if facts.pipeline == said] or [
                facts for facts in families if facts.folder and (model / facts.folder).is_dir()
            ]
        header = _header(model)
        return None if header is None else [facts for facts in families if facts.tensor and facts.tensor in header]
    except (OSError, ValueError):  # names can be anything
        return None


def _header(model: Path) -> bytes | None:
    """Of a safetensors file; None where it is another one, or can't be read."""
    from dreambooth_sm.stored.locate import SAFETENSORS, find_kind  # brings S3's client

    try:
        if find_kind(model) != SAFETENSORS:
            return None
        with model.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return file.read(min(length, _LONGEST_HEADER))
    except (OSError, ValueError):
        return None


def _read_index(path: Path) -> dict[str, Any]:
    """A pipeline's index; empty where it can't be read."""
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
