"""The job's lines: what CloudWatch's regexes, the launcher and people read."""

from __future__ import annotations

import io
import math
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import safe
from dreambooth_sm.report import (
    MEASURES,
    TRAINING_METRICS,
    Reporter,
    format_metrics,
    measure_pattern,
    metric_pattern,
    parse_metrics,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(report: Reporter) -> list[str]:
    assert isinstance(report.stream, io.StringIO)
    return report.stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"step": 120, "loss": 0.083123, "lr": 2e-06}, "step=120 loss=0.08312 lr=2e-06"),
        ({"loss": 1.0, "prior_loss": None, "instance_loss": 0.5}, "loss=1 instance_loss=0.5"),
        ({"loss": math.nan}, "loss=nan"),
        ({"seed": 2147483647}, "seed=2147483647"),
        ({"bytes": 2_130_000_000}, "bytes=2130000000"),
        ({}, ""),
    ],
)
def test_metric_lines(values: dict[str, object], line: str) -> None:
    assert format_metrics(**values) == line


def test_a_line_is_read_back() -> None:
    line = format_metrics(step=120, loss=0.083123, lr=2e-06, uploaded="s3://bucket/a=b")
    assert parse_metrics(line) == {"step": "120", "loss": "0.08312", "lr": "2e-06", "uploaded": "s3://bucket/a=b"}
    assert parse_metrics("no pairs here, only text") == {}


VALUES = st.text() | st.integers() | st.floats(allow_nan=False)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), VALUES, max_size=5))
def test_any_values_are_read_back(values: dict[str, Any]) -> None:
    read = parse_metrics(format_metrics(**values))
    assert read == {k: f"{v:.4g}" if isinstance(v, float) else safe(v) for k, v in values.items()}


FORGERIES = [
    "duck step=one loss=low.png",
    "step=5 loss=0.1",
    "a\nstep=5 loss=0.1",
    "a\rstep=5 loss=0.1",
    "a\u2028step=5 loss=0.1",
    '" step=5 loss=0.1 x="',
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.kcud",
    "caf\udce9",
]


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize(
    "say",
    [
        lambda report, name: report.warn(f"left out: {name} is not a picture"),
        lambda report, name: report.verdict(f'good: "{name}": learned'),
        lambda report, name: report.say(f"resuming from {name}"),
        lambda report, name: report.metrics(checkpoint=name, model=name),
    ],
)
def test_names_from_outside_pass_for_no_number_and_no_command(name: str, say: Any) -> None:
    report = Reporter(io.StringIO())
    say(report, name)
    (line,) = lines(report)
    assert line.isprintable()
    for metric in TRAINING_METRICS:
        assert not re.search(metric_pattern(metric), line)
    assert not {"step", "loss"} & parse_metrics(line).keys()


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_what_is_trained(name: str) -> None:
    report = Reporter(io.StringIO())
    values = {each: 0.1 * number for number, each in enumerate(MEASURES, start=1)}
    report.metrics(candidate=0, **dict.fromkeys(MEASURES, 0.99))
    report.metrics(candidate=20, nearest=0.7, **values)
    report.metrics(step=20, loss=0.5, prior_loss=0.25)
    report.metrics(best=20, of=3, **{each: -1e-7 * value for each, value in values.items()})
    report.warn("candidate=3 score=1")
    found = [match for line in lines(report) if (match := re.search(measure_pattern(name), line))]
    assert [float(match[1]) for match in found] == [pytest.approx(values[name]), pytest.approx(-1e-7 * values[name])]


@given(st.text())
def test_a_line_is_one_line(text: str) -> None:
    report = Reporter(io.StringIO())
    report.say(text)
    written = report.stream.getvalue()  # type: ignore[attr-defined]
    assert written.endswith("\n")
    assert len(written.splitlines()) <= 1
    assert written.encode() is not None


@pytest.mark.parametrize("line", ["a" * 10**6, "a=" + "b" * 10**6, 'a="' + "b" * 10**6, "a=b " * 250_000, "=" * 10**6])
def test_long_lines_are_read_in_time_in_proportion(line: str) -> None:
    """Quadratic, a million characters would take hours."""
    started = time.process_time()
    parse_metrics(line)
    assert time.process_time() - started < 60


def test_a_metric_is_found_where_it_is() -> None:
    line = format_metrics(step=3, loss=0.5, instance_loss=math.nan, lr=2e-6)
    assert re.findall(metric_pattern("step"), line) == ["3"]
    assert re.findall(metric_pattern("loss"), line) == ["0.5"]
    assert re.findall(metric_pattern("lr"), line) == ["2e-06"]
    assert re.findall(metric_pattern("instance_loss"), line) == []
    assert re.findall(metric_pattern("loss"), f"{line}\n") == ["0.5"]


def test_passwords_reach_no_line() -> None:
    report = Reporter(io.StringIO())
    report.warn('EndpointConnectionError: Could not connect to "https://me:hunter2@s3.example.com/b?list-type=2"')
    report.metrics(uploaded="https://me:hunter2@s3.example.com/b")
    report.verdict("good: https://me:hunter2@host")
    with pytest.raises(UserError) as caught:
        raise UserError("AWS_ENDPOINT_URL=http://me:hunter2@host:9000 does not answer")
    assert "hunter2" not in " ".join([*lines(report), *report.verdicts, *caught.value.problems])
    assert "https://***@s3.example.com" in lines(report)[0]


def test_a_stream_that_takes_no_more_costs_the_line_alone() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    report = Reporter(Full())
    report.say("a line")
    report.metrics(step=1)
    assert report.history == [{"step": 1}]


def test_characters_that_the_stream_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii")
    Reporter(stream).say("a café, 🦆")
    assert raw.getvalue() == b"a caf\\xe9, \\U0001f986\n"


def test_phases_are_timed_in_order_also_when_they_fail() -> None:
    report = Reporter(io.StringIO())
    with report.phase("load"):
        pass
    with pytest.raises(OSError, match="gone"), report.phase("upload"):  # noqa: PT012
        report.say("uploading")
        raise OSError("gone")
    assert list(report.seconds) == ["load", "upload"]
    assert [line.rpartition(" seconds=")[0] or line for line in lines(report)] == [
        "phase=load state=started",
        "phase=load state=ended",
        "phase=upload state=started",
        "uploading",
        "phase=upload state=ended",
    ]


@pytest.mark.parametrize(("total", "said"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (100, [25, 50, 75, 100])])
def test_off_a_terminal_each_quarter_is_a_line(total: int, said: list[int]) -> None:
    report = Reporter(io.StringIO())
    assert list(report.progress(range(total), total, "class images")) == list(range(total))
    shown = [parse_metrics(line) for line in lines(report)]
    assert [int(pairs["done"]) for pairs in shown] == said
    assert all(pairs["progress"] == "class_images" and pairs["total"] == str(total) for pairs in shown)


def test_progress_of_nothing() -> None:
    report = Reporter(io.StringIO())
    assert list(report.progress([], 0, "steps")) == []
    assert lines(report) == []


def test_on_a_terminal_progress_is_a_bar_and_no_lines() -> None:
    report = Reporter(Terminal())
    assert list(report.progress("abc", 3, "steps")) == ["a", "b", "c"]
    drawn = report.stream.getvalue()  # type: ignore[attr-defined]
    assert "steps" in drawn
    assert "progress=" not in drawn


def test_warnings_and_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter().warn("xformers can't run here")
    assert capsys.readouterr().out == "warning: xformers can't run here\n"
