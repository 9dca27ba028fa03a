"""Several subjects in one job."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from dreambooth_sm.knobs.declare import knob, meaning
from dreambooth_sm.knobs.escapes import unescape_prompt


class Concept(BaseModel):
    """One subject of a job. What is left out is taken from the job's own hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instance_data_dir: str | None = knob(None, "Directory with the pictures of the subject.", path=True)
    class_data_dir: str | None = knob(None, "Directory with class images.", path=True)
    instance_prompt: str | None = knob(None, "Prompt of the subject.", text=True)
    class_prompt: str | None = knob(None, "Prompt of the class.", text=True)


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
    prompts = {name for name, field in Concept.model_fields.items() if meaning(field).text}
    return tuple(
        {k: unescape_prompt(v) if k in prompts and isinstance(v, str) else v for k, v in concept.items()}
        for concept in concepts
    )
