"""Knobs for keeping the class as the base model knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Le

from dreambooth_sm.knobs.declare import Tunable, knob, rule
from dreambooth_sm.knobs.output import refused_location
from dreambooth_sm.knobs.pictures import PictureKnobs
from dreambooth_sm.knobs.ranges import Auto, Few, NonNegativeFloat, PositiveFloat

# With 1,000 times, and errors that are means, 1,000 of the authors' code.
_DCO_BETA = 1.0


class PriorKnobs(PictureKnobs):
    """Prior preservation: class images, or the base model's own predictions."""

    group = "Prior preservation"

    with_prior_preservation: bool | Auto = knob(
        "auto",
        "Train on class images as well, so that the class is kept. auto: if there is a class prompt.",
    )
    prior: Literal["images", "output", "dco"] = knob(
        "images",
        "What keeps the class. images: class images. output: the base model's own predictions for the class prompt, on "
        "noised pictures of the subject; no class images are made or read. Where what is trained lies beside the base "
        "model (adapters, hypernetworks), each step asks it again; otherwise it is asked before training. dco: nothing "
        "of the class; how much better than by the base model a picture is predicted is what counts, with such methods "
        "alone (Lee et al. 2024).",
    )
    dco_beta: PositiveFloat = knob(
        _DCO_BETA,
        "With prior=dco: how far the model may go from the base model; a smaller one lets it go farther.",
    )
    prior_loss_weight: NonNegativeFloat = knob(0.5, "Weight of the class images' loss.", tunable=Tunable(0.1, 1.0))
    num_class_images: Annotated[int, Ge(1), Le(100_000)] = knob(
        50, "Class images wanted; those that are missing are generated.", common=True, per_subject=True
    )
    sample_batch_size: Few | Auto = knob("auto", "Class images generated at a time.", resume="free")
    sample_guidance_scale: Annotated[float, Ge(1)] = knob(
        7.5,
        "Guidance of generated class images, at middle noise levels. Lower values stay closer to what the base model "
        "knows of the class.",
    )
    class_cache: str | None = knob(
        None,
        "s3://bucket/prefix that keeps generated class images for later jobs of the same base model and class prompt.",
        resume="free",
    )

    @property
    def prior_preservation(self) -> bool:
        """Whether rows of the class are trained on, with ``auto`` resolved."""
        if self.prior == "dco":
            return False
        if self.with_prior_preservation == "auto":
            return self.class_prompt is not None or any(c.class_prompt for c in self.inline_concepts)
        return self.with_prior_preservation

    @rule("with_prior_preservation", "class_prompt", "concepts_list")
    def _class_has_a_prompt(self) -> Iterator[str]:
        if self.with_prior_preservation is True and self.concepts_list is None and not self.class_prompt:
            yield (
                "with_prior_preservation=true needs class_prompt; set it to the prompt of the class, such as "
                '"photo of a toy", or set with_prior_preservation=false'
            )
        for number, concept in enumerate(self.inline_concepts):
            if self.prior_preservation and not (concept.class_prompt or self.class_prompt):
                yield f"concepts_list: concept {number} has no class_prompt, which prior preservation needs"

    @rule("prior", "dco_beta", "with_prior_preservation")
    def _dco_stands_for_the_class(self) -> Iterator[str]:
        if self.prior == "dco" and self.with_prior_preservation is True:
            yield (
                "prior=dco keeps the class without class images; leave with_prior_preservation out, or set prior to "
                "images or output"
            )
        if self.prior != "dco" and self.dco_beta != _DCO_BETA:
            yield f"dco_beta={self.dco_beta:g} is for prior=dco; set prior to dco, or leave dco_beta out"

    @rule("class_cache")
    def _cache_lies_in_s3(self) -> Iterator[str]:
        yield from refused_location("class_cache", self.class_cache)
