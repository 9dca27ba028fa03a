"""Knobs for seeing how well the subject was learned."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from annotated_types import Ge

from dreambooth_sm.knobs.checkpoints import CheckpointKnobs
from dreambooth_sm.knobs.declare import knob, rule
from dreambooth_sm.knobs.ranges import Few, StepsOrNone

_ENCODERS = re.compile(r"\s*(judge|(dino|clip)=\S+(\s+(?!\2)(dino|clip)=\S+)?)\s*")


class ValidationKnobs(CheckpointKnobs):
    """Validation pictures, and measures of them."""

    group = "Validation"

    validation_prompt: str | None = knob(
        None,
        "Draw this prompt before and after training, and the class prompt beside it; several are separated by `|`.",
        resume="free",
        text=True,
        common=True,
        per_subject=True,
    )
    validation_steps: StepsOrNone = knob(
        0,
        "Draw validation_prompt every so many steps as well; 0: before and after training.",
        resume="free",
    )
    num_validation_images: Few = knob(
        1,
        "Pictures of each validation prompt, always with the same seeds.",
        resume="free",
    )
    validation_guidance_scale: Annotated[float, Ge(1)] = knob(
        7.5,
        "Guidance of the validation pictures.",
        resume="free",
    )
    fidelity_encoders: str | None = knob(
        None,
        "Measure how well the subject was learned, and what that cost, with these encoders: "
        "`dino=facebook/dinov2-base clip=openai/clip-vit-large-patch14`, one of them, or `judge` for the toybox model.",
        resume="free",
    )
    fidelity_steps: StepsOrNone = knob(
        0,
        "Measure with fidelity_encoders every so many steps as well; 0: before and after training.",
        resume="free",
    )
    select_best: bool = knob(
        False,
        "Export the best of the kept checkpoints and the last state, as measured with fidelity_encoders.",
        resume="free",
    )

    @rule("validation_prompt", "validation_steps")
    def _something_is_drawn(self) -> Iterator[str]:
        if self.validation_steps > 0 and self.validation_prompt is None:
            yield (
                f"validation_steps={self.validation_steps} draws nothing without validation_prompt; set it to a "
                'prompt, such as "photo of zwx toy on the beach"'
            )

    @rule("fidelity_encoders", "select_best")
    def _best_is_measured(self) -> Iterator[str]:
        if self.select_best and self.fidelity_encoders is None:
            yield (
                "select_best=true needs fidelity_encoders to measure with; set "
                "fidelity_encoders=dino=facebook/dinov2-base"
            )

    @rule("fidelity_encoders", "fidelity_steps")
    def _something_measures(self) -> Iterator[str]:
        if self.fidelity_steps > 0 and self.fidelity_encoders is None:
            yield (
                f"fidelity_steps={self.fidelity_steps} measures nothing without fidelity_encoders; set "
                "fidelity_encoders=dino=facebook/dinov2-base"
            )

    @rule("save_steps", "select_best")
    def _best_is_one_of_several(self) -> Iterator[str]:
        if self.select_best and self.save_steps == 0:
            yield (
                "select_best=true chooses between checkpoints and save_steps=0 writes none; set save_steps, such as 100"
            )

    @rule("fidelity_encoders")
    def _encoders_can_be_read(self) -> Iterator[str]:
        if self.fidelity_encoders is not None and not _ENCODERS.fullmatch(self.fidelity_encoders):
            yield (
                f"fidelity_encoders: can't understand {self.fidelity_encoders!r}; set judge, or dino=MODEL "
                "clip=MODEL or one of them, hub ids or directories without blanks"
            )
