"""Tuning jobs of the embedded SageMaker: their trials are training jobs that really run."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dreambooth_sm.sagemaker import OBJECTIVE_KEY
from launcher.local.answers import Operation, RequestError, arn_of, check_shape
from launcher.local.chosen_values import all_ranges, combinations, distribution, distributions, make_study
from launcher.local.s3 import REGION
from launcher.local.training_job import TrainingJob

if TYPE_CHECKING:
    from optuna import Study

# Seconds between two looks at the trials that run.
_PAUSE = 0.1
_OPERATIONS = "HyperParameterTuningJob"


class StartTrial(Protocol):
    """Starts a training job."""

    def __call__(
        self, request: dict[str, Any], *, region: str, directory: Path | None, own: bool, tuning_arn: str
    ) -> TrainingJob:
        """See :meth:`launcher.local.sagemaker.EmbeddedSageMaker.start`."""


class EmbeddedTuning:
    """Tuning jobs, each of the region that its request is signed for.

    Args:
        start: starts a training job.
        tags: of everything of SageMaker's, by ARNs.
    """

    def __init__(self, start: StartTrial, tags: dict[str, dict[str, str]]) -> None:
        self._start, self._tags = start, tags
        self._jobs: dict[str, TuningJob] = {}
        self.operations: dict[str, Operation] = {
            f"Create{_OPERATIONS}": lambda request, region: self.create(request, region=region),
            f"Describe{_OPERATIONS}": lambda request, region: self._find(request, region).describe(),
            f"Stop{_OPERATIONS}": self._stop,
            f"List{_OPERATIONS}s": self._list,
            f"ListTrainingJobsFor{_OPERATIONS}": self._list_trials,
        }

    def create(
        self, request: dict[str, Any], *, region: str = REGION, directory: Path | None = None, own: bool = False
    ) -> dict[str, Any]:
        """Starts a tuning job.

        Args:
            request: of CreateHyperParameterTuningJob.
            region: that it belongs to.
            directory: that holds the tree of each trial below its name; None: where training jobs have theirs.
            own: whether it is this process's own.

        Raises:
            RequestError: as SageMaker would answer, or for what only SageMaker can do.
        """
        check_shape(f"Create{_OPERATIONS}", request)
        if find_spec("optuna") is None:
            raise RequestError("tuning jobs on this machine need optuna: pip install 'dreambooth-sm[demo]'")
        if problems := [*_beyond_a_laptop(request)]:
            raise RequestError("; ".join(problems))
        name = request["HyperParameterTuningJobName"]
        arn = arn_of("hyper-parameter-tuning-job", name, region)
        parents = [
            self._find(parent, region)
            for parent in request.get("WarmStartConfig", {}).get("ParentHyperParameterTuningJobs", ())
        ]

        def start(trial: dict[str, Any]) -> TrainingJob:
            tree = directory / trial["TrainingJobName"] if directory else None
            return self._start(trial, region=region, directory=tree, own=own, tuning_arn=arn)

        job = TuningJob(request, arn, start, parents, directory)
        if self._jobs.setdefault(arn, job) is not job:
            raise RequestError(f"a tuning job with this name already exists ({arn})", "ResourceInUse")
        self._tags[arn] = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        job.thread.start()
        return {f"{_OPERATIONS}Arn": arn}

    def named(self, name: str) -> TuningJob:
        """The tuning job of this name, the latest of several regions.

        Raises:
            KeyError: there is none.
        """
        return {job.name: job for job in list(self._jobs.values())}[name]

    def close(self) -> None:
        """Stops those that still run, and waits for their end."""
        jobs = list(self._jobs.values())
        for job in jobs:
            job.stop()
        for job in jobs:
            job.thread.join()

    def _find(self, request: Mapping[str, Any], region: str) -> TuningJob:
        name = request.get("HyperParameterTuningJobName", "")
        try:
            return self._jobs[arn_of("hyper-parameter-tuning-job", name, region)]
        except KeyError:
            raise RequestError(f"tuning job {name!r} was not found", "ResourceNotFound") from None

    def _stop(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        job = self._find(request, region)
        if job.ended:
            raise RequestError(f"The request was rejected because the tuning job is in status {job.status}.")
        job.stop()
        return {}

    def _list(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        found = [
            job.summary()
            for job in list(self._jobs.values())
            if job.region == region
            and request.get("NameContains", "") in job.name
            and request.get("StatusEquals", job.status) == job.status
        ]
        found.sort(
            key=lambda each: each["CreationTime"], reverse=request.get("SortOrder", "Descending") == "Descending"
        )
        return _page(found, request, "HyperParameterTuningJobSummaries")

    def _list_trials(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        job = self._find(request, region)
        found = [
            summary
            for summary in job.trials()
            if request.get("StatusEquals", summary["TrainingJobStatus"]) == summary["TrainingJobStatus"]
        ]
        if request.get("SortBy") == "FinalObjectiveMetricValue":
            found = [each for each in found if _FINAL in each]
            found.sort(key=lambda each: each[_FINAL]["Value"])
        if request.get("SortOrder", "Ascending") == "Descending":
            found.reverse()
        return _page(found, request, "TrainingJobSummaries")


_FINAL = "FinalHyperParameterTuningJobObjectiveMetric"


class Tried:
    """A trial: values, and the training job that tries them.

    Args:
        asked: optuna's trial.
    """

    def __init__(self, asked: Any, values: dict[str, str], job: TrainingJob, objective: str) -> None:
        self.asked, self.values, self.job, self._objective = asked, values, job, objective
        self.reported = 0
        self.is_told = False

    @property
    def measures(self) -> list[float]:
        """Values of the objective so far."""
        return list(self.job.metric_values.get(self._objective, ()))

    def falls_behind(self) -> bool:
        """Tells optuna of new measures; whether it would rather stop the trial, by these."""
        new = self.measures[self.reported :]
        for value in new:
            self.reported += 1
            self.asked.report(value, self.reported)
        return bool(new) and bool(self.asked.should_prune())

    def summary(self, goal: str) -> dict[str, Any]:
        """A HyperParameterTrainingJobSummary."""
        description, found = self.job.describe(), self.measures
        names = ("TrainingJobName", "TrainingJobArn", "CreationTime", "TrainingJobStatus")
        optional = ("TrainingStartTime", "TrainingEndTime", "FailureReason")
        status = "Pending" if not self.job.ended else "Succeeded" if found else "Failed"
        return {
            **{name: description[name] for name in (*names, *(each for each in optional if each in description))},
            "TunedHyperParameters": self.values,
            "ObjectiveStatus": status,
            **({_FINAL: {"Type": goal, "MetricName": self._objective, "Value": found[-1]}} if found else {}),
        }


class TuningJob:
    """A tuning job: its description, and the thread that starts and stops its trials.

    Args:
        request: of CreateHyperParameterTuningJob.
        start: starts the training job of a request.
        parents: whose trials count.
        directory: that holds its trials' trees, where it is kept.
    """

    def __init__(
        self,
        request: Mapping[str, Any],
        arn: str,
        start: Callable[[dict[str, Any]], TrainingJob],
        parents: list[TuningJob],
        directory: Path | None,
    ) -> None:
        self.request, self.arn, self.directory = request, arn, directory
        self.name: str = request["HyperParameterTuningJobName"]
        self.region = arn.split(":")[3]
        self.status, self.created = "InProgress", time.time()
        self._start, self._parents = start, parents
        config = request["HyperParameterTuningJobConfig"]
        self._config, self._limits = config, config["ResourceLimits"]
        self._goal = config["HyperParameterTuningJobObjective"]
        self._ranges = distributions(config)
        self.tried: list[Tried] = []
        self._ended_at = 0.0
        self._reason = ""
        self._stop = threading.Event()
        self._lock = threading.RLock()
        self.thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    @property
    def ended(self) -> bool:
        return self.status in ("Completed", "Failed", "Stopped")

    @property
    def maximizes(self) -> bool:
        return bool(self._goal["Type"] == "Maximize")

    def stop(self) -> None:
        """Stops the trials that run, and starts no more."""
        with self._lock:
            if not self.ended:
                self.status = "Stopping"
        self._stop.set()

    def trials(self) -> list[dict[str, Any]]:
        """Their summaries, in the order of their start."""
        return [tried.summary(self._goal["Type"]) for tried in list(self.tried)]

    def describe(self) -> dict[str, Any]:
        """The answer of DescribeHyperParameterTuningJob."""
        with self._lock:
            found = self.trials()
            description = {
                **{key: value for key, value in self.request.items() if key != "Tags"},
                **self.summary(found),
                "LastModifiedTime": self._ended_at or time.time(),
            }
            if best := self._best(found):
                description["BestTrainingJob"] = best
            if self._reason:
                description["FailureReason"] = self._reason
            return description

    def summary(self, found: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """One entry of ListHyperParameterTuningJobs."""
        found = self.trials() if found is None else found
        states = [each["TrainingJobStatus"] for each in found]
        objectives = [each["ObjectiveStatus"] for each in found]
        return {
            "HyperParameterTuningJobName": self.name,
            "HyperParameterTuningJobArn": self.arn,
            "HyperParameterTuningJobStatus": self.status,
            "Strategy": self._config["Strategy"],
            "CreationTime": self.created,
            **({"HyperParameterTuningEndTime": self._ended_at} if self._ended_at else {}),
            "TrainingJobStatusCounters": {
                "Completed": states.count("Completed"),
                "InProgress": states.count("InProgress") + states.count("Stopping"),
                "RetryableError": 0,
                "NonRetryableError": states.count("Failed"),
                "Stopped": states.count("Stopped"),
            },
            "ObjectiveStatusCounters": {name: objectives.count(name) for name in ("Succeeded", "Pending", "Failed")},
            "ResourceLimits": dict(self._limits),
        }

    def _best(self, found: list[dict[str, Any]]) -> dict[str, Any] | None:
        done = [each for each in found if each["TrainingJobStatus"] == "Completed" and _FINAL in each]
        choose = max if self.maximizes else min
        return choose(done, key=lambda each: each[_FINAL]["Value"]) if done else None

    # What the platform does

    def _run(self) -> None:
        try:
            self._search(make_study(self.name, self._config, self._earlier()))
        except Exception as error:  # the platform's own fault: a tuning job has to end in some state
            self._stop_running()
            self._end("Failed", f"InternalServerError: {type(error).__name__}: {error}")

    def _earlier(self) -> Iterator[tuple[dict[str, Any], float]]:
        """Values and objectives of the parents' trials."""
        for tried in [tried for parent in self._parents for tried in parent.tried]:
            if tried.job.status == "Completed" and tried.measures:
                yield tried.asked.params, tried.measures[-1]

    def _search(self, study: Study) -> None:
        planned: float = self._limits.get("MaxNumberOfTrainingJobs", float("inf"))
        if self._config["Strategy"] == "Grid":
            planned = min(planned, len(combinations(self._config)))
        deadline = self.created + self._limits.get("MaxRuntimeInSeconds", float("inf"))
        is_over = False
        while True:
            running = [tried for tried in self.tried if not tried.job.ended]
            for tried in self.tried:
                self._look(study, tried)
            if self._stop.is_set() or time.time() > deadline or self._is_good_enough():
                is_over = True
                self._stop_running()
            is_over = is_over or len(self.tried) >= planned
            if is_over and all(tried.is_told for tried in self.tried):
                break
            if not is_over and len(running) < self._limits["MaxParallelTrainingJobs"]:
                self.tried.append(self._try_another(study))
            else:
                time.sleep(_PAUSE)
        if self._stop.is_set():
            self._end("Stopped")
        elif not any(tried.measures for tried in self.tried):
            self._end("Failed", "No training job has said its objective; see the training jobs' FailureReason.")
        else:
            self._end("Completed")

    def _try_another(self, study: Study) -> Tried:
        asked = study.ask(self._ranges)
        values = {name: value if isinstance(value, str) else repr(value) for name, value in asked.params.items()}
        definition = self.request["TrainingJobDefinition"]
        resources = definition.get("HyperParameterTuningResourceConfig") or definition["ResourceConfig"]
        kept = ("StaticHyperParameters", "HyperParameterTuningResourceConfig", "ResourceConfig")
        trial = {
            **{key: value for key, value in definition.items() if key not in kept},
            "TrainingJobName": f"{self.name}-{len(self.tried) + 1:03d}-{secrets.token_hex(4)}",
            "HyperParameters": {
                **definition.get("StaticHyperParameters", {}),
                **values,
                OBJECTIVE_KEY: self._goal["MetricName"],
            },
            "ResourceConfig": resources,
            "Tags": self.request.get("Tags", []),
        }
        return Tried(asked, values, self._start(trial), self._goal["MetricName"])

    def _look(self, study: Study, tried: Tried) -> None:
        """Tells optuna of a trial, and stops one that falls behind."""
        from optuna.trial import TrialState

        if tried.is_told:
            return
        behind = tried.falls_behind()
        if tried.job.ended:
            tried.is_told = True
            status, found = tried.job.status, tried.measures
            if status == "Failed" or not found:
                study.tell(tried.asked, state=TrialState.FAIL)
            elif status == "Stopped":
                study.tell(tried.asked, state=TrialState.PRUNED)
            else:
                study.tell(tried.asked, found[-1])
        elif behind and tried.job.status == "InProgress":
            _stop(tried.job)

    def _is_good_enough(self) -> bool:
        """Whether a criterion of completion is met, by trials that have left a model."""
        criteria = self._config.get("TuningJobCompletionCriteria", {})
        values = [tried.measures[-1] for tried in self.tried if tried.job.status == "Completed" and tried.measures]
        if not values or not criteria:
            return False
        sign = 1.0 if self.maximizes else -1.0
        signed = [sign * value for value in values]
        target = criteria.get("TargetObjectiveMetricValue")
        if target is not None and max(signed) >= sign * target:
            return True
        patience = criteria.get("BestObjectiveNotImproving", {}).get("MaxNumberOfTrainingJobsNotImproving")
        return patience is not None and len(signed) - 1 - signed.index(max(signed)) >= patience

    def _stop_running(self) -> None:
        for tried in self.tried:
            if tried.job.status == "InProgress":
                _stop(tried.job)

    def _end(self, status: str, reason: str = "") -> None:
        with self._lock:
            self.status, self._reason, self._ended_at = status, reason, time.time()


