"""Knobs for how long is trained, and how fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Le

from dreambooth_sm.knobs.declare import Alias, Knobs, Tunable, knob, rule
from dreambooth_sm.knobs.presets import described
from dreambooth_sm.knobs.ranges import Auto, Few, PositiveFloat, Seed, Steps, StepsOrNone

DEFAULT_TRAIN_STEPS = 800
_HUBER_DELTA = 0.1


class TrainingKnobs(Knobs):
    """Steps, batches, learning rate and loss."""

    group = "Training"

    method: Literal["full", "lora", "hypernetwork", "textual_inversion", "pivotal"] = knob(
        "full",
        "What is trained. full: all parameters; lora: matrices beside layers; hypernetwork: networks before the cross "
        "attention; textual_inversion: a new word; pivotal: a word and lora. `use_lora=true` is accepted for lora.",
        common=True,
        # The seed's name.
        aliases=(Alias("use_lora", takes=bool, means={True: ("lora",), False: ()}),),
    )
    preset: Literal["object", "face", "style"] | None = knob(
        None,
        f"What is taught: sets values that are not set otherwise. {described()}.",
        resume="free",
        common=True,
    )
    max_train_steps: Steps | None = knob(
        None,
        f"Optimizer steps. Wins over num_train_epochs; {DEFAULT_TRAIN_STEPS} shared by processes if neither is set.",
        resume="free",
        common=True,
        tunable=Tunable(200, 2000),
        per_subject=True,
    )
    num_train_epochs: Steps | None = knob(None, "Passes over the instance pictures.", resume="free", per_subject=True)
    train_batch_size: Few = knob(
        1, "Instance pictures a step; prior preservation adds as many class images.", common=True
    )
    gradient_accumulation_steps: Few = knob(1, "Batches an optimizer step is made of.")
    learning_rate: PositiveFloat = knob(
        2e-6,
        "Peak learning rate. Where it is left out, optimizer=lion takes a fifth of the default, optimizer=prodigy 1.",
        common=True,
        tunable=Tunable(5e-7, 1e-5, logarithmic=True),
        per_subject=True,
    )
    scale_lr: bool = knob(False, "Multiply the learning rate by batch size, accumulation steps and processes.")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = knob("constant", "Learning-rate schedule.")
    lr_warmup_steps: StepsOrNone = knob(0, "Steps over which the learning rate rises from 0.")
    train_text_encoder: bool | Auto = knob(
        "auto",
        "Train the text encoders as well as the UNet. auto: where there is room, and they are small; none beside "
        "adapters.",
        common=True,
    )
    text_encoder_lr: PositiveFloat | None = knob(
        None,
        "Peak learning rate of the text encoders, which follows the same schedule; None: learning_rate.",
        methods=("full", "lora"),
    )
    snr_gamma: PositiveFloat | None = knob(
        None, "Min-SNR loss weighting (Hang et al. 2023); 5 is usual, None turns it off."
    )
    debiased_loss: bool = knob(
        False,
        "Weigh times by 1 / sqrt(SNR), so that noisy ones, which decide on shapes, count more (Yu et al. 2023); "
        "instead of snr_gamma.",
    )
    time_sampling: Literal["uniform", "logit_normal"] = knob(
        "uniform",
        "With models of flow matching: how often each share of noise is trained on, before time_shift. logit_normal: "
        "middle ones more often (Esser et al. 2024).",
    )
    time_shift: PositiveFloat | Literal["auto", "resolution"] = knob(
        "auto",
        "With models of flow matching: more than 1 trains more on noisy pictures, which decide on shapes. auto: as the "
        "model is drawn with; resolution: more for larger pictures.",
    )
    loss: Literal["squared", "huber"] = knob(
        "squared",
        "Loss of each latent value. huber: errors beyond huber_delta count by their size and not by its square, so "
        "that single odd pictures count less.",
    )
    huber_delta: PositiveFloat = knob(_HUBER_DELTA, "With loss=huber: where the loss goes over from square to size.")
    noise_offset: Annotated[float, Ge(0), Le(1)] = knob(
        0.0,
        "Add this much of noise that is the same all over a picture, so that very dark and very bright pictures can be "
        "learned (Guttenberg 2023); 0.05 to 0.1 is usual.",
    )
    seed: Seed | None = knob(
        None, "Seed of everything random in the job; None draws one and logs it.", common=True, per_subject=True
    )

    @property
    def text_encoder_factor(self) -> float:
        """By what factor of ``learning_rate`` text encoders are trained."""
        return (self.text_encoder_lr or self.learning_rate) / self.learning_rate

    @rule("text_encoder_lr", "train_text_encoder")
    def _text_encoder_that_learns(self) -> Iterator[str]:
        if self.text_encoder_lr is not None and self.train_text_encoder is False:
            yield (
                f"text_encoder_lr={self.text_encoder_lr:g} is for jobs that train the text encoders; set "
                "train_text_encoder to true or auto, or leave text_encoder_lr out"
            )

    @rule("snr_gamma", "debiased_loss")
    def _times_are_weighed_once(self) -> Iterator[str]:
        if self.debiased_loss and self.snr_gamma is not None:
            yield f"snr_gamma={self.snr_gamma:g} and debiased_loss=true both weigh the times; keep one of them"

    @rule("loss", "huber_delta")
    def _delta_is_of_huber(self) -> Iterator[str]:
        if self.huber_delta != _HUBER_DELTA and self.loss != "huber":
            yield f"huber_delta={self.huber_delta:g} is for loss=huber; set loss to huber, or leave huber_delta out"

    @rule("max_train_steps", "lr_warmup_steps")
    def _warm_up_ends(self) -> Iterator[str]:
        if self.max_train_steps is not None and self.lr_warmup_steps > self.max_train_steps:
            yield (
                f"lr_warmup_steps={self.lr_warmup_steps} is more than max_train_steps={self.max_train_steps}; "
                "the learning rate would never reach its value"
            )

    @rule("lr_scheduler", "lr_warmup_steps")
    def _schedule_warms_up(self) -> Iterator[str]:
        if self.lr_scheduler == "constant" and self.lr_warmup_steps > 0:
            yield (
                "lr_scheduler=constant has no warm-up; set lr_scheduler to constant_with_warmup, or lr_warmup_steps "
                "to 0"
            )
