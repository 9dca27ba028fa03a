"""The hyperparameters of a job: the groups of :mod:`dreambooth_sm.knobs` together, each knob declared once.

The container, the launcher, the command line and the docs all read this schema. It imports no torch.

SageMaker hands each hyperparameter over as a string, and some SDK versions encode it as JSON once more;
:meth:`Hyperparameters.parse` undoes both and reports every problem of the input in one
:class:`~dreambooth_sm.errors.UserError`. ``python -m dreambooth_sm.hyperparameters`` prints the docs' table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from pydantic import ValidationError

from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.knobs.declare import rule
from dreambooth_sm.knobs.decode import read_values, split_arguments
from dreambooth_sm.knobs.docs import markdown_table
from dreambooth_sm.knobs.hypernetwork import HypernetworkKnobs
from dreambooth_sm.knobs.lora import LoraKnobs
from dreambooth_sm.knobs.memory import MemoryKnobs
from dreambooth_sm.knobs.messages import readable
from dreambooth_sm.knobs.pictures import DEFAULT_INSTANCE_DATA_DIR
from dreambooth_sm.knobs.pivotal import PivotalKnobs
from dreambooth_sm.knobs.presets import PRESET_KNOBS, PRESETS, PresetValue
from dreambooth_sm.knobs.prior import PriorKnobs
from dreambooth_sm.knobs.textual_inversion import TextualInversionKnobs
from dreambooth_sm.knobs.tracking import TrackingKnobs
from dreambooth_sm.knobs.training import TrainingKnobs
from dreambooth_sm.knobs.validation import ValidationKnobs


# pydantic lists the fields of the last base first.
class Hyperparameters(
    TrackingKnobs,
    ValidationKnobs,
    MemoryKnobs,
    PivotalKnobs,
    LoraKnobs,
    HypernetworkKnobs,
    TextualInversionKnobs,
    TrainingKnobs,
    PriorKnobs,
):
    """The hyperparameters of one DreamBooth job (Ruiz et al. 2023, "DreamBooth: Fine Tuning Text-to-Image
    Diffusion Models for Subject-Driven Generation").

    ``"auto"`` leaves a choice to the plan for the card; an explicit value always wins over the plan.
    """

    def fit_to_base(self) -> Self:
        """Takes what the family of the base model has in place of defaults, of itself and for the method, what the
        optimizer has, and what the preset has."""
        values = {name: type(self).model_fields[name].default for name in ("learning_rate", *PRESET_KNOBS)}
        values |= self.facts.methods.get(self.method, {})
        values |= self.optimizer_defaults(values["learning_rate"])
        for name, value in values.items():
            if name not in self.model_fields_set:
                self._default(name, value)
        for preset in self._preset_values():
            problems = len(self.conflicts())
            self._default(preset.name, preset.value)
            if len(self.conflicts()) > problems:  # with what is set, or what the model takes
                self._default(preset.name, values[preset.name])
        return super().fit_to_base()

    def _preset_values(self) -> list[PresetValue]:
        """The preset's values for the method, where nothing that is set decides on the same."""
        values = PRESETS[self.preset] if self.preset else ()
        free = self.model_fields_set.isdisjoint
        return [each for each in values if self.method in each.methods and free({each.name, *each.unless})]

    @property
    def preset_note(self) -> str | None:
        """Says which values the preset set; None where there is none."""
        if not self.preset:
            return None
        found = [each.setting for each in self._preset_values() if getattr(self, each.name) == each.value]
        said = " ".join(found) if found else f"nothing with method={self.method} and the values that are set"
        return f"preset={self.preset} sets {said}"

    def told(self) -> dict[str, Any]:
        """The values that a report tells, as JSON's types: those of all knobs but other methods'."""
        foreign = self.names_where(lambda knob: bool(knob.methods) and self.method not in knob.methods)
        return self.model_dump(mode="json", exclude=set(foreign))

    @rule("method", "pretrained_model_name_or_path", "base_architecture")
    def _method_is_for_the_base(self) -> Iterator[str]:
        if refusal := self.facts.refusal_of(self.method):
            yield refusal

    @rule("pretrained_model_name_or_path", "base_architecture")
    def _family_takes_what_is_set(self) -> Iterator[str]:
        facts = self.facts
        for name, (values, why) in facts.takes.items():
            value = getattr(self, name)
            if value not in values:
                usual = type(self).model_fields[name].default
                others = " or ".join(str(each) for each in values if each != usual)
                advice = f"leave {name} out" if usual in values else f"set it to {others}"
                yield f"{name}={value} is not for {facts.title}: {why}; {advice}"

    @rule("pretrained_model_name_or_path", "base_architecture", "time_sampling", "time_shift")
    def _times_are_of_flow_matching(self) -> Iterator[str]:
        facts = self.facts
        for name in ("time_sampling", "time_shift"):
            if not facts.matches_flow and getattr(self, name) != type(self).model_fields[name].default:
                others = ", ".join(each.facts.title for each in FAMILIES.values() if each.facts.matches_flow)
                yield f"{name} is for models of flow matching ({others}), and this is {facts.title}; leave it out"

    @rule("pretrained_model_name_or_path", "base_architecture", "resolution")
    def _resolution_is_a_multiple_of_the_familys(self) -> Iterator[str]:
        facts = self.facts
        if self.resolution % 8 == 0 and self.resolution % facts.multiple:
            nearest = round(self.resolution / facts.multiple) * facts.multiple
            yield f"resolution={self.resolution}: {facts.title} takes multiples of {facts.multiple}; set {nearest}"

    @classmethod
    def parse(
        cls,
        raw: Mapping[str, object],
        *,
        dataset_info: Callable[[str], Mapping[str, str]] = lambda instance_data_dir: {},
    ) -> Self:
        """Reads hyperparameters as SageMaker, an SDK, a command line or Python code give them.

        Args:
            raw: names to values. Strings are decoded (``"False"``, ``"\\"512\\""``, ``photo\\\\ of\\\\ zwx``);
                keys of the platform (see :func:`~dreambooth_sm.knobs.decode.platform_keys`) are left out.
            dataset_info: gives the prompts that lie beside the pictures of ``instance_data_dir``; they serve where
                ``raw`` names none.

        Raises:
            UserError: with every problem of the input: unknown names (and the nearest known ones), wrong types,
                values out of range, values that can't work together.
        """
        read = read_values(cls, raw)
        values, problems, refused = read.values, read.problems, read.refused
        try:
            beside = dataset_info(str(values.get("instance_data_dir", DEFAULT_INSTANCE_DATA_DIR)))
            values |= {name: text for name, text in beside.items() if values.get(name) is None}
        except UserError as error:
            problems += error.problems
        try:
            parsed = cls.model_validate(values)
        except ValidationError as error:
            refused |= {str(detail["loc"][0]) for detail in error.errors()}
            problems += readable(error, cls, values)
            # What the valid values say about each other is worth knowing at once as well.
            parsed = cls.model_validate({name: value for name, value in values.items() if name not in refused})
        problems += parsed.conflicts(refused)
        if problems:
            raise UserError(problems)
        return parsed

    @classmethod
    def parse_arguments(cls, arguments: Sequence[str]) -> Self:
        """Reads ``--key value`` (or ``--key=value``) arguments; a bare ``--key`` means true.

        Words up to the next ``--key`` belong to one value, so that an unquoted prompt survives.
        """
        return cls.parse(split_arguments(arguments))

    def to_sagemaker(self) -> dict[str, str]:
        """The values that were set explicitly, each encoded as the one string that every SDK passes through."""
        explicit = self.model_dump(include=self.model_fields_set, mode="json")
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in explicit.items()}


if __name__ == "__main__":
    print(f"# Hyperparameters\n\n{markdown_table(Hyperparameters)}")  # docs/hyperparameters.md
