"""Pictures of tests: in few steps, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dreambooth_sm.families import FAMILIES

# As good as 25 where nobody looks at the pictures.
FEW_STEPS = {"steps": 5, "class_steps": 2}


def draw_otherwise(put: Callable[[Any, str, Any], None], **changes: Any) -> None:
    """Changes how pictures of all families are drawn where nobody says otherwise.

    Args:
        put: sets an attribute: the ``setattr`` of a monkeypatch, or the one that stays.
    """
    for family in FAMILIES.values():
        facts = family.facts
        put(type(family), "facts", dataclasses.replace(facts, drawing=dataclasses.replace(facts.drawing, **changes)))


def levels_between(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures' pixels, of 255.

    Where a pipeline asks its denoiser twice, once for each prompt, and we once for both, processors may round the rows
    of a product otherwise: pictures are the same to the bit on some, and one level apart here and there on others.
    """
    return int(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max())
