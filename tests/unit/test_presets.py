"""Presets: what a job gets, what wins over it, and that none makes an error of a job that is right without it."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.declare import meaning
from dreambooth_sm.knobs.presets import PRESET_KNOBS, PRESETS
from dreambooth_sm.knobs.takes import choices
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sagemaker import Contract, localize
from launcher.estimates import estimate_on
from launcher.instances import INSTANCES
from launcher.prepare import prepare_local

ROOT = Path(__file__).parents[2]
FIELDS = Hyperparameters.model_fields
PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
TRAINED = [(name, method) for name, family in FAMILIES.items() for method in family.facts.methods]
LORA = {"method": "lora"}
HERE = {**PROMPTS, "instance_type": "local", "resolution": 64}


def parse(**values: Any) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, **values})


def test_the_presets_are_the_knobs_choices() -> None:
    assert set(choices(FIELDS["preset"].annotation)) == set(PRESETS)
    assert set(PRESET_KNOBS) < set(FIELDS)


@pytest.mark.parametrize(
    ("preset", "method", "steps", "prior"),
    [
        (None, "lora", None, "images"),
        ("object", "full", 400, "images"),
        ("object", "lora", 400, "images"),
        ("face", "full", 1000, "images"),
        ("face", "pivotal", 1000, "images"),
        ("face", "textual_inversion", None, "images"),
        ("style", "lora", None, "output"),
        ("style", "full", None, "images"),
    ],
)
def test_what_a_job_gets(preset: str | None, method: str, steps: int | None, prior: str) -> None:
    h = parse(preset=preset, method=method)
    assert (h.max_train_steps, h.prior) == (steps, prior)


@pytest.mark.parametrize(("family", "method"), TRAINED)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_goes_with_every_method_of_every_family(preset: str, family: str, method: str) -> None:
    asked = {"base_architecture": family, "method": method}
    for class_prompt, card in itertools.product((PROMPTS["class_prompt"], None), ("H200", "A10G", "CPU")):
        try:
            make_plan(parse(**asked, class_prompt=class_prompt), CARDS[card])
        except UserError:
            continue
        h = parse(**asked, class_prompt=class_prompt, preset=preset)
        assert h.model_fields_set == parse(**asked, class_prompt=class_prompt).model_fields_set | {"preset"}
        assert (h.preset_note or "").startswith(f"preset={preset} sets ")
        assert h.preset_note in make_plan(h, CARDS[card]).notes
        assert h.fit_to_base() == h


@pytest.mark.parametrize(("preset", "value"), [(name, value) for name, values in PRESETS.items() for value in values])
def test_what_is_set_wins(preset: str, value: Any) -> None:
    method = value.methods[0]
    assert getattr(parse(preset=preset, method=method), value.name) == value.value
    others: dict[str, list[object]] = {"max_train_steps": [7], "prior": ["images", "dco"]}
    for other in others[value.name]:
        h = parse(preset=preset, method="lora", **{value.name: other})
        assert getattr(h, value.name) == other
        assert value.setting not in (h.preset_note or "")
    unset = FIELDS[value.name].default
    for name, other in {"num_train_epochs": 3, "num_class_images": 7, "class_data_dir": "/c"}.items():
        h = parse(preset=preset, method=method, **{name: other})
        assert getattr(h, value.name) == (unset if name in value.unless else value.value)


def test_a_value_that_contradicts_what_is_set_is_left_out() -> None:
    h = parse(preset="object", lr_scheduler="cosine", lr_warmup_steps=500)
    assert h.max_train_steps is None
    assert h.preset_note == "preset=object sets nothing with method=full and the values that are set"
    assert parse(preset="face", lr_scheduler="cosine", lr_warmup_steps=500).max_train_steps == 1000


def test_a_value_that_a_family_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    name, family = next((name, family) for name, family in FAMILIES.items() if "lora" in family.facts.methods)
    takes = {**family.facts.takes, "prior": (("images",), "it has no other")}
    monkeypatch.setattr(type(family), "facts", dataclasses.replace(family.facts, takes=takes))
    assert parse(**LORA, base_architecture=name, preset="style").prior == "images"
    with pytest.raises(UserError, match="it has no other"):
        parse(**LORA, base_architecture=name, prior="output")


def test_a_wrong_preset_is_one_clear_line() -> None:
    with pytest.raises(UserError) as caught:
        parse(preset="portrait")
    assert caught.value.problems == ["preset: 'portrait' is not valid; set one of object, face, style, None"]
    assert parse(preset="Face") == parse(preset="face")


def test_the_container_works_out_the_same() -> None:
    h = parse(**LORA, preset="style")
    sent = h.to_sagemaker()
    assert sent["preset"] == "style"
    assert "prior" not in sent
    assert Hyperparameters.parse(sent) == h


def test_paths_that_lie_elsewhere_are_not_set_by_that(tmp_path: Path) -> None:
    h = parse(**LORA, preset="style")
    moved = localize(h, Contract(tmp_path))
    assert moved.class_data_dir.startswith(str(tmp_path))
    assert moved.prior == "output"
    assert moved.model_fields_set == h.model_fields_set


def test_a_job_is_resumed_as_if_the_values_were_set() -> None:
    same = Hyperparameters.names_where(lambda knob: knob.resume == "same")
    with_preset, without = parse(**LORA, preset="style"), parse(**LORA, prior="output")
    assert with_preset.model_dump(include=set(same)) == without.model_dump(include=set(same))
    assert with_preset.model_dump(include=set(same)) != parse(**LORA).model_dump(include=set(same))
    assert meaning(FIELDS["preset"]).resume == "free"


def test_estimates_are_of_what_the_preset_sets() -> None:
    instance = INSTANCES["ml.g5.xlarge"]
    minutes = [estimate_on(parse(**LORA, preset=preset), instance).minutes or 0 for preset in ("object", None, "face")]
    assert minutes == sorted(set(minutes))


def test_the_launcher_passes_it_on(pictures: Path) -> None:
    prepared = prepare_local({"images": pictures, "preset": "face", **HERE})
    assert prepared.hyperparameters.max_train_steps == 1000
    assert prepared.hyperparameters.to_sagemaker()["preset"] == "face"


def test_class_images_that_are_given_are_used(pictures: Path) -> None:
    asked = {"images": pictures, "preset": "style", **LORA, **HERE}
    assert prepare_local(asked).hyperparameters.prior == "output"
    assert prepare_local(asked | {"class_images": pictures}).hyperparameters.prior == "images"


def test_the_docs_say_what_each_preset_sets() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = text.partition("## Presets")[2].partition("\n## ")[0]
    for preset, values in PRESETS.items():
        (line,) = (line for line in section.splitlines() if line.startswith(f"| `{preset}` |"))
        assert all(f"`{value.setting}`" in line for value in values)
