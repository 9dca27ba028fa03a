"""What an account's last jobs say about the next one: how long they waited, started, loaded, trained and ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

from dreambooth_sm.report import parse_metrics
from launcher.aws.clients import Clients
from launcher.aws.service_errors import asking
from launcher.jobs.logs import LOG_GROUP
from launcher.jobs.progress import Progress

# Jobs that are looked at, the last ones of the account, and how many of them count.
_LOOKED_AT, _COUNTED = 12, 5
# Lines about phases that are read of each; a job of one subject writes some twenty.
_LINES = 100
# Hyperparameters that decide what a job loads, and what it writes beside that.
_OF_THE_BASE = ("pretrained_model_name_or_path", "revision", "variant")
_OF_THE_METHOD = ("method", "use_lora")
# Phases after the last one that depends on the steps.
_ENDING = ("save", "upload")


@dataclass(frozen=True)
class Median:
    """A median of what some jobs took."""

    value: float
    jobs: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Median | None:
        """None where nothing is known."""
        known = [value for value in values if value is not None]
        return cls(median(known), len(known)) if known else None

    @property
    def source(self) -> str:
        return f"median of your last {self.jobs} jobs" if self.jobs > 1 else "as your last job"


@dataclass(frozen=True)
class OwnTimes:
    """Times of the last completed jobs with the same instance type and count, image and kind of capacity.

    Attributes:
        waiting: seconds from the request to the instance, which are not billed.
        start: seconds from the instance to the job's first line: channels, image, container.
        base_model: seconds of fetching and loading the same base model.
        end: seconds from the last phase before saving to the job's end, of the same base model and method.
        trained: hyperparameters of each, and the seconds of its training.
    """

    waiting: Median | None = None
    start: Median | None = None
    base_model: Median | None = None
    end: Median | None = None
    trained: tuple[tuple[Mapping[str, str], float], ...] = ()


@dataclass(frozen=True)
class _Times:
    """Seconds of one job; None where its log does not say them."""

    description: Mapping[str, Any]
    start: float | None
    end: float | None
    phases: Mapping[str, float]

    @property
    def waiting(self) -> float:
        return _seconds(self.description["CreationTime"], self.description["TrainingStartTime"])


def own_times(clients: Clients, request: Mapping[str, Any]) -> OwnTimes:
    """Looks at the account's last jobs that are like a request's.

    One request lists jobs; where there are some, one a job describes them, and one a job that counts reads the times of
    its phases, several at once.

    Raises:
        ServiceError: they may not be listed, or AWS can't be reached.
    """
    sagemaker, logs = clients("sagemaker"), clients("logs")
    doing = "your last jobs can't be looked at"
    with asking(doing):
        listed = sagemaker.list_training_jobs(
            StatusEquals="Completed", SortBy="CreationTime", SortOrder="Descending", MaxResults=_LOOKED_AT
        )["TrainingJobSummaries"]
    if not listed:
        return OwnTimes()

    def describe(job: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = sagemaker.describe_training_job(TrainingJobName=job["TrainingJobName"])
        return found

    with ThreadPoolExecutor(_LOOKED_AT) as pool, asking(doing):
        described = list(pool.map(describe, listed))
        reused = {each.get("WarmPoolStatus", {}).get("ReusedByJob") for each in described}
        alike = [
            each
            for each in described
            if _kind(each) == _kind(request) and each["TrainingJobName"] not in reused and _ran_once(each)
        ]
        times = list(pool.map(lambda each: _read(logs, each), alike[:_COUNTED]))
    same = [each for each in times if _model(each.description) == _model(request)]
    return OwnTimes(
        waiting=Median.of(each.waiting for each in times),
        start=Median.of(each.start for each in times),
        base_model=Median.of(each.phases.get("load_base") for each in same),
        end=Median.of(each.end for each in same),
        trained=tuple(
            (values, each.phases["train"])
            for each in times
            if "train" in each.phases and "fleet" not in (values := each.description["HyperParameters"])
        ),
    )


def _kind(job: Mapping[str, Any]) -> tuple[object, ...]:
    """What decides how long a job waits and starts."""
    resources, algorithm = job["ResourceConfig"], job["AlgorithmSpecification"]
    return (
        resources.get("InstanceType"),
        resources.get("InstanceCount"),
        algorithm.get("TrainingImage"),
        bool(job.get("EnableManagedSpotTraining")),
    )


def base_of(job: Mapping[str, Any]) -> tuple[object, ...]:
    """What a request or a description says of the base model."""
    values = job.get("HyperParameters", {})
    channels = {each["ChannelName"]: each["DataSource"] for each in job.get("InputDataConfig", ())}
    return (*(values.get(name) for name in _OF_THE_BASE), channels.get("model"))


def _model(job: Mapping[str, Any]) -> tuple[object, ...]:
    """What decides how long a job loads its base model and saves its own."""
    values = job.get("HyperParameters", {})
    return (*base_of(job), *(values.get(name) for name in _OF_THE_METHOD))


def _ran_once(job: Mapping[str, Any]) -> bool:
    """Whether it has times at all, and was not interrupted."""
    states = [each["Status"] for each in job.get("SecondaryStatusTransitions", ())]
    interrupted = "Interrupted" in states or states.count("Starting") > 1
    return "TrainingStartTime" in job and "TrainingEndTime" in job and not interrupted


def _read(logs: Any, job: Mapping[str, Any]) -> _Times:
    """The times of a job's phases, by its log; of one whose log is gone, the wait alone is known."""
    try:
        pages = logs.get_paginator("filter_log_events").paginate(
            logGroupName=LOG_GROUP,
            logStreamNamePrefix=f"{job['TrainingJobName']}/",
            filterPattern='"phase="',
            PaginationConfig={"MaxItems": _LINES},
        )
        events = [event for page in pages for event in page["events"]]
    except logs.exceptions.ResourceNotFoundException:
        events = []
    progress, ended = Progress(), None
    for event in events:
        progress.read(event["message"])
        pairs = parse_metrics(event["message"])
        if pairs.get("state") == "ended" and pairs.get("phase") not in _ENDING:
            ended = _time(event)
    start = _seconds(job["TrainingStartTime"], _time(events[0])) if events else None
    end = _seconds(ended, job["TrainingEndTime"]) if ended else None
    return _Times(job, start, end, progress.seconds)


def _seconds(start: datetime, end: datetime) -> float:
    """Between two times that two clocks may have told."""
    return max((end - start).total_seconds(), 0.0)


def _time(event: Mapping[str, Any]) -> datetime:
    return datetime.fromtimestamp(event["timestamp"] / 1000, UTC)
