"""Several subjects in one job."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from dreambooth_sm.knobs.escapes import TEXT_FIELDS, unescape_prompt


class Concept(BaseModel):
    """One subject of a job. What is left out is taken from the job's own hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instance_data_dir: str | None = None
    class_data_dir: str | None = None
    instance_prompt: str | None = None
    class_prompt: str | None = None


def decode_concepts(text: str) -> object:
    """Inline JSON (or what ``str()`` makes of a Python list) as objects; anything else is a path."""
    if not text.startswith("["):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            return clean_concepts(read(text))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # what the two can raise
            continue
    return text


def clean_concepts(concepts: object) -> object:
    """Unescapes the prompts of a list of concepts; anything else is handed back for the schema to refuse."""
    if not isinstance(concepts, list | tuple) or not all(isinstance(c, Mapping) for c in concepts):
        return concepts
    return tuple(
        {k: unescape_prompt(v) if k in TEXT_FIELDS and isinstance(v, str) else v for k, v in concept.items()}
        for concept in concepts
    )
