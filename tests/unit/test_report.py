"""The job's lines: what CloudWatch's regexes, the launcher and people read."""

from __future__ import annotations

import io
import math

import pytest

from dreambooth_sm.report import Reporter, format_metrics, parse_metrics


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
