"""The recipes that :mod:`benchmarks.recipes` compares, as data: what is searched for each way of teaching, and what is
compared with the findings. The most important ones come first: a run that ends early leaves out the others."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.common import PROMPTS
from dreambooth_sm import toybox

Values = Mapping[str, Any]

# What all recipes have, unless they say otherwise. What a plan would choose by the card is said: all train the
# denoiser alone, and keep no average.
COMMON: Values = {
    **PROMPTS,
    "pretrained_model_name_or_path": toybox.NAME,
    "resolution": toybox.SIDE,
    "train_batch_size": 4,
    "prior_loss_weight": 1.0,
    "num_class_images": 48,
    "train_text_encoder": False,
    "use_ema": False,
}
# After so many steps weights are judged while a rate is searched.
SCREENED_STEPS = (100, 200, 400)
# Those that show how a recipe goes on.
CURVE_STEPS = (50, 100, 150, 200, 300, 400)
REFERENCE = "lora"


@dataclass(frozen=True)
class Recipe:
    """One way of teaching.

    Attributes:
        name: of all that differ in the searched hyperparameters alone.
        values: hyperparameters beside ``COMMON``.
        steps: after these the weights are judged; the last are those of the recipe.
        judged: after these as well.
    """

    name: str
    values: Values
    steps: int
    judged: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Tells a recipe from all others of a stage."""
        return f"{self.name} {self.steps} {json.dumps(self.values, sort_keys=True)}"


@dataclass(frozen=True)
class Search:
    """A way of teaching, and the hyperparameters that are searched for it: all combinations of ``grid``."""

    name: str
    values: Values
    grid: Mapping[str, Sequence[Any]]

    def recipes(self) -> Iterator[Recipe]:
        *judged, steps = SCREENED_STEPS
        for point in itertools.product(*self.grid.values()):
            yield Recipe(self.name, {**self.values, **dict(zip(self.grid, point, strict=True))}, steps, tuple(judged))


@dataclass(frozen=True)
class Compared:
    """A recipe to compare.

    Attributes:
        of: the search whose findings it takes.
        values: that it has instead of the search's.
        curve: whether it is judged on the way.
        longer: by how much it is trained longer than what was found.
        text_encoder_factor: of the rate that was found, for text encoders.
    """

    name: str
    of: str
    values: Values = field(default_factory=dict)
    curve: bool = False
    longer: int = 1
    text_encoder_factor: float | None = None


def _rates(*rates: float) -> dict[str, tuple[float, ...]]:
    return {"learning_rate": rates}


