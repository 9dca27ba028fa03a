"""Following a job: its log in pages, its progress, what is shown, what is said about failures."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.api import attach
from launcher.aws.advice import advice_for
from launcher.aws.clients import Clients
from launcher.jobs.job import Job, JobFailed
from launcher.jobs.logs import LogReader
from launcher.jobs.progress import Progress
from launcher.jobs.views import NotebookView, Standing, TerminalView, choose_view, job_html
from tests.helpers.terminal import open_terminal

# --- The log: no line lost or doubled --------------------------------------------------------------------------------


class ThrottledError(Exception):
    """What is left when botocore has tried often enough."""


class PagingLogs:
    """CloudWatch Logs that cuts pages as it likes: any length, empty ones before the end, streams that come later and
    errors at any request. ``script`` decides, one number a request."""

    exceptions = SimpleNamespace(ResourceNotFoundException=type("ResourceNotFoundException", (Exception,), {}))

    def __init__(self, script: list[int]) -> None:
        self.streams: dict[str, list[dict[str, Any]]] = {}
        self._script = iter(script)

    def get_paginator(self, operation: str) -> Any:
        assert operation == "describe_log_streams"
        return SimpleNamespace(paginate=self._describe)

    def _describe(self, *, logGroupName: str, logStreamNamePrefix: str) -> Any:  # noqa: N803
        self._maybe_fail()
        if not self.streams:
            raise self.exceptions.ResourceNotFoundException
        for name in self.streams:
            if name.startswith(logStreamNamePrefix):
                yield {"logStreams": [{"logStreamName": name}]}

    def get_log_events(
        self,
        *,
        logGroupName: str,  # noqa: N803
        logStreamName: str,  # noqa: N803
        startFromHead: bool,  # noqa: N803
        nextToken: str = "0:start",  # noqa: N803
    ) -> dict[str, Any]:
        assert startFromHead
        choice = self._maybe_fail()
        events, start = self.streams[logStreamName], int(nextToken.split(":")[0])
        if start == len(events) and nextToken != "0:start":
            return {"events": [], "nextForwardToken": nextToken}
        length = choice % 4
        if length == 0:  # an empty page, and yet not the end
            detour = "b" if nextToken.endswith(":a") else "a"
            return {"events": [], "nextForwardToken": f"{start}:{detour}"}
        page = events[start : start + length]
        return {"events": page, "nextForwardToken": f"{start + len(page)}:x"}

    def _maybe_fail(self) -> int:
        choice = next(self._script, 3)
        if choice == 7:
            raise ThrottledError
        return choice


Bursts = st.lists(st.dictionaries(st.sampled_from(["algo-1-1", "algo-2-1", "algo-1-2"]), st.integers(1, 6)), max_size=8)


@given(bursts=Bursts, script=st.lists(st.integers(0, 7), max_size=60))
def test_each_line_is_read_once(bursts: list[dict[str, int]], script: list[int]) -> None:
    logs = PagingLogs(script)
    reader = LogReader(logs, "toy")
    written: dict[str, list[str]] = {}
    read: list[str] = []

    def poll() -> None:
        with suppress(ThrottledError):  # the next poll continues
            read.extend(reader.read())

    for time, burst in enumerate(bursts):
        for stream, count in burst.items():
            lines = written.setdefault(stream, [])
            new = [f"{stream} line {len(lines) + number}" for number in range(count)]
            lines += new
            events = logs.streams.setdefault(f"toy/{stream}", [])
            events += [{"timestamp": time, "message": line} for line in new]
            logs.streams.setdefault("toy-2/algo-1-1", []).append({"timestamp": time, "message": "of another job"})
        poll()
    for _ in range(len(script) + 1):
        poll()
    assert sorted(read) == sorted(line for lines in written.values() for line in lines)
    for stream, lines in written.items():
        assert [line for line in read if line.startswith(f"{stream} ")] == lines


# --- Progress --------------------------------------------------------------------------------------------------------


def progress_of(*lines: str, steps: int | None = 800) -> Progress:
    progress = Progress(steps)
    for line in lines:
        progress.read(line)
    return progress


def test_a_job_says_how_many_steps_it_takes_where_nobody_set_them() -> None:
    assert progress_of("seed=7 processes=4", steps=None).steps is None  # of an earlier version
    assert progress_of("seed=7 processes=4 steps=200", steps=None).steps == 200


def test_progress_is_in_the_lines() -> None:
    progress = progress_of(
        "phase=check state=started",
        "phase=check state=ended seconds=1.5",
        "phase=train state=started",
        "step=1 loss=0.5 lr=2e-06 vram_gb=0",
        "step=200 loss=0.25 instance_loss=0.2 prior_loss=0.1 lr=2e-06 steps_per_s=4 vram_gb=8.1",
        "plan: something else",
    )
    assert (progress.step, progress.loss, progress.phase, progress.seconds) == (200, 0.25, "train", {"check": 1.5})
    assert progress.fraction == 0.25
    assert progress.seconds_left == 150
    assert progress.history[1]["prior_loss"] == 0.1


def test_steps_that_an_interrupted_job_does_again_count_once() -> None:
    again = progress_of("step=1 loss=3", "step=2 loss=2", "step=3 loss=1", "step=2 loss=2", "step=3 loss=0.5")
    assert [(entry["step"], entry["loss"]) for entry in again.history] == [(1, 3), (2, 2), (3, 0.5)]


NUMBERS = st.sampled_from(["1", "-1", "0.5", "nan", "inf", "-inf", "1e999", "one", "9" * 400, "1_0", '"', '"a b"', ""])
PAIRS = st.tuples(
    st.sampled_from(["step", "loss", "steps_per_s", "phase", "state", "seconds", "progress", "done", "total"]),
    NUMBERS | st.sampled_from(["started", "ended", "train"]),
).map("=".join)


@given(st.lists(st.text(alphabet="step=los 0123.-x", max_size=20) | st.lists(PAIRS, max_size=5).map(" ".join)))
def test_no_line_breaks_it(lines: list[str]) -> None:
    progress = progress_of(*lines)
    assert progress.fraction is None or 0 <= progress.fraction <= 1
    assert standing(progress).words()


def test_names_that_look_like_numbers_are_none() -> None:
    progress = progress_of(
        "step=1 loss=0.5", "warning: duck step=one loss=low.png", "error: x step=9 loss=1", "step=2 loss=low"
    )
    assert [row["step"] for row in progress.history] == [1]


def test_lines_of_the_log_are_safe_to_show() -> None:
    logs = PagingLogs([])
    logs.streams["toy/algo-1-1"] = [{"timestamp": 0, "message": "duck\x1b[2J.png\r\n"}]
    assert LogReader(logs, "toy").read() == ["duck\\x1b[2J.png"]


# --- What is shown ---------------------------------------------------------------------------------------------------


def standing(progress: Progress, *, cost: float | None = 0.034, status: str = "InProgress") -> Standing:
    return Standing(status, "Training", progress, seconds=130.0, cost=cost)


def test_what_is_known_of_a_job_in_words() -> None:
    progress = progress_of("phase=train state=started", "step=200 loss=0.25 steps_per_s=4")
    assert standing(progress).words() == ["step 200/800", "loss 0.2500", "2:30 left", "2:10", "$0.03"]
    assert standing(progress).activity == "train"
    nothing = Standing("InProgress", "Downloading", Progress(), seconds=0, cost=None)
    assert (nothing.activity, nothing.words()) == ("Downloading", ["0:00"])
    images = progress_of("phase=class_images state=started", "progress=class_images done=16 total=50")
    assert standing(images).activity == "class images 16/50"


def test_the_notebooks_picture_of_a_job_escapes_what_the_job_says() -> None:
    html = job_html("toy", standing(progress_of("step=400 loss=0.1")), ["<script>alert(1)</script> & more"])
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in html
    assert "width:50%" in html


def test_a_terminal_shows_the_lines_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = open_terminal(monkeypatch)
    view = choose_view("toy", None)
    assert isinstance(view, TerminalView)
    with view:
        view.say("a line [with brackets]")
        view.show(standing(progress_of("phase=train state=started", "step=200 loss=0.25 steps_per_s=4")))
    shown = screen.shown
    assert "a line [with brackets]" in shown
    assert "train · step 200/800 · loss 0.2500 · 2:30 left" in shown


def test_elsewhere_it_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with choose_view("toy", None) as view:
        view.say("a line")
        view.show(standing(Progress()))
    assert capsys.readouterr().out == "a line\n"


def test_a_notebook_has_one_output_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display

    shown: list[tuple[str, str]] = []

    def display(html: Any, *, display_id: bool) -> Any:
        assert display_id
        shown.append(("display", html.data))
        return SimpleNamespace(update=lambda html: shown.append(("update", html.data)))

    monkeypatch.setattr(IPython.display, "display", display)
    with NotebookView("toy") as view:
        for number in range(50):
            view.say(f"line {number}")
            view.show(standing(Progress()))
    assert [kind for kind, _ in shown] == ["display", "update"]
    assert "line 49" in shown[-1][1]


# --- Failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("the card has too little memory for the smallest plan there is: CUDA out of memory", "more memory"),
        ("ClientError: Please use an instance type with more memory, exit code: 137", "more memory"),
        (
            "An error occurred (ResourceLimitExceeded) when calling the CreateTrainingJob operation: The account-level "
            "service limit 'ml.g5.2xlarge for training job usage' is 0 Instances",
            "quota",
        ),
        ("CapacityError: Unable to provision requested ML compute capacity", "no such instance is free"),
        ("MaxWaitTimeExceeded", "no such instance is free"),
        ("GatedRepoError: 401 Client Error. Cannot access gated repo for url", "licence"),
        ("s3://b/x: access denied: allow s3:PutObject", "execution role"),
        ("User: arn:x is not authorized to perform: s3:GetObject on resource", "execution role"),
        ("OSError: [Errno 28] No space left on device", "larger volume"),
    ],
)
def test_known_failures_come_with_what_to_do(said: str, advice: str) -> None:
    assert advice in (advice_for(said) or "")


def test_nothing_is_said_about_what_is_not_known() -> None:
    assert advice_for("the loss is not finite by step 6; lower learning_rate") is None


def test_a_failure_shows_reason_last_lines_and_what_to_do() -> None:
    error = JobFailed("toy", "No space left on device", ["one", "two"], "give the job a larger volume")
    assert str(error) == (
        "toy: No space left on device\nthe last lines of its log:\n  one\n  two\n"
        "what to do: give the job a larger volume"
    )


# --- A job without a service -----------------------------------------------------------------------------------------


class Described(Clients):
    """Clients of a SageMaker that knows one description."""

    def __init__(self, **description: Any) -> None:
        super().__init__()
        self.description = {"TrainingJobStatus": "Completed", "HyperParameters": {}, **description}

    def is_local(self, service: str) -> bool:
        return False

    def __call__(self, service: str) -> Any:
        return SimpleNamespace(describe_training_job=lambda TrainingJobName: self.description)  # noqa: N803


def test_the_cost_so_far() -> None:
    started = datetime(2026, 1, 1, tzinfo=UTC)

    def cost(instance_type: str, price: float | None = None) -> float | None:
        resources = {"InstanceType": instance_type, "InstanceCount": 2}
        clients = Described(TrainingStartTime=started, BillableTimeInSeconds=1800, ResourceConfig=resources)
        return Job("toy", clients, price=price).cost

    assert cost("ml.g5.xlarge") == pytest.approx(1.408)
    assert cost("ml.g5.xlarge", price=1.5) == 1.5
    assert cost("ml.unknown.xlarge") is None


@pytest.mark.parametrize(
    ("description", "uri"),
    [
        ({"ModelArtifacts": {"S3ModelArtifacts": "s3://b/toy/output/model/"}}, "s3://b/toy/output/model"),
        ({"ModelArtifacts": {"S3ModelArtifacts": "file:///tmp/a%20b/model"}}, "/tmp/a b/model"),
        ({"HyperParameters": {"manul_upload_model_path": "s3://models/m"}}, "s3://models/m"),
        ({"HyperParameters": {"manual_upload_model_path": '"s3://models/m"'}}, "s3://models/m"),
    ],
)
def test_where_the_model_lies(description: dict[str, Any], uri: str) -> None:
    assert Job("toy", Described(**description)).model_uri == uri


@pytest.mark.slow
def test_following_imports_nothing_heavy() -> None:
    code = "import sys, json, launcher.jobs.job; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)))
    assert not {"torch", "boto3", "botocore", "sagemaker", "moto", "pandas", "rich", "IPython"} & modules


def test_there_is_no_such_job() -> None:
    from dreambooth_sm.errors import UserError
    from launcher.local.services import embedded_services

    with embedded_services() as services, pytest.raises(UserError, match="no training job 'nobody'"):
        attach("nobody", services.clients())
