"""The families of models that can be trained, a file each. Imports no torch."""

from __future__ import annotations

from typing import Any

from dreambooth_sm.families import chroma, flux1, flux2, krea2, qwen_image, sd, sd3, sdxl, z_image
from dreambooth_sm.families.conditioning import Conditioning
from dreambooth_sm.families.facts import Facts, ModelFootprint
from dreambooth_sm.families.family import Family

__all__ = ["DEFAULT", "FAMILIES", "Conditioning", "Facts", "Family", "ModelFootprint", "family_of"]

FAMILIES: dict[str, Family] = {
    family.facts.name: family
    for family in (
        sd.FAMILY,
        sdxl.FAMILY,
        sd3.FAMILY,
        z_image.FAMILY,
        flux2.FAMILY,
        flux1.FAMILY,
        qwen_image.FAMILY,
        chroma.FAMILY,
        krea2.FAMILY,
    )
}
# What a model of none of the others is taken for.
DEFAULT = next(iter(FAMILIES))


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline of diffusers that was loaded.

    Raises:
        LookupError: where it is of none.
    """
    kind = type(pipeline).__name__
    found = next((family for family in FAMILIES.values() if family.facts.pipeline == kind), None)
    if found is None:
        raise LookupError(f"no family draws with a {kind}")
    return found
