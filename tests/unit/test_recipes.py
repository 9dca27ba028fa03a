"""Recipes are compared by what was measured: choices, paired differences, tables, and one run in small."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import recipes
from benchmarks.common import PROMPTS
from benchmarks.recipe_list import COMMON, COMPARED, SEARCHES, Choice, Recipe, recipes_to_compare, recipes_to_try
from benchmarks.recipe_runner import Runner
from benchmarks.recipe_table import FIGURES, choose, final_lines, markdown, read_rows, summarise, svg
from benchmarks.recipes import Run, missing, run_all
from benchmarks.studio import draw_together
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import load_base
from dreambooth_sm.planning.cards import CARDS, CPU
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw, make_sampler

RECIPE = Recipe("lora", {"method": "lora", "learning_rate": 1e-3}, 2, (1,))


def row(recipe: str, toy: str, score: float, *, rate: float = 1.0, steps: int = 100, **figures: Any) -> dict[str, Any]:
    values = {"recipe": recipe, "values": {"learning_rate": rate}, "toy": toy, "seed": 0, "steps": steps}
    return {**values, "is_last": True, **dict.fromkeys(FIGURES, score), **figures}


# The list


@pytest.mark.slow
def test_all_recipes_are_hyperparameters_that_a_card_can_run() -> None:
    for recipe in recipes_to_try(2):
        make_plan(Hyperparameters.parse({**COMMON, **recipe.values}), CARDS["H200"])


def test_every_search_is_compared() -> None:
    searched = list(itertools.chain.from_iterable(search.recipes() for search in SEARCHES))
    assert len({recipe.key for recipe in searched}) == len(searched)
    assert {search.name for search in SEARCHES} == {compared.of for compared in COMPARED}
    names = [compared.name for compared in COMPARED]
    assert len(set(names)) == len(names)


def test_what_is_compared_has_what_was_found() -> None:
    found = {"lora": Choice({"method": "lora", "learning_rate": 3e-3}, 150, 0.9)}
    compared = {recipe.name: recipe for recipe in recipes_to_compare(found)}
    assert "full" not in compared
    assert compared["lora"].steps == 150
    assert 150 not in compared["lora"].judged
    assert compared["lora, EMA"].values == {"method": "lora", "learning_rate": 3e-3, "use_ema": True}


# Choices


def test_the_best_point_is_chosen_and_the_fewest_steps_that_are_as_good() -> None:
    rows = [
        row("lora", toy, score, rate=rate, steps=steps)
        for toy in ("cat", "car")
        for rate, steps, score in [(1, 100, 0.5), (1, 400, 0.9), (2, 100, 0.7), (2, 200, 0.895), (2, 400, 0.8)]
    ]
    assert choose(rows)["lora"] == Choice({"learning_rate": 2}, 200, pytest.approx(0.895))


def test_points_that_diverged_or_miss_a_subject_are_not_chosen() -> None:
    rows = [row("lora", toy, 0.5) for toy in ("cat", "car")]
    rows += [row("lora", "cat", 0.9, rate=2), {**row("lora", "car", 0, rate=2), "error": "not finite"}]
    rows += [row("lora", "cat", 0.9, rate=3)]
    assert choose(rows)["lora"].values == {"learning_rate": 1}
    assert choose([{**row("lora", "car", 0), "error": "not finite"}]) == {}


# Differences


def test_differences_are_paired_by_subject_and_seed() -> None:
    noise = random.Random(0)
    cases = [(toy, seed) for toy in ("cat", "car", "cup") for seed in range(3)]
    scores = {name: {case: noise.random() for case in cases} for name in ("lora", "full")}
    rows = [
        {**row(name, toy, value), "seed": seed} for name, its in scores.items() for (toy, seed), value in its.items()
    ]
    noise.shuffle(rows)
    lines = {line.recipe: line for line in summarise(rows, "lora")}
    ours, theirs = (np.array([scores[name][case] for case in cases]) for name in ("full", "lora"))
    found = lines["full"].figures["score"]
    assert (found.mean, found.deviation) == pytest.approx((ours.mean(), ours.std(ddof=1)))
    assert found.difference == pytest.approx((ours - theirs).mean())
    assert found.error == pytest.approx(math.sqrt((ours - theirs).var(ddof=1) / len(cases)))
    assert found.is_noise == (abs(found.difference) < 2 * found.error)
    assert lines["lora"].figures["score"].difference == 0


def test_a_difference_that_all_subjects_have_is_more_than_noise() -> None:
    own = {"cat": 0.2, "car": 0.5, "cup": 0.8}
    shifts = {"cat": 0.10, "car": 0.11, "cup": 0.12}
    rows = [row("lora", toy, score) for toy, score in own.items()]
    rows += [row("better", toy, score + shifts[toy]) for toy, score in own.items()]
    rows += [row("other", toy, score + sign) for (toy, score), sign in zip(own.items(), (0.1, -0.1, 0.05), strict=True)]
    rows += [row("once", "cat", 0.9)]
    figures = {line.recipe: line.figures["score"] for line in summarise(rows, "lora")}
    assert not figures["better"].is_noise
    assert figures["better"].deviation > figures["better"].difference  # unpaired, nobody could tell
    assert figures["other"].is_noise
    assert figures["once"].is_noise


def test_weights_on_the_way_are_lines_of_their_own() -> None:
    rows = [{**row("lora", "cat", 0.3, steps=50), "is_last": False}, row("lora", "cat", 0.6, steps=100)]
    rows += [{**row("lora", "cat", 0), "error": "not finite"}]
    assert [(line.steps, line.runs) for line in summarise(rows, "lora")] == [(50, 1), (100, 1)]
    (line,) = final_lines(rows, "lora")
    assert (line.steps, line.diverged) == (100, 1)
    assert summarise(rows, "lora")[0].figures["score"].difference == pytest.approx(-0.3)


# What is shown


def test_table_and_figure_show_every_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(name, toy, value) for name, value in (("lora", 0.5), ("a & b", 0.9)) for toy in ("cat", "car")]
    (tmp_path / "compare.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows) + '{"recipe": "cut')
    recipes.show(tmp_path, tmp_path / "figure.svg")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| lora", "| a & b"]
    assert "+0.400 ± 0.000" in lines[3]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [line["score"]["mean"] for line in summary["recipes"]] == [0.5, 0.9]
    drawn = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert len(drawn.findall("{*}circle")) == 2
    assert {"lora", "a & b"} <= {text.text for text in drawn.findall("{*}text")}


def test_what_is_higher_is_drawn_higher() -> None:
    rows = [row("low", "cat", 0.5, kept=0.5), row("high", "cat", 0.5, kept=0.9)]
    drawn = ElementTree.fromstring(svg(final_lines(rows, "low"), "low"))
    high, low = (float(circle.attrib["cy"]) for circle in drawn.findall("{*}circle"))
    assert high < low
    assert "within noise" not in markdown(final_lines(rows, "low"), "low")


# Runs


class Fake:
    """A worker that answers at once."""

    def run(self, run: Run) -> dict[str, Any]:
        if run.toy == "car":
            return {"rows": [], "diverged": "not finite"}
        if run.toy == "cup":
            return {"rows": [], "broken": "out of memory"}
        return {"rows": [{"steps": 2, "is_last": True, "score": 0.5}]}


def test_runs_that_are_written_down_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "compare.jsonl"
    runs = [Run(RECIPE, toy, seed) for toy in ("cat", "car", "cup") for seed in (0, 1)]
    run_all(runs, [Fake(), Fake()], file, None)  # type: ignore[list-item]
    rows = read_rows(file)
    assert sorted((each["toy"], each["seed"], each.get("error")) for each in rows if each["toy"] == "car") == [
        ("car", 0, "not finite"),
        ("car", 1, "not finite"),
    ]
    assert "out of memory" in capsys.readouterr().err
    assert [(run.toy, run.seed) for run in missing(iter(runs), file, [])] == [("cup", 0), ("cup", 1)]
    assert missing(iter(runs), tmp_path / "other.jsonl", ["full"]) == []


def test_no_run_starts_after_its_time(tmp_path: Path) -> None:
    run_all([Run(RECIPE, "cat", 0)], [Fake()], tmp_path / "compare.jsonl", 1e-9)  # type: ignore[list-item]
    assert read_rows(tmp_path / "compare.jsonl") == []


def test_nothing_more_is_run_where_all_that_ran_broke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_all([Run(RECIPE, "cup", seed) for seed in range(9)], [Fake()], tmp_path / "compare.jsonl", None)  # type: ignore[list-item]
    assert "7 not started" in capsys.readouterr().err


@pytest.mark.slow
def test_a_recipe_is_trained_and_judged_on_the_way(tmp_path: Path) -> None:
    runner = Runner(tmp_path, a_place=1, of_class=2, drawing_steps=2)
    small = {"num_class_images": 2, "train_batch_size": 1}
    rows = runner.run(Recipe("lora", {**RECIPE.values, **small}, 2, (1,)), "teal_hatter", 0)
    assert [(each["steps"], each["is_last"]) for each in rows] == [(1, False), (2, True)]
    assert set(FIGURES) <= set(rows[0])
    assert rows[0]["nearest"] != rows[1]["nearest"] or rows[0]["subject"] != rows[1]["subject"]
    (again,) = runner.run(Recipe("lora", {**RECIPE.values, **small}, 1), "teal_hatter", 0)
    assert {name: again[name] for name in FIGURES} == {name: rows[0][name] for name in FIGURES}


@pytest.mark.slow
def test_pictures_that_are_drawn_together_are_those_of_jobs() -> None:
    h = Hyperparameters.parse(COMMON)
    base, plan = load_base(h), make_plan(h, CPU)
    asked = [PROMPTS["class_prompt"], "photo of a cat toy at night"]
    together = draw_together(base, plan, asked, [3, 4], guidance=3.0, steps=2)
    for prompt, seed, picture in zip(asked, [3, 4], together, strict=True):
        sampler = make_sampler(base, plan, [prompt], 3.0)
        ((alone,),) = draw(sampler, prompt, [seed], resolution=COMMON["resolution"], steps=2, guidance=3.0)
        assert np.abs(np.asarray(alone, int) - np.asarray(picture, int)).max() <= 2