_LORA: Values = {"method": "lora", "lora_targets": "attention"}
_ADAPTERS = _rates(5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
_FEWER = _rates(5e-4, 1e-3, 2e-3, 4e-3)
_OF_WHOLE_MODELS = _rates(5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
_OF_WORDS = _rates(1e-3, 3e-3, 1e-2, 3e-2)
_NO_PRIOR: Values = {"with_prior_preservation": False}

SEARCHES = (
    Search("lora", _LORA, _ADAPTERS),
    Search("full", {"method": "full"}, _OF_WHOLE_MODELS),
    Search("lora, rank 4", {**_LORA, "lora_rank": 4}, _rates(1e-3, 2e-3, 4e-3, 8e-3)),
    Search("lora, rank 64", {**_LORA, "lora_rank": 64}, _rates(2.5e-4, 5e-4, 1e-3, 2e-3)),
    Search("textual inversion", {"method": "textual_inversion"}, _OF_WORDS),
    Search("textual inversion, 4 vectors", {"method": "textual_inversion", "num_vectors": 4}, _OF_WORDS),
    Search("pivotal", {**_LORA, "method": "pivotal"}, _FEWER),
    Search("dora", {**_LORA, "lora_variant": "dora"}, _FEWER),
    Search("oft", {**_LORA, "lora_variant": "oft"}, _rates(1e-3, 3e-3, 1e-2, 3e-2)),
    Search("lokr", {**_LORA, "lora_variant": "lokr"}, _rates(1e-3, 3e-3, 1e-2, 3e-2)),
    Search("loha", {**_LORA, "lora_variant": "loha"}, _rates(1e-3, 3e-3, 1e-2, 3e-2)),
    Search("lora, no prior", {**_LORA, **_NO_PRIOR}, _rates(1e-3, 2e-3, 4e-3)),
    Search("lora, prior=output", {**_LORA, "prior": "output"}, _rates(1e-3, 2e-3, 4e-3)),
    Search("lora, prior=dco", {**_LORA, "prior": "dco"}, {"dco_beta": (0.1, 1.0), **_rates(1e-3, 2e-3, 4e-3)}),
    Search(
        "lora, distance penalty",
        {**_LORA, **_NO_PRIOR},
        {"distance_penalty": (1e-4, 1e-3, 1e-2, 1e-1), **_rates(2e-3, 4e-3)},
    ),
    Search("lora+, ratio 16", {**_LORA, "lora_plus_ratio": 16}, _rates(1.25e-4, 2.5e-4, 5e-4, 1e-3)),
    Search("prodigy", {**_LORA, "optimizer": "prodigy"}, _rates(0.5, 1.0, 2.0)),
    Search("adafactor", {**_LORA, "optimizer": "adafactor"}, _FEWER),
    Search("lion", {**_LORA, "optimizer": "lion", "adam_beta2": 0.99}, _rates(1e-4, 2e-4, 4e-4, 8e-4)),
    Search("schedule-free", {**_LORA, "optimizer": "schedule_free"}, _rates(1e-3, 2e-3, 4e-3, 8e-3)),
    Search("lora, text encoder", {**_LORA, "train_text_encoder": True}, _FEWER),
    Search("full, text encoder", {"method": "full", "train_text_encoder": True}, _rates(5e-5, 1e-4, 2e-4, 4e-4)),
    Search("lora, rank 8", {**_LORA, "lora_rank": 8}, _rates(1e-3, 2e-3, 4e-3, 8e-3)),
    Search("lora, rank 32", {**_LORA, "lora_rank": 32}, _FEWER),
    Search("hypernetwork", {"method": "hypernetwork"}, _FEWER),
    Search("lora, targets=linear", {**_LORA, "lora_targets": "linear"}, _FEWER),
    Search("lora, targets=all", {**_LORA, "lora_targets": "all"}, _FEWER),
    Search("lora+, ratio 4", {**_LORA, "lora_plus_ratio": 4}, _rates(2.5e-4, 5e-4, 1e-3, 2e-3)),
    Search("full, no prior", {"method": "full", **_NO_PRIOR}, _rates(1e-4, 2e-4, 4e-4)),
    Search("full, prior=output", {"method": "full", "prior": "output"}, _rates(1e-4, 2e-4, 4e-4)),
    Search(
        "lora, rank 64, stabilised",
        {**_LORA, "lora_rank": 64, "lora_rank_stabilised": True},
        _rates(1.25e-4, 2.5e-4, 5e-4, 1e-3),
    ),
    Search("lora, batch 1", {**_LORA, "train_batch_size": 1}, _rates(5e-4, 1e-3, 2e-3)),
)


def _found(*names: str) -> tuple[Compared, ...]:
    """Searches as they are."""
    return tuple(Compared(name, name) for name in names)


def _lora(name: str, **values: Any) -> Compared:
    """The reference with other values."""
    return Compared(f"lora, {name}", REFERENCE, values)


COMPARED = (
    Compared("lora", "lora", curve=True),
    Compared("full", "full", curve=True),
    *_found("lora, rank 4", "lora, rank 64"),
    *_found("textual inversion", "textual inversion, 4 vectors", "pivotal", "dora", "oft", "lokr", "loha"),
    *_found("lora, no prior", "lora, prior=output", "lora, prior=dco", "lora, distance penalty"),
    _lora("EMA", use_ema=True),
    _lora("T-LoRA, least rank 8", lora_min_rank=8),
    *_found("lora+, ratio 16", "prodigy", "adafactor", "lion", "schedule-free"),
    *_found("lora, text encoder", "full, text encoder"),
    _lora("prior_loss_weight 0.5", prior_loss_weight=0.5),
    Compared("full, EMA", "full", {"use_ema": True}),
    Compared("full, optimizer=adamw", "full", {"optimizer": "adamw"}),
    *_found("lora, rank 8", "lora, rank 32"),
    _lora("snr_gamma 5", snr_gamma=5.0),
    _lora("debiased loss", debiased_loss=True),
    _lora("noise_offset 0.05", noise_offset=0.05),
    _lora("loss=huber", loss="huber"),
    _lora("dropout 0.1", lora_dropout=0.1),
    *_found("hypernetwork", "lora, targets=linear", "lora, targets=all", "lora+, ratio 4"),
    *_found("full, no prior", "full, prior=output"),
    _lora("lr_scheduler=cosine", lr_scheduler="cosine"),
    *_found("lora, rank 64, stabilised", "lora, batch 1"),
    Compared("lora, text encoder at a fifth", "lora, text encoder", text_encoder_factor=0.2),
    Compared("lora, batch 1, four times the steps", "lora, batch 1", longer=4),
    _lora("T-LoRA, least rank 1", lora_min_rank=1),
    _lora("init=orthogonal", lora_init="orthogonal"),
    _lora("no weight decay", adam_weight_decay=0.0),
    _lora("16 class images", num_class_images=16),
    Compared("full, snr_gamma 5", "full", {"snr_gamma": 5.0}),
)


@dataclass(frozen=True)
class Choice:
    """What a search found: the values and steps of the best recipe, and its score."""

    values: Values
    steps: int
    score: float


def recipes_to_compare(choices: Mapping[str, Choice]) -> Iterator[Recipe]:
    """The recipes of ``COMPARED`` with what the searches found; those whose search is missing are left out."""
    for compared in COMPARED:
        if choice := choices.get(compared.of):
            values = {**choice.values, **compared.values}
            if compared.text_encoder_factor:
                values["text_encoder_lr"] = compared.text_encoder_factor * values["learning_rate"]
            steps = choice.steps * compared.longer
            judged = tuple(step for step in CURVE_STEPS if step != steps) if compared.curve else ()
            yield Recipe(compared.name, values, steps, judged)


def recipes_to_try(steps: int) -> Iterator[Recipe]:
    """All of ``COMPARED`` with the first values of their searches, for so few steps: whether they run at all."""
    firsts = {search.name: next(search.recipes()) for search in SEARCHES}
    choices = {name: Choice({"num_class_images": 2, **recipe.values}, steps, 0.0) for name, recipe in firsts.items()}
    for recipe in recipes_to_compare(choices):
        yield replace(recipe, judged=())
