"""Views of a followed tuning job: lines, a table in a terminal, a page in a notebook, pictures side by side."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dreambooth_sm.errors import UserError
from launcher.tuning.grid import TrialGrid
from launcher.tuning.status import Trial, TuningStatus
from launcher.tuning.views import TuningPage, TuningTable, choose_view
from tests.helpers.terminal import open_terminal

VALUES = {"learning_rate": "0.000123456", "lora_targets": "all"}
GOOD = Trial("toys-001-ab", 1, VALUES, "Completed", 0.75, 90.0, 0.05)
BETTER = Trial("toys-003-ab", 3, {**VALUES, "lora_targets": "<b>"}, "Completed", 0.8, 60.0, 0.03)
FAILED = Trial("toys-002-ab", 2, VALUES, "Failed", None, 5.0, 0.0, "out of [memory]\nmore")
RUNS = Trial("toys-004-ab", 4, VALUES, "InProgress", 0.1, 30.0, 0.01)
STATUS = TuningStatus("InProgress", "score", True, 6, (GOOD, FAILED, BETTER, RUNS))


def grid() -> TrialGrid:
    return TrialGrid("score", [(BETTER, [Image.new("RGB", (8, 8), "red")] * 2), (GOOD, [])])


def nothing() -> TrialGrid:
    raise AssertionError


def test_lines_tell_what_has_changed() -> None:
    lines: list[str] = []
    with choose_view("toys", lines.append, nothing) as view:
        view.say("a line")
        view.show(TuningStatus("InProgress", "score", True, 6))
        for _ in range(3):
            view.show(STATUS)
    assert lines == [
        "a line",
        "toys: 0 done, 6 planned",
        "trial 1: completed, score 0.75, learning_rate=0.0001235 lora_targets=all",
        "trial 2: failed, learning_rate=0.0001235 lora_targets=all: out of [memory]",
        "trial 3: completed, score 0.8, learning_rate=0.0001235 lora_targets=<b>",
        "toys: 2 done, 1 failed, 1 running, 2 planned; best score 0.8 with learning_rate=0.0001235 lora_targets=<b>, "
        "$0.09 so far",
    ]


def test_a_terminal_has_a_table_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_terminal(monkeypatch, columns=120)
    view = choose_view("toys [1]", None, nothing)
    assert isinstance(view, TuningTable)
    with view:
        view.say("a [line]")
        view.show(STATUS)
    shown = screen.shown
    assert "a [line]" in shown
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert [row[0] for row in found[:4]] == ["3", "1", "4", "2"]  # the best first, then what runs, then the others
    assert found[0] == ["3", "0.8", "0.0001235", "<b>", "Completed", "1:00", "$0.03"]


def test_a_notebook_has_one_output_with_pictures_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    shown: list[tuple[str, str]] = []
    drawn: list[int] = []

    def display(html: Any, *, display_id: bool) -> Any:
        assert display_id
        shown.append(("display", html.data))
        return SimpleNamespace(update=lambda html: shown.append(("update", html.data)))

    def draw() -> TrialGrid:
        drawn.append(len(shown))
        if len(drawn) > 1:
            raise UserError("it <went> away")
        return grid()

    monkeypatch.setattr(IPython.display, "display", display)
    page = TuningPage("toys & more", draw)
    page.say("the <last> line")
    for _ in range(2):
        page.show(STATUS)
    page.show(TuningStatus("Completed", "score", True, 6, (GOOD,)))
    assert [kind for kind, _ in shown] == ["display", "update", "update"]
    assert len(drawn) == 2  # once for each best one
    assert "toys &amp; more" in shown[0][1]
    assert "&lt;b&gt;" in shown[0][1]
    assert "the &lt;last&gt; line" in shown[0][1]
    assert "data:image/png;base64," in shown[1][1]
    assert "no pictures: it &lt;went&gt; away" in shown[2][1]


def test_pictures_of_trials_are_side_by_side() -> None:
    whole = grid().image()
    assert whole
    assert whole.height == 2 * (160 + 8)
    assert whole.getpixel((220 + 80, 80)) == whole.getpixel((220 + 168 + 80, 80)) == (255, 0, 0)
    assert whole.getpixel((220 + 80, 168 + 80)) == (255, 255, 255)
    assert TrialGrid("score", []).image() is None
    assert TrialGrid("score", [])._repr_png_() is None
