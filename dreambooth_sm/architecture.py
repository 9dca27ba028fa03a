"""Which Stable Diffusion a base model is, as far as that can be said before it is loaded. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

Architecture = Literal["sd", "sdxl"]

# Side of the pictures that each was trained on last, in pixels; what users expect where they name no resolution.
RESOLUTIONS: dict[Architecture, int] = {"sd": 512, "sdxl": 1024}
# What makers call their SDXL models: juggernautXL_v9, sd_xl_base_1.0; and families that do without the letters.
_XL_NAME = re.compile(r"xl(?![a-z])|pony|illustrious|noobai", re.IGNORECASE)
# Of the second text encoder, which SDXL alone has.
_XL_TENSOR = b'"conditioner.embedders.1.'
_LONGEST_HEADER = 100_000_000


def find_architecture(name: str) -> Architecture:
    """The kind of a base model: by what lies at a local path, or else by its name.

    Args:
        name: hub id, ``s3://`` location or path; of each the last two parts count.
    """
    found = _look(Path(name))
    if found is None:
        found = bool(_XL_NAME.search("/".join(name.rstrip("/").split("/")[-2:])))
    return "sdxl" if found else "sd"


def _look(path: Path) -> bool | None:
    """Whether a directory or a safetensors file is SDXL's; None where that can't be seen."""
    from dreambooth_sm.stored.locate import SAFETENSORS, find_kind, look_for_model  # brings S3's client

    try:
        model = look_for_model(path)
        if model is None or (model.is_file() and find_kind(model) != SAFETENSORS):
            return None
        if model.is_dir():
            return (model / "text_encoder_2").is_dir()
        with model.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return _XL_TENSOR in file.read(min(length, _LONGEST_HEADER))
    except (OSError, ValueError):  # names can be anything
        return None
