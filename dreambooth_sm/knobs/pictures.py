"""Pictures of the subject and of its class, and their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from annotated_types import Ge, Le
from pydantic import model_validator

from dreambooth_sm.families import DEFAULT, FAMILIES
from dreambooth_sm.knobs.concepts import Concept
from dreambooth_sm.knobs.declare import knob, rule
from dreambooth_sm.knobs.messages import listed, short
from dreambooth_sm.knobs.output import DEFAULT_MODELS_PATH, OutputKnobs, refused_location
from dreambooth_sm.knobs.ranges import Auto, Fraction

# The channel names of the seed notebook, as SageMaker mounts them.
DEFAULT_INSTANCE_DATA_DIR = "/opt/ml/input/data/images"
DEFAULT_CLASS_DATA_DIR = "/opt/ml/input/data/class_images"
# Stands for a picture's caption in `instance_prompt`.
FILEWORDS = "[filewords]"


def _other_resolutions() -> str:
    """In words, of the families whose resolution is not the knob's default."""
    facts = [family.facts for family in FAMILIES.values()]
    by_resolution: dict[int, list[str]] = {}
    for each in facts:
        if each.resolution != FAMILIES[DEFAULT].facts.resolution:
            by_resolution.setdefault(each.resolution, []).append(each.short)
    return ", ".join(f"{resolution} for {listed(names)}" for resolution, names in by_resolution.items())


