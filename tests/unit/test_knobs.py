"""Declarations of knobs: what is said once, in a knob's own file, holds wherever knobs are read."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest

import launcher.options
from dreambooth_sm.command_line import add_options, read_options
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.declare import Alias, Knobs, Tunable, knob, meaning, rule
from dreambooth_sm.knobs.docs import markdown_table
from dreambooth_sm.knobs.ranges import Auto, Few

PROMPT = {"instance_prompt": "photo of zwx toy"}
FIELDS = Hyperparameters.model_fields


class Sparkle(Hyperparameters):
    """A job with a few knobs more."""

    group = "Sparkle"

    sparkle: Few | Auto = knob(
        "auto", "How much it sparkles.", common=True, tunable=Tunable(1, 100), aliases=(Alias("glimmer"),)
    )
    sparkle_file: str | None = knob(None, "Where the sparkle comes from.", resume="free", path=True)
    sparkle_prompt: str | None = knob(None, "What sparkles.", text=True)
    grains: Few = knob(4, "Grains of glitter.", methods=("hypernetwork",))

    @rule("sparkle", "sparkle_file")
    def _sparkle_has_a_source(self) -> Iterator[str]:
        if self.sparkle != "auto" and self.sparkle_file is None:
            yield "sparkle needs sparkle_file; set it, or leave sparkle out"

    @rule("sparkle_file", "seed")
    def _file_is_not_seeded(self) -> Iterator[str]:
        if self.sparkle_file == "/seeded" and self.seed is not None:
            yield "sparkle_file=/seeded has its own seed; leave seed out"


OWN = [name for name in Sparkle.model_fields if name not in FIELDS]


def problems(**values: object) -> list[str]:
    with pytest.raises(UserError) as caught:
        Sparkle.parse({**PROMPT, **values})
    return caught.value.problems


# A new knob is one field


def test_a_new_knob_is_in_the_schema() -> None:
    assert list(Sparkle.model_fields) == [*FIELDS, *OWN]
    schema = Sparkle.model_json_schema()["properties"]
    assert schema["sparkle"]["description"] == "How much it sparkles."
    assert schema["sparkle"]["common"]
    assert schema["sparkle"]["tunable"] == {"least": 1, "most": 100, "logarithmic": False}
    assert schema["sparkle"]["aliases"] == ["glimmer"]
    assert (schema["sparkle"]["resume"], schema["sparkle_file"]["resume"]) == ("same", "free")
    assert schema["sparkle_file"]["path"]
    assert schema["grains"]["methods"] == ["hypernetwork"]


def test_the_table_names_defaults_that_are_a_methods_own() -> None:
    rates = ("2e-06`", "lora `0.0001`", "hypernetwork `0.0001`", "textual_inversion `0.0005`", "pivotal `0.0001`")
    assert f"| `learning_rate` | `{', with method='.join(rates)} |" in markdown_table(Hyperparameters)


def test_a_new_knob_is_in_the_table_under_its_heading() -> None:
    table = markdown_table(Sparkle)
    assert table.startswith(markdown_table(Hyperparameters))
    _, _, own = table.partition("### Sparkle\n")
    assert re.findall(r"^\| `(\w+)`", own, re.M) == OWN
    assert "| `sparkle` | `auto` | a whole number, at least 1, at most 1000, or auto | How much it sparkles. |" in own


def test_a_new_knob_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(prog="test")
    add_options(parser, Sparkle.model_fields, Sparkle.group_of, everything=False)
    parser.print_help()
    text = capsys.readouterr().out
    assert "--sparkle " in text
    assert "--glimmer" in text
    assert "Sparkle:" in text
    assert "--grains" not in text  # --help-all shows it
    options = vars(parser.parse_args(["--glimmer", "3", "--grains", "2"]))
    assert read_options(options, Sparkle.model_fields) == {"sparkle": ["3"], "grains": ["2"]}


def test_a_new_knob_is_a_keyword_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.options, "Hyperparameters", Sparkle)

    @launcher.options.with_options("local")
    def fit(**options: object) -> None:
        """Fits."""

    assert set(OWN) <= set(inspect.signature(fit).parameters)
    assert "\nsparkle: How much it sparkles.\n" in (fit.__doc__ or "")
    found: Any = launcher.options.split_options({"sparkle": 3, "glimmer": 3}, launcher.options.Problems())
    assert found[2] == {"sparkle": 3, "glimmer": 3}


def test_a_new_knob_is_read_and_sent_like_any() -> None:
    job = Sparkle.parse({**PROMPT, "glimmer": '"7"', "sparkle_file": "/opt/x", "sparkle_prompt": r"a\ toy"})
    assert (job.sparkle, job.sparkle_file, job.sparkle_prompt) == (7, "/opt/x", "a toy")
    assert Sparkle.parse(job.to_sagemaker()) == job
    assert "sparkle_file" in Sparkle.names_where(lambda each: each.path)
    assert problems(sparkl="3") == ["sparkl: unknown hyperparameter; did you mean sparkle?"]
    assert problems(sparkle="3", glimmer="4", sparkle_file="/opt/x") == [
        "glimmer and sparkle mean the same and have different values; keep one"
    ]


# Rules


def test_a_rule_is_asked_unless_one_of_its_knobs_is_refused() -> None:
    assert problems(sparkle="3") == ["sparkle needs sparkle_file; set it, or leave sparkle out"]
    (line,) = problems(sparkle="much")
    assert line.startswith("sparkle: 'much' is not valid")
    (line,) = problems(sparkle="3", sparkle_file=["/opt/x"])
    assert line.startswith("sparkle_file: ['/opt/x'] is not valid")
    # Another knob's refusal silences no rule, whatever its text names.
    told = problems(sparkle="3", seed="-1")
    assert len(told) == 2
    assert "sparkle needs sparkle_file; set it, or leave sparkle out" in told


def test_a_rule_about_a_knob_that_does_not_exist_is_an_error_of_the_program() -> None:
    with pytest.raises(TypeError, match=r"the rule _never of Broken is about knobs that do not exist: .*sparkel"):

        class Broken(Sparkle):
            @rule("sparkel")
            def _never(self) -> Iterator[str]:
                yield ""


@pytest.mark.parametrize("name", Hyperparameters.rules())
def test_a_rule_names_every_knob_that_it_reads(name: str) -> None:
    named = Hyperparameters.rules()[name]
    source = inspect.getsource(getattr(Hyperparameters, name))
    behind = {
        "inline_concepts": {"concepts_list"},
        "prior_preservation": {"with_prior_preservation", "class_prompt"},
        "_prompts": {"instance_prompt", "class_prompt", "concepts_list"},
        "_placeholder": {"placeholder_token"},
        "architecture": {"base_architecture", "pretrained_model_name_or_path"},
        "facts": {"base_architecture", "pretrained_model_name_or_path"},
    }
    read = set(re.findall(r"self\.(\w+)", source))
    for word in read:
        assert behind.get(word, {word}) <= set(named), word
    by_others = {"concepts_list"}.union(*(behind[word] for word in read & behind.keys()))
    assert all(f"{knob}" in source.partition("def ")[2] or knob in by_others for knob in named)


# Methods


def test_a_knob_of_another_method_is_refused_with_its_name() -> None:
    assert Sparkle.parse({**PROMPT, "method": "hypernetwork", "grains": "8"}).grains == 8
    line = "grains belongs to method=hypernetwork, and this job's is full; leave grains out"
    assert problems(grains="8") == [line]
    assert problems(grains="4") == [line]  # its default, but somebody set it
    assert Sparkle.parse(PROMPT).grains == 4


# What is declared


def test_every_knob_has_a_heading_and_a_help_text() -> None:
    headings = list(dict.fromkeys(map(Hyperparameters.group_of, FIELDS)))
    assert headings == [each.group for each in reversed(Hyperparameters.__mro__) if "group" in vars(each)]
    assert all(
        field.description and isinstance(field.json_schema_extra, type(meaning(field))) for field in FIELDS.values()
    )


def test_paths_and_prompts_are_what_they_say() -> None:
    assert set(Hyperparameters.names_where(lambda each: each.path)) == {
        "pretrained_model_name_or_path",
        "pretrained_vae_name_or_path",
        "pretrained_parts_name_or_path",
        "models_path",
        "instance_data_dir",
        "class_data_dir",
        "concepts_list",
        "fleet",
    }
    assert set(Hyperparameters.names_where(lambda each: each.text)) == {
        "initial_text",
        *(name for name in FIELDS if name.endswith("_prompt")),
    }


@pytest.mark.parametrize("name", Hyperparameters.names_where(lambda each: each.tunable is not None))
def test_what_a_search_goes_over_is_accepted(name: str) -> None:
    tunable = meaning(FIELDS[name]).tunable
    assert tunable is not None
    assert tunable.least < tunable.most
    methods = meaning(FIELDS[name]).methods
    owner = {"method": methods[0]} if methods else {}
    for value in (tunable.least, tunable.most):
        assert getattr(Hyperparameters.parse({**PROMPT, **owner, name: str(value)}), name) == value
    default = FIELDS[name].default
    assert default is None or tunable.least <= default <= tunable.most


def test_a_group_knows_the_groups_below_it_alone() -> None:
    for group in Hyperparameters.__mro__[1:]:
        if issubclass(group, Knobs):
            assert all(set(named) <= set(group.model_fields) for named in group.rules().values())
