"""Measured figures: every family, method and card has its own, each says where it comes from, benchmarks write them."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from benchmarks import tiers
from benchmarks.figures import step_figures, write_figures
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.planning import figures
from dreambooth_sm.planning.cards import CARDS, CPU
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.planning.figures import MEASURED, Figure, FigureError, figure, read_figures
from dreambooth_sm.planning.memory import predict_peak_gb
from launcher.estimates import estimate_on
from launcher.instances import Instance

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
ALL = [(name, method) for name, family in FAMILIES.items() for method in family.facts.methods]
GPUS = [name for name, card in CARDS.items() if card is not CPU]
MEASUREMENT = {"precision": "bf16", "steps_per_s": 9.5, "peak_allocated_gb": 3.25, "loss": 0.1}


@pytest.mark.parametrize("card", GPUS)
@pytest.mark.parametrize(("family", "method"), ALL)
def test_every_family_method_and_card_has_its_figures(family: str, method: str, card: str) -> None:
    # A class picture beside each picture of the subject: with methods that learn nothing from it as well.
    asked = {**PROMPTS, "base_architecture": family, "method": method, "with_prior_preservation": True}
    h = Hyperparameters.parse(asked)
    if FAMILIES[family].facts.overflows and not CARDS[card].has_bf16:
        with pytest.raises(UserError, match=f"{card} has no bf16"):
            make_plan(h, CARDS[card])
        return
    plan = make_plan(h, CARDS[card])
    measured = figure(family, f"{method}.{plan.tier}.{plan.precision}.peak_gb")
    # Nothing was measured in the other layout, which keeps more.
    last = dataclasses.replace(plan, channels_last=True)
    assert predict_peak_gb(last, h) == pytest.approx(measured, rel=0.03)
    assert plan.predicted_peak_gb >= predict_peak_gb(last, h)
    assert figure(family, f"{method}.{plan.tier}.{plan.precision}.steps_per_s") > 0
    estimate = estimate_on(h, Instance("a type", CARDS[card], 1, 1.0))
    assert estimate.minutes is not None
    assert estimate.minutes > sum(part.seconds for part in estimate.parts[1:3]) / 60


@pytest.mark.parametrize("method", METHODS)
def test_every_rung_was_timed_on_the_card_that_estimates_scale_from(method: str) -> None:
    timed = read_figures(MEASURED / f"{next(iter(FAMILIES))}.json")
    assert {f"{method}.{rung.name}.bf16.steps_per_s" for rung in METHODS[method].ladder} <= timed.keys()
    assert {found.card for key, found in timed.items() if key.endswith("_per_s")} == {"NVIDIA H200"}


def test_there_is_a_file_for_each_family_and_no_other() -> None:
    assert {path.name for path in MEASURED.iterdir()} == {
        f"{name}.json" for name in (*FAMILIES, "shared", "cards", "roofline")
    }
    assert all(read_figures(path) for path in MEASURED.iterdir())


def test_a_figure_that_is_missing_is_named_with_its_file() -> None:
    with pytest.raises(FigureError, match=r"sd\.json: has no figure 'full\.huge\.bf16\.peak_gb'"):
        figure("sd", "full.huge.bf16.peak_gb")
    with pytest.raises(FigureError, match=r"nobody\.json: can't be read"):
        figure("nobody", "step_cost")


@pytest.mark.parametrize(
    "entry",
    [
        1.5,
        {"value": 1.5},
        {"value": "1.5", "by": "a", "card": "b", "commit": "c", "date": "d"},
        {"value": True, "by": "a", "card": "b", "commit": "c", "date": "d"},
        {"value": float("nan"), "by": "a", "card": "b", "commit": "c", "date": "d"},
        {"value": 1.5, "by": "", "card": "b", "commit": "c", "date": "d"},
        {"value": 1.5, "by": "a", "card": None, "commit": "c", "date": "d"},
        {"value": 1.5, "by": "a", "card": "b", "commit": "c", "date": "d", "more": 1},
    ],
)
def test_a_figure_that_says_too_little_is_refused(entry: object, tmp_path: Path) -> None:
    path = tmp_path / "sd.json"
    path.write_text(json.dumps({"step_cost": entry}))
    with pytest.raises(FigureError, match=r"sd\.json: .*'step_cost'"):
        read_figures(path)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_file_without_figures_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "sd.json").write_text(text)
    with pytest.raises(FigureError, match=r"sd\.json: "):
        read_figures(tmp_path / "sd.json")


def test_a_benchmark_replaces_its_own_figures_and_leaves_the_others(tmp_path: Path) -> None:
    shipped = read_figures(MEASURED / "sd.json")
    (tmp_path / "sd.json").write_bytes((MEASURED / "sd.json").read_bytes())
    write_figures(tmp_path, "sd", step_figures("full", "tiny", MEASUREMENT), by="a benchmark")
    written = read_figures(tmp_path / "sd.json")
    assert list(written) == list(shipped)
    changed = {key: found for key, found in written.items() if found != shipped[key]}
    assert {key: found.value for key, found in changed.items()} == {
        "full.tiny.bf16.steps_per_s": 9.5,
        "full.tiny.bf16.peak_gb": 3.25,
    }
    assert all(found.by == "a benchmark" and found.commit and found.date for found in changed.values())
    before, after = ((folder / "sd.json").read_text().splitlines() for folder in (MEASURED, tmp_path))
    assert sum(one != two for one, two in zip(before, after, strict=True)) == 2


def test_the_benchmark_of_the_tiers_writes_what_the_plan_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiers, "run_tier", lambda *_: {"tier": "tight", **MEASUREMENT, "precision": "fp16"})
    monkeypatch.setattr(sys, "argv", ["tiers", "T4", "--model", "sdxl", "--steps", "5", "--write", str(tmp_path)])
    tiers.main()
    assert json.loads(capsys.readouterr().out)["steps_per_s"] == 9.5
    found = read_figures(tmp_path / "sdxl.json")
    assert found["full.tight.fp16.peak_gb"].by == "python -m benchmarks.tiers T4 --model sdxl --steps 5"
    monkeypatch.setattr(figures, "MEASURED", tmp_path)
    assert figure("sdxl", "full.tight.fp16.steps_per_s") == 9.5


def test_a_benchmark_that_fails_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_tier(*_: object) -> dict[str, object]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiers, "run_tier", run_tier)
    monkeypatch.setattr(sys, "argv", ["tiers", "T4", "--write", str(tmp_path)])
    tiers.main()
    assert not list(tmp_path.iterdir())


def test_what_nobody_wrote_down_is_unknown() -> None:
    found = read_figures(MEASURED / "shared.json")["fixed_share"]
    assert found == Figure(0.54, by="unknown", card="unknown", commit="recorded in 9cfe687", date="2026-11-22")
