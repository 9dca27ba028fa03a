"""What shows how well the subject was learned."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

from annotated_types import Ge

from dreambooth_sm.knobs.checkpoints import CheckpointKnobs
from dreambooth_sm.knobs.declare import knob
from dreambooth_sm.knobs.ranges import Few, StepsOrNone

ENCODERS = re.compile(r"\s*(judge|(dino|clip)=\S+(\s+(?!\2)(dino|clip)=\S+)?)\s*")


class ValidationKnobs(CheckpointKnobs):
    """Validation pictures, and measures of them."""

    group: ClassVar[str] = "Validation"

    validation_prompt: str | None = knob(
        None,
        "Draw this prompt before and after training, and the class prompt beside it; several are separated by `|`.",
        resume="free",
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
    select_best: bool = knob(
        False,
        "Export the best of the kept checkpoints and the last state, as measured with fidelity_encoders.",
        resume="free",
    )
