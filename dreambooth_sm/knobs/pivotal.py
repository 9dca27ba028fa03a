"""Knobs for words that are learned beside an adapter."""

from __future__ import annotations

from collections.abc import Iterator

from dreambooth_sm.knobs.declare import knob, rule
from dreambooth_sm.knobs.lora import PIVOTAL, LoraKnobs
from dreambooth_sm.knobs.messages import short
from dreambooth_sm.knobs.ranges import PositiveFloat
from dreambooth_sm.knobs.textual_inversion import TextualInversionKnobs

# Words are learned as much faster than adapters where nobody says otherwise.
_FASTER = 5.0


class PivotalKnobs(LoraKnobs, TextualInversionKnobs):
    """What is there only where words and an adapter are learned together."""

    group = "Pivotal tuning"

    placeholder_lr: PositiveFloat | None = knob(
        None,
        "Peak learning rate of the learned words' vectors, which follows the same schedule; None: 5 times "
        "learning_rate, or with optimizer=prodigy the same.",
        methods=(PIVOTAL,),
    )

    @property
    def placeholder_factor(self) -> float:
        """By what factor of ``learning_rate`` learned words are trained."""
        if self.placeholder_lr is not None:
            return self.placeholder_lr / self.learning_rate
        return 1.0 if self.optimizer == "prodigy" else _FASTER

    @rule("placeholder_lr", "optimizer")
    def _words_have_the_rate_that_is_found(self) -> Iterator[str]:
        if self.optimizer == "prodigy" and self.placeholder_lr is not None:
            yield "placeholder_lr: optimizer=prodigy finds one learning rate for all; leave placeholder_lr out"

    @rule("method", "model_name", "export", "placeholder_token", "instance_prompt", "class_prompt", "concepts_list")
    def _files_have_names_of_their_own(self) -> Iterator[str]:
        if self.method != PIVOTAL or self.export == "merged":
            return
        prompts = self._prompts()
        words = {self._placeholder(instance_prompt, class_prompt) for instance_prompt, class_prompt in prompts}
        if self.model_name.lower() in words:
            yield (
                f"model_name={short(self.model_name)} names the adapter's file, and placeholder_token that of the "
                f"word; set model_name to another, such as {self.model_name}-lora"
            )
