"""What is shown of a fleet: lines, a table in the terminal, one output in a notebook."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dreambooth_sm.errors import UserError
from launcher.fleets.status import FleetStatus
from launcher.fleets.views import FleetPage, FleetTable, choose_table
from launcher.jobs.views import Pictures
from tests.helpers.terminal import open_terminal

STATUS = FleetStatus(
    done=("a", "b"),
    failed={"c": "00.png: [not] a picture\nmore", "d": "00.png: [not] a picture", "e": "the disk is <full>"},
    running=("f",),
    remaining=("g", "h"),
    jobs={"toys-0001": "InProgress", "toys-0002": "Waiting", "toys-0003": "Completed"},
    dollars=1.234,
    seconds_left=125.0,
    latest="b",
)
ENDED = FleetStatus(done=("a",), seconds_left=60.0)


def no_pictures(subject: str) -> Pictures:
    raise AssertionError(subject)


def test_lines_tell_what_has_changed() -> None:
    lines: list[str] = []
    with choose_table("toys", lines.append, no_pictures) as view:
        view.say("started: toys-0001")
        for _ in range(3):
            view.show(STATUS)
        view.show(ENDED)
    assert lines == [
        "started: toys-0001",
        "toys: 2 done, 3 failed, 1 in 1 running job, 2 remaining, $1.23 so far, about 2:05 left",
        "toys: 1 done, 0 failed, 0 in 0 running jobs, 0 remaining",
    ]


def test_a_terminal_has_a_table_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_terminal(monkeypatch)
    view = choose_table("toys [1]", None, no_pictures)
    assert isinstance(view, FleetTable)
    with view:
        view.say("started: [toys-0001]")
        view.show(STATUS)
    shown = screen.shown
    assert "started: [toys-0001]" in shown
    for words in (
        r"toys \[1\]",
        r"running +│ 1 in 1 job ",
        r"remaining +│ 2, 1 jobs in the queue ",
        r"2 x +│ 00.png: \[not\] a picture ",
        r"1 x +│ the disk is <full> ",
        r"cost so far +│ \$1.23 ",
        r"time left +│ about 2:05 ",
    ):
        assert re.search(words, shown), words


def test_a_notebook_has_one_output_with_pictures_of_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    shown: list[tuple[str, str]] = []
    drawn: list[str] = []

    def display(html: Any, *, display_id: bool) -> Any:
        assert display_id
        shown.append(("display", html.data))
        return SimpleNamespace(update=lambda html: shown.append(("update", html.data)))

    def pictures(subject: str) -> Pictures:
        drawn.append(subject)
        return Pictures([Image.new("RGB", (8, 8))])

    monkeypatch.setattr(IPython.display, "display", display)
    with FleetPage("toys", pictures) as page:
        page.say("started: <toys>")
        for _ in range(3):
            page.show(STATUS)
    assert [kind for kind, _ in shown] == ["display", "update", "update"]
    assert drawn == ["b"]
    html = shown[-1][1]
    assert "the disk is &lt;full&gt;" in html
    assert "started: &lt;toys&gt;" in html
    assert "data:image/png;base64," in html

    def refused(subject: str) -> Pictures:
        raise UserError("access denied")

    with FleetPage("toys", refused) as page:
        page.show(STATUS)
    assert "b: no pictures: access denied" in shown[-1][1]
    assert "the disk is" in shown[-1][1]
