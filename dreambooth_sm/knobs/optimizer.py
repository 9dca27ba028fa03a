"""Knobs for what turns gradients into weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from dreambooth_sm.knobs.declare import Alias, knob, rule
from dreambooth_sm.knobs.ranges import Auto, Fraction, NonNegativeFloat, PositiveFloat
from dreambooth_sm.knobs.training import TrainingKnobs

# Factors of the rate that Prodigy finds; less was meant for another optimizer.
_LEAST_OF_PRODIGY = 0.01


# The settings of Adam, by the optimizers that have none of them.
_WITHOUT = {"adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"), "lion": ("adam_epsilon",)}


class OptimizerKnobs(TrainingKnobs):
    """The optimizer, its settings, and the average of the weights."""

    group = "Optimizer"

    optimizer: Literal[
        "auto",
        "auto16",
        "blockwise",
        "adamw",
        "adamw8bit",
        "adafactor",
        "lion",
        "prodigy",
        "schedule_free",
    ] = knob(
        "auto",
        "blockwise: ours, with quantised state; adamw: torch's with fp32 weights and state, the reference; adamw8bit: "
        "bitsandbytes' 8-bit AdamW on fp32 weights; auto: the plan's choice; auto16: the same with no less than 16 "
        "bits of state a value. adafactor: with hardly any state; lion: steps of one size, with half of AdamW's state; "
        "prodigy: finds the learning rate by itself; schedule_free: AdamW that averages in place of a schedule. Also "
        "accepted as `use_8bit_adam`: true is adamw8bit, false is auto16.",
        # The seed's name. False is not a choice of an optimizer: any without 8-bit state agrees with it.
        aliases=(
            Alias(
                "use_8bit_adam",
                takes=bool | Auto,
                means={
                    True: ("adamw8bit",),
                    False: ("auto16", "adamw", "adafactor", "lion", "prodigy", "schedule_free"),
                    "auto": (),
                },
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

    def optimizer_defaults(self, learning_rate: float) -> dict[str, object]:
        """What the optimizer has in place of defaults.

        Args:
            learning_rate: AdamW's.
        """
        if self.optimizer == "prodigy":  # a factor of what it finds
            return {"learning_rate": 1.0}
        if self.optimizer == "lion":  # a third to a tenth of AdamW's (Chen et al. 2023)
            return {"learning_rate": learning_rate / 5, "adam_beta2": 0.99}
        return {}

    @rule("optimizer", "adam_beta1", "adam_beta2", "adam_epsilon")
    def _settings_of_adam_have_an_adam(self) -> Iterator[str]:
        values = {"adam_beta1": self.adam_beta1, "adam_beta2": self.adam_beta2, "adam_epsilon": self.adam_epsilon}
        for name in _WITHOUT.get(self.optimizer, ()):
            if values[name] != OptimizerKnobs.model_fields[name].default:
                yield f"{name}={values[name]:g} is not a setting of optimizer={self.optimizer}; leave {name} out"

    @rule("optimizer", "learning_rate", "text_encoder_lr")
    def _prodigy_finds_its_rate(self) -> Iterator[str]:
        if self.optimizer != "prodigy":
            return
        if self.learning_rate < _LEAST_OF_PRODIGY:
            yield (
                f"learning_rate={self.learning_rate:g}: optimizer=prodigy finds a learning rate and takes this as a "
                "factor of it; set learning_rate to 1, or leave it out"
            )
        if self.text_encoder_lr is not None:
            yield "text_encoder_lr: optimizer=prodigy finds one learning rate for all; leave text_encoder_lr out"

    @rule("optimizer", "lr_scheduler", "use_ema", "adam_beta1")
    def _schedule_free_has_no_schedule(self) -> Iterator[str]:
        if self.optimizer != "schedule_free":
            return
        if not self.lr_scheduler.startswith("constant"):
            yield (
                f"lr_scheduler={self.lr_scheduler}: optimizer=schedule_free averages in place of a schedule; set "
                "lr_scheduler to constant or constant_with_warmup"
            )
        if self.use_ema is True:
            yield "use_ema=true: what optimizer=schedule_free trains is an average; set use_ema to false or auto"
        if self.adam_beta1 == 0:
            yield "adam_beta1=0: optimizer=schedule_free mixes its average in by it; set adam_beta1 to more than 0"
