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
from benchmarks.recipe_figure import svg
from benchmarks.recipe_list import COMMON, COMPARED, SEARCHES, Choice, Recipe, recipes_to_compare, recipes_to_try
from benchmarks.recipe_runner import Runner
from benchmarks.recipe_table import FIGURES, choose, curves, final_lines, markdown, read_rows, summarise
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
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| a & b", "| lora"]
    assert "+0.400 ± 0.000" in lines[2]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [line["score"]["mean"] for line in summary["recipes"]] == [0.5, 0.9]
    drawn = ElementTree.parse(tmp_path / "figure.svg").getroot()
    assert {"lora", "a & b"} <= {text.text for text in drawn.findall("{*}text")}
    assert {title.text for title in drawn.findall(".//{*}title")} == {"lora", "a & b"}


def test_differences_within_noise_are_in_brackets() -> None:
    rows = [row("lora", toy, 0.5) for toy in ("cat", "car")]
    rows += [row("other", "cat", 0.9), row("other", "car", 0.2), row("better", "cat", 0.7), row("better", "car", 0.8)]
    better, other, lora = markdown(final_lines(rows, "lora"), "lora").splitlines()[2:]
    assert better.endswith("| +0.250 ± 0.050 | +0.250 ± 0.050 | +0.250 ± 0.050 |")
    assert other.endswith("| (+0.050 ± 0.350) | (+0.050 ± 0.350) | (+0.050 ± 0.350) |")
    assert lora.startswith("| lora")


def test_curves_have_a_column_for_each_number_of_steps() -> None:
    rows = [{**row("lora", "cat", 0.3, steps=50, kept=0.9), "is_last": False}, row("lora", "cat", 0.6, kept=0.8)]
    rows += [row("full", "cat", 0.7, kept=0.5)]
    assert curves(summarise(rows, "lora")).splitlines() == [
        "| recipe | 50 | 100 |",
        "| --- | --- | --- |",
        "| lora | 0.300; 0.900 | 0.600; 0.800 |",
        "| full |  | 0.700; 0.500 |",
    ]


def test_what_is_higher_is_drawn_higher_and_near_ones_twice() -> None:
    rows = [row("low", "cat", 0.5, kept=0.5), row("near", "cat", 0.5, kept=0.51), row("high", "cat", 0.5, kept=0.9)]
    drawn = ElementTree.fromstring(svg(final_lines(rows, "low"), "low"))
    heights: dict[str | None, list[float]] = {}
    for circle in drawn.findall("{*}circle"):
        heights.setdefault(circle.findtext("{*}title"), []).append(float(circle.attrib["cy"]))
    assert [len(heights[name]) for name in ("high", "near", "low")] == [1, 2, 2]
    assert heights["high"][0] < heights["near"][0] < heights["low"][0]
    assert heights["low"][1] - heights["near"][1] > 5 * (heights["low"][0] - heights["near"][0])


def test_names_do_not_overlap() -> None:
    rows = [row("lora", "cat", 0.5, kept=0.9)]
    rows += [row(f"recipe {number}", "cat", 0.5, subject=0.5 + number / 1000, kept=0.9) for number in range(40)]
    drawn = ElementTree.fromstring(svg(final_lines(rows, "lora"), "lora"))
    named = [text for text in drawn.findall("{*}text") if (text.text or "").startswith("recipe ")]
    assert 0 < len(named) < 80
    places = [(float(text.attrib["x"]), float(text.attrib["y"])) for text in named]
    for (x, y), (other, height) in itertools.combinations(places, 2):
        assert abs(x - other) > 30 or abs(y - height) > 8


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
