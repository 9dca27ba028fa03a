"""What turns gradients into weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from dreambooth_sm.knobs.declare import Knobs, knob, rule
from dreambooth_sm.knobs.ranges import Auto, Fraction, NonNegativeFloat, PositiveFloat


class OptimizerKnobs(Knobs):
    """The optimizer, its settings, and the average of the weights."""

    group: ClassVar[str] = "Optimizer"

    optimizer: Literal["auto", "blockwise", "adamw"] = knob(
        "auto",
        "blockwise: ours, with quantised state; adamw: torch's with fp32 weights and state, the reference.",
    )
    use_8bit_adam: bool | Auto = knob(
        "auto",
        "True: bitsandbytes' 8-bit AdamW on fp32 weights; False: no 8-bit state; auto: the plan's choice.",
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

    @rule("optimizer", "use_8bit_adam")
    def _one_optimizer(self) -> Iterator[str]:
        if self.use_8bit_adam is True and self.optimizer != "auto":
            yield f"use_8bit_adam=true and optimizer={self.optimizer} are two optimizers; set one of them to auto"