class PictureKnobs(OutputKnobs):
    """Instance pictures, class pictures and prompts, as the model is shown them."""

    group = "Data"

    instance_data_dir: str = knob(
        DEFAULT_INSTANCE_DATA_DIR, "Directory with the pictures of the subject.", resume="free", path=True
    )
    class_data_dir: str = knob(
        DEFAULT_CLASS_DATA_DIR,
        "Directory with class images; missing ones are generated, and kept there as latents (or in a scratch "
        "directory if this one is read-only).",
        resume="free",
        path=True,
    )
    instance_prompt: str | None = knob(
        None,
        f'Prompt of the subject, with a rare token: "photo of zwx toy". `{FILEWORDS}` in it stands for the caption of '
        "each picture, or for the words of its name where it has none.",
        text=True,
        common=True,
        per_subject=True,
    )
    class_prompt: str | None = knob(
        None, 'Prompt of the class, without the token: "photo of a toy".', text=True, common=True, per_subject=True
    )
    concepts_list: str | tuple[Concept, ...] | None = knob(
        None,
        "Several subjects in one run: path of a JSON file, or the JSON itself: a list of {instance_data_dir, "
        "class_data_dir, instance_prompt, class_prompt}.",
        resume="free",
        path=True,
    )
    fleet: str | None = knob(
        None,
        "Many subjects, each trained by itself, one after another, with a model of its own: path of their list, a line "
        "of JSON each, in a channel ([fleets](fleets.md)).",
        resume="free",
        path=True,
    )
    fleet_outcomes: str | None = knob(
        None,
        "`s3://bucket/prefix`: a copy of each subject's manifest.json or failure.json, below its id: one listing tells "
        "how far a fleet is.",
        resume="free",
    )
    resolution: Annotated[int, Ge(64), Le(2048)] = knob(
        FAMILIES[DEFAULT].facts.resolution,
        f"Side of the training pictures, in pixels; a multiple of 8. {_other_resolutions()} if left out.",
        common=True,
    )
    center_crop: bool = knob(False, "Crop at the centre instead of at random.")
    aspect_ratio_buckets: bool | Auto = knob(
        "auto",
        "Train each picture in the shape that shows most of it, of at most resolution squared pixels; false: in "
        "squares. auto: unless center_crop is true.",
    )
    bucket_step: Literal[8, 64] = knob(
        64, "Sides of these shapes are multiples of this; 8 cuts off less and makes more shapes."
    )
    on_bad_image: Literal["error", "skip"] = knob(
        "error",
        "A picture that can't be used ends the job before anything is downloaded, or is left out.",
        resume="free",
    )
    hflip: bool = knob(False, "Mirror pictures at random.")
    max_token_length: Literal[75, 150, 225] = knob(
        75, "Longest prompt, in tokens; prompts over 75 are encoded in chunks of 75."
    )
    pad_tokens: bool = knob(True, "Pad prompts to the text encoder's full length.")
    shuffle_tags: bool = knob(False, "Shuffle the comma-separated parts of a prompt.")
    caption_dropout: Fraction = knob(
        0.0,
        "Probability of showing a picture with the empty prompt instead of its own; class pictures as well.",
    )
    background_weight: Annotated[float, Ge(0), Le(1)] | None = knob(
        None,
        "Weight in the loss of what lies outside of a picture's mask (`NAME-mask.png`, or its alpha channel); the "
        "subject has 1. None: masks have no part in the loss.",
    )

    def fit_to_base(self) -> Self:
        """Takes the base model's own resolution, where none is asked for."""
        if "resolution" not in self.model_fields_set:
            self._default("resolution", self.facts.resolution)
        return self

    def moved(self, values: Mapping[str, object]) -> Self:
        """A copy with paths that lie elsewhere, as explicit as they were; it may know its base model by now."""
        copy = self.model_copy()
        for name, value in values.items():
            copy._default(name, value)
        return copy.fit_to_base()

    def _default(self, name: str, value: object) -> None:
        """Sets a value that is as little explicit as a default."""
        object.__setattr__(self, name, value)

    @model_validator(mode="after")
    def _fitted_to_base(self) -> Self:
        return self.fit_to_base()

    @property
    def buckets(self) -> bool:
        """Whether pictures are trained in shapes of their own, with ``auto`` resolved."""
        return not self.center_crop if self.aspect_ratio_buckets == "auto" else self.aspect_ratio_buckets

    @property
    def inline_concepts(self) -> tuple[Concept, ...]:
        """The concepts given as JSON; empty where ``concepts_list`` is a path or is left out."""
        return self.concepts_list if isinstance(self.concepts_list, tuple) else ()

    @rule("instance_prompt", "concepts_list", "fleet")
    def _subject_has_a_prompt(self) -> Iterator[str]:
        if self.concepts_list is None and self.fleet is None and not self.instance_prompt:
            yield (
                "instance_prompt is missing; set it to the prompt of your subject with a rare token, such as "
                '"photo of zwx toy"'
            )
        for number, concept in enumerate(self.inline_concepts):
            if not (concept.instance_prompt or self.instance_prompt):
                yield f"concepts_list: concept {number} has no instance_prompt"

    @rule("fleet_outcomes")
    def _outcomes_go_to_s3(self) -> Iterator[str]:
        yield from refused_location("fleet_outcomes", self.fleet_outcomes)

    @rule("fleet", "concepts_list")
    def _subjects_of_a_fleet_are_by_themselves(self) -> Iterator[str]:
        if self.fleet is not None and self.concepts_list is not None:
            yield (
                "fleet trains each subject by itself, and concepts_list several in one model; leave one of the two out"
            )

    @rule("class_prompt", "concepts_list")
    def _class_has_no_captions(self) -> Iterator[str]:
        prompts = (self.class_prompt, *(concept.class_prompt for concept in self.inline_concepts))
        if any(FILEWORDS in prompt for prompt in prompts if prompt):
            yield f"class_prompt: {FILEWORDS} stands for the caption of a picture of the subject; leave it out"

    @rule("concepts_list")
    def _concepts_can_be_read(self) -> Iterator[str]:
        if self.concepts_list == ():
            yield "concepts_list is empty; name at least one concept or leave it out"
        if isinstance(self.concepts_list, str) and self.concepts_list.startswith("["):
            yield (
                f"concepts_list: {short(self.concepts_list)} is not valid JSON; set a JSON list of "
                f"{{{', '.join(Concept.model_fields)}}}, or the path of a file that holds one"
            )

    @rule("instance_prompt", "class_prompt")
    def _prompts_differ(self) -> Iterator[str]:
        if self.instance_prompt is not None and self.instance_prompt == self.class_prompt:
            yield "instance_prompt and class_prompt are the same; the instance prompt needs a rare token, such as zwx"

    @rule("resolution")
    def _resolution_is_a_multiple(self) -> Iterator[str]:
        if self.resolution % 8 != 0:
            nearest = max(64, round(self.resolution / 8) * 8)
            yield f"resolution={self.resolution} is not a multiple of 8; set {nearest}"

    @rule("instance_data_dir", "class_data_dir")
    def _folders_differ(self) -> Iterator[str]:
        if self.instance_data_dir.rstrip("/") == self.class_data_dir.rstrip("/"):
            yield (
                f"instance_data_dir and class_data_dir are the same directory, {self.instance_data_dir}; give each "
                "its own"
            )

    @rule("models_path", "instance_data_dir")
    def _pictures_do_not_leave_with_the_model(self) -> Iterator[str]:
        if PurePosixPath(self.instance_data_dir).is_relative_to(self.models_path):
            yield (
                f"models_path={self.models_path} holds instance_data_dir: SageMaker packs all that lies there with the "
                f"model; give the model a directory of its own, such as {DEFAULT_MODELS_PATH}"
            )