def _stop(job: TrainingJob) -> None:
    try:
        job.stop()
    except ValueError:  # it has ended meanwhile
        return


def _beyond_a_laptop(request: Mapping[str, Any]) -> Iterator[str]:
    config = request["HyperParameterTuningJobConfig"]
    automatic = request.get("Autotune") or config.get("ParameterRanges", {}).get("AutoParameters")
    if "TrainingJobDefinition" not in request or automatic:
        yield "the embedded SageMaker tunes one TrainingJobDefinition, without Autotune"
        return
    definition = request["TrainingJobDefinition"]
    goal = config.get("HyperParameterTuningJobObjective", {}).get("MetricName")
    known = [each["Name"] for each in definition["AlgorithmSpecification"].get("MetricDefinitions", ())]
    if goal not in known:
        yield f"HyperParameterTuningJobObjective: {goal!r} is not one of MetricDefinitions: {', '.join(known)}"
    found = [*all_ranges(config)]
    if not found:
        yield "ParameterRanges: a tuning job has at least one"
    if any(each.get("ScalingType") == "ReverseLogarithmic" for each in found):
        yield "ScalingType: the embedded SageMaker has no ReverseLogarithmic"
    if twice := sorted({each["Name"] for each in found} & {*definition.get("StaticHyperParameters", {})}):
        yield f"StaticHyperParameters: {', '.join(twice)} are tuned as well"
    if config["Strategy"] == "Grid" and any(each["Kind"] != "Categorical" for each in found):
        yield "Strategy Grid goes over categorical ranges alone"
    if config["Strategy"] == "Hyperband" and config.get("TrainingJobEarlyStoppingType") == "Auto":
        yield "Strategy Hyperband stops trials itself: TrainingJobEarlyStoppingType has to be Off"
    if "ConvergenceDetected" in config.get("TuningJobCompletionCriteria", {}):
        yield "ConvergenceDetected: the embedded SageMaker does not detect it; leave it out"
    for each in found:
        try:
            distribution(each)
        except ValueError as error:
            yield f"ParameterRanges: {each['Name']}: {error}"


def _page(found: list[dict[str, Any]], request: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not (token := request.get("NextToken", "0")).isdecimal():
        raise RequestError(f"NextToken is not one of {name}")
    start = int(token)
    end = start + request.get("MaxResults", 10)
    return {name: found[start:end], **({"NextToken": str(end)} if end < len(found) else {})}
