"""A tuning job after its start, on AWS or on the embedded services: its trials, the best of them, their pictures."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import redact
from launcher.aws.advice import advice_for
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError, asking, stopping
from launcher.instances import INSTANCES
from launcher.jobs.job import Job, JobFailed, JobStopped
from launcher.jobs.views import Display
from launcher.tuning.grid import TrialGrid
from launcher.tuning.status import Trial, TuningStatus, read_trials
from launcher.tuning.views import choose_view

# Seconds between two looks: of this machine, and of AWS; each takes two requests, and one more for each hundred trials.
_POLL_LOCAL, _POLL = 0.25, 30.0
# How long AWS may give no answer before a tuning job is not followed any further.
_PATIENCE, _PATIENCE_LOCAL = 3600.0, 10.0
_LAST_STEP = re.compile(r"^Steps: (\d+) of training", re.MULTILINE)


class Tuning:
    """A tuning job that was started, by whatever SDK.

    Args:
        name: of the tuning job.
        clients: of SageMaker, CloudWatch Logs and S3; default: those of the standard AWS settings.
        directory: of a tuning job of this machine, which holds the trees of its trials.

    Examples:
        >>> tuning = Tuning("tuning-20261130-101500-1a2b")
        >>> tuning.wait().best_job.download("my-model")  # doctest: +SKIP
        PosixPath('my-model')
    """

    def __init__(self, name: str, clients: Clients | None = None, *, directory: Path | None = None) -> None:
        self.name, self.directory = name, directory
        self._clients = clients or Clients()

    def __repr__(self) -> str:
        return f"Tuning({self.name!r})"

    # State

    def describe(self) -> dict[str, Any]:
        """SageMaker's own description of the tuning job.

        Raises:
            UserError: the tuning job was not found in this account and region.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        sagemaker = self._clients("sagemaker")
        try:
            with asking(f"{self.name} can't be looked at"):
                found: dict[str, Any] = sagemaker.describe_hyper_parameter_tuning_job(
                    HyperParameterTuningJobName=self.name
                )
        except ServiceError as error:
            if error.kind is Kind.MISSING:
                raise UserError(f"tuning job {self.name!r} was not found in {sagemaker.meta.region_name}") from None
            raise
        return found

    def status(self) -> TuningStatus:
        """How far it is, now, with all trials that were started.

        Raises:
            UserError: the tuning job was not found in this account and region.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        return self._status(self.describe())

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Those that were started, by number."""
        return self.status().trials

    @property
    def best(self) -> Trial:
        """The best trial that has left a model.

        Raises:
            UserError: none has yet.
        """
        status = self.status()
        if status.best is None:
            raise UserError(f"{self.name}: no trial has left a model with its {status.objective} ({status.line()})")
        return status.best

    @property
    def best_job(self) -> Job:
        """Its training job: log, report, model.

        Raises:
            UserError: no trial has left a model yet.
        """
        return self.job(self.best)

    def job(self, trial: Trial | int) -> Job:
        """The training job of a trial, or of the trial of a number.

        Raises:
            UserError: there is no such trial.
        """
        if isinstance(trial, int):
            found = {each.number: each for each in self.trials}
            if trial not in found:
                raise UserError(f"{self.name} has started no trial {trial}; it has started {len(found)}")
            trial = found[trial]
        return Job(trial.name, self._clients, directory=self.directory / trial.name if self.directory else None)

    def table(self) -> Any:
        """Trials with their values, objective, state, minutes and dollars, the best first.

        Returns:
            a pandas DataFrame; a list of dictionaries where pandas is not installed.
        """
        status = self.status()
        ranked = status.ranked()
        rows = [
            {
                "trial": trial.number,
                **{name: _number(value) for name, value in trial.values.items()},
                status.objective: trial.objective,
                "status": trial.status,
                "minutes": round(trial.seconds / 60, 2),
                "dollars": trial.dollars,
                "job": trial.name,
            }
            for trial in [*ranked, *(each for each in status.trials if each not in ranked)]
        ]
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows)

    def samples(self, count: int = 4) -> TrialGrid:
        """Pictures that the best trials have drawn after training, a row a trial; a notebook shows them.

        Args:
            count: of trials, at most.
        """
        status = self.status()
        return TrialGrid(status.objective, [(trial, self._last_pictures(trial)) for trial in status.ranked()[:count]])

    def _last_pictures(self, trial: Trial) -> list[Any]:
        pictures = self.job(trial).samples()
        steps = [int(found[1]) if (found := _LAST_STEP.search(_says(each))) else 0 for each in pictures]
        return [picture for picture, step in zip(pictures, steps, strict=True) if step == max(steps)]

    def _repr_html_(self) -> str:
        from launcher.tuning.views import tuning_html

        return tuning_html(self.name, self.status())

    # Following

    def wait(self, log: Callable[[str], None] | None = None) -> Tuning:
        """Follows the tuning job until it has ended.

        Ctrl-C leaves one on AWS running and says how to follow it again; one of this machine is stopped by it.

        Args:
            log: gets a line whenever something has changed. Default: a table, as terminal and notebook can.

        Returns:
            this tuning job.

        Raises:
            JobFailed: no trial has come to an objective; with SageMaker's reason.
            JobStopped: somebody stopped it.
            ServiceError: it can't be followed any further, and keeps running.
        """
        try:
            with Display(choose_view(self.name, log, self.samples)) as display:
                for status in self._looks(display.say):
                    display.show(lambda seen=status: seen)  # type: ignore[misc]
        except KeyboardInterrupt:
            self._interrupted()
            raise
        return self._end(status)

    def stop(self) -> None:
        """Asks SageMaker to stop the trials that run, and to start no more; :meth:`wait` waits until it has ended.

        Raises:
            UserError: the tuning job was not found.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        with stopping(self.name, lambda: self.status().has_ended):
            self._clients("sagemaker").stop_hyper_parameter_tuning_job(HyperParameterTuningJobName=self.name)

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine."""
        return self._clients.is_local("sagemaker")

    def _status(self, description: dict[str, Any]) -> TuningStatus:
        config = description["HyperParameterTuningJobConfig"]
        goal = config.get("HyperParameterTuningJobObjective", {})
        pages = self._clients("sagemaker").get_paginator("list_training_jobs_for_hyper_parameter_tuning_job")
        with asking(f"the trials of {self.name} can't be listed"):
            summaries = [
                each
                for page in pages.paginate(HyperParameterTuningJobName=self.name, MaxResults=100)
                for each in page["TrainingJobSummaries"]
            ]
        return TuningStatus(
            description["HyperParameterTuningJobStatus"],
            goal.get("MetricName", "objective"),
            goal.get("Type") != "Minimize",
            config["ResourceLimits"].get("MaxNumberOfTrainingJobs", len(summaries)),
            read_trials(summaries, self._price(description), time.time()),
        )

    def _price(self, description: dict[str, Any]) -> float | None:
        """Of the instances of a trial, in dollars an hour."""
        definition = description.get("TrainingJobDefinition", {})
        resources = definition.get("HyperParameterTuningResourceConfig") or definition.get("ResourceConfig", {})
        instance = INSTANCES.get(resources.get("InstanceType", ""))
        if self.is_local or instance is None or instance.usd_per_hour is None:
            return None
        return instance.usd_per_hour * float(resources.get("InstanceCount", 1))

    def _looks(self, notice: Callable[[str], None]) -> Iterator[TuningStatus]:
        """How far it is, again and again, until it has ended.

        Raises:
            ServiceError: it can't be followed any further.
        """
        pause = _POLL_LOCAL if self.is_local else _POLL
        patience = _PATIENCE_LOCAL if self.is_local else _PATIENCE
        since, told = time.monotonic(), False
        while True:
            try:
                status = self.status()
            except ServiceError as error:
                if not error.kind.passes or time.monotonic() - since >= patience:
                    raise ServiceError(
                        f"the tuning job {self.name} keeps running, and can't be followed from here ({error.reason}): "
                        f'{error.advice or "put that right"}, then launcher.attach_tuning("{self.name}").wait() '
                        "follows it again",
                        error.kind,
                        error.reason,
                        error.advice,
                    ) from error
                if not told:
                    notice(f"no answer from SageMaker, trying again: {error.reason}")
                told = True
            else:
                since, told = time.monotonic(), False
                yield status
                if status.has_ended:
                    return
            time.sleep(pause)

    def _interrupted(self) -> None:
        if not self.is_local:
            print(
                f"{self.name} keeps running: launcher.attach_tuning({self.name!r}).wait() follows it again, .stop() "
                "ends it.",
                flush=True,
            )
            return
        self.stop()  # it lives no longer than this process
        for _ in self._looks(lambda line: None):
            pass

    def _end(self, status: TuningStatus) -> Tuning:
        if status.status == "Completed":
            return self
        if status.status == "Stopped":
            raise JobStopped(self.name, f"the tuning job was stopped ({status.line()})")
        reason = redact(str(self.describe().get("FailureReason") or status.line()))
        failed = [f"{trial.name}: {redact(trial.reason)}" for trial in status.trials if trial.reason]
        raise JobFailed(self.name, reason, failed[:5], advice_for("\n".join([reason, *failed])))


def _says(picture: Any) -> str:
    return str(picture.info.get("parameters", ""))


def _number(value: str) -> object:
    try:
        number = float(value.strip('"'))
    except ValueError:
        return value.strip('"')
    return int(number) if number == int(number) and "." not in value and "e" not in value.lower() else number
