"""Knobs for what turns gradients into weights."""

from __future__ import annotations

from typing import Literal

from dreambooth_sm.knobs.declare import Alias, Knobs, knob
from dreambooth_sm.knobs.ranges import Auto, Fraction, NonNegativeFloat, PositiveFloat


class OptimizerKnobs(Knobs):
    """The optimizer, its settings, and the average of the weights."""

    group = "Optimizer"

    optimizer: Literal["auto", "auto16", "blockwise", "adamw", "adamw8bit"] = knob(
        "auto",
        "blockwise: ours, with quantised state; adamw: torch's with fp32 weights and state, the reference; adamw8bit: "
        "bitsandbytes' 8-bit AdamW on fp32 weights; auto: the plan's choice; auto16: the same with no less than 16 "
        "bits of state a value. Also accepted as `use_8bit_adam`: true is adamw8bit, false is auto16.",
        # The seed's name. False is not a choice of an optimizer: any without 8-bit state agrees with it.
        aliases=(
            Alias(
                "use_8bit_adam",
                takes=bool | Auto,
                means={True: ("adamw8bit",), False: ("auto16", "adamw"), "auto": ()},
            ),
        ),
    )
    adam_beta1: Fraction = knob(0.9, "Decay of the first moment.")
    adam_beta2: Fraction = knob(0.999, "Decay of the second moment.")
    adam_weight_decay: NonNegativeFloat = knob(1e-2, "Decoupled weight decay.")
    adam_epsilon: PositiveFloat = knob(1e-8, "Added to Adam's denominator.")
    max_grad_norm: PositiveFloat | Auto | None = knob(
        "auto",
        "Clip gradients to this global norm. auto: 1.0 where the plan can clip; None: never.",
    )
    use_ema: bool | Auto = knob("auto", "Average the trained weights and save the average.")
    ema_decay: Fraction = knob(0.999, "Decay of the average, reached after a warm-up.")
