"""From options to a prepared tuning job: one training job is checked, its files are staged once, for all trials."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.tracking import TENSORBOARD
from launcher.aws.account import Account
from launcher.local.run import local_request, tune_locally
from launcher.measured import CLASS_CACHE
from launcher.prepare import PreparedJob, PreparedLocalJob, prepare, prepare_local
from launcher.resources import Resources
from launcher.submit import starting
from launcher.training_request import (
    MAX_HYPERPARAMETERS,
    MAX_TAGS,
    measure_definitions,
    training_request,
)
from launcher.tuning.ranges import Ranges, read_ranges
from launcher.tuning.search import MAX_ENVIRONMENT, Search, refused_name, tuning_request
from launcher.tuning.trials import Trials, TuningEstimate, check_trials, estimate_trials, plan_trials
from launcher.tuning.tuning import Tuning

# Resources that no tuning job takes.
_OF_SAGEMAKER = ("checkpoint", "keep_alive", "compression")


@dataclass
class PreparedTuning:
    """A tuning job for SageMaker that has been checked.

    Attributes:
        job: a trial of it.
        notes: lines for people.
    """

    name: str
    job: PreparedJob
    trials: Trials
    search: Search
    estimate: TuningEstimate
    notes: tuple[str, ...] = ()

    @property
    def request(self) -> dict[str, Any]:
        """For ``create_hyper_parameter_tuning_job``."""
        training = training_request(self.trials.hyperparameters, self.job.resources, self.job.channels)
        return tuning_request(training, self.name, self.trials.ranges, self.search, self.trials.measures)

    def lines(self) -> list[str]:
        """Tells people what will be done."""
        kept = [line for line in self.job.lines() if line.startswith(("image:", "bucket:", "files:", "warning:"))]
        return [
            f"tuning: {self.name}",
            f"trials: {self.search.words(self.trials.ranges)}",
            *self.trials.notes,
            *self.estimate.lines(),
            *self.notes,
            *kept,
        ]

    def submit(self, say: Callable[[str], None] = lambda line: None) -> Tuning:
        """Stages the files, and starts the tuning job with boto3.

        Raises:
            UserError: SageMaker refuses it, or files can't be sent.
            ServiceError: AWS can't be reached, not with these credentials, or has a fault of its own.
            TransferError: the transfer failed in spite of retries.
        """
        self.job.stage(say)
        account = self.job.account
        assert account is not None
        with starting(self.name, "tuning job", f'launcher.attach_tuning("{self.name}")'):
            account.clients("sagemaker").create_hyper_parameter_tuning_job(**self.request)
        return Tuning(self.name, account.clients)


@dataclass
class PreparedLocalTuning:
    """A tuning job for this machine that has been checked.

    Attributes:
        job: a trial of it.
    """

    name: str
    job: PreparedLocalJob
    trials: Trials
    search: Search

    def lines(self) -> list[str]:
        """Tells people what will be done."""
        return [
            f"tuning: {self.name}, on this machine",
            f"trials: {self.search.words(self.trials.ranges)}",
            *self.trials.notes,
            *self.job.lines(),
        ]

    def submit(self, directory: str | Path | None = None) -> Tuning:
        """Starts it.

        Args:
            directory: that holds the ``/opt/ml`` tree of each trial; a new temporary directory if None.

        Raises:
            UserError: the entrypoint, or Docker, is not here.
        """
        place = Path(directory or tempfile.mkdtemp(prefix="dreambooth-sm-")).resolve()
        values = self.trials.hyperparameters.to_sagemaker()
        training = local_request(self.name, values, self.job.data_sources, self.job.image)
        training["AlgorithmSpecification"]["MetricDefinitions"] = measure_definitions()
        request = tuning_request(training, self.name, self.trials.ranges, self.search, self.trials.measures)
        return Tuning(self.name, tune_locally(request, place), directory=place)


def prepare_tuning(
    options: Mapping[str, Any], ranges: Ranges | None, search: Search, account: Account
) -> PreparedTuning:
    """Checks everything that can be checked of a tuning job on SageMaker.

    Args:
        options: of a training job.

    Raises:
        UserError: with everything that was found.
    """
    job, trials = None, None
    name = str(options.get("name") or _new_name())
    problems = _refused(name, options, search)
    is_search = not problems.found
    # The job's own upload would go to one place for all trials.
    own = {"output_mode": "uncompressed"} if options.get("output") and "output_mode" not in options else {}
    with problems.collected():
        job = prepare({**options, **own, "name": None if refused_name(name) else name}, account)
    with problems.collected():
        _check_parents(search, account)
    with problems.collected():
        if job is not None and is_search:
            trials = _plan(job, ranges, search)
        else:
            read_ranges(ranges, job.hyperparameters if job else _likely(options))
    problems.raise_any()
    assert job is not None
    assert trials is not None
    parallel, notes = _within_quota(job, search, account)
    search = replace(search, parallel=parallel)
    resources = job.resources
    estimate = estimate_trials(
        trials,
        search,
        job.estimate.instance,
        instance_count=resources.instance_count,
        pictures=job.pictures,
        max_minutes=resources.max_minutes,
        known=job.estimate.known,
    )
    prepared = PreparedTuning(name, job, trials, search, estimate, tuple(notes))
    problems.found += _refused_request(prepared.request)
    problems.raise_any()
    return prepared


def _plan(job: PreparedJob, ranges: Ranges | None, search: Search) -> Trials:
    resources, instance = job.resources, job.estimate.instance
    return plan_trials(
        job.hyperparameters,
        ranges,
        search,
        pictures=job.pictures,
        processes=instance.count * resources.instance_count,
        isolated=resources.network_isolation,
        class_cache=_class_cache(resources),
    )


def _class_cache(resources: Resources) -> str:
    return str(resources.workspace / CLASS_CACHE)


def prepare_local_tuning(options: Mapping[str, Any], ranges: Ranges | None, search: Search) -> PreparedLocalTuning:
    """Checks what a tuning job of this machine needs.

    Raises:
        UserError: with everything that was found.
    """
    job, trials = None, None
    name = str(options.get("name") or _new_name())
    problems = _refused(name, options, search)
    is_search = not problems.found
    if options.get("output"):
        problems.found.append("output: trials of this machine keep their models in `directory`; leave output out")
    own = {key: value for key, value in options.items() if key not in (*_OF_SAGEMAKER, "name", "output")}
    with problems.collected():
        job = prepare_local(own)
    with problems.collected():
        if job is not None and is_search:
            trials = plan_trials(job.hyperparameters, ranges, search, pictures=job.pictures)
            check_trials(trials)
        else:
            read_ranges(ranges, job.hyperparameters if job else _likely(options))
    problems.raise_any()
    assert job is not None
    assert trials is not None
    return PreparedLocalTuning(name, job, trials, search)


def _new_name() -> str:
    return f"tuning-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _likely(options: Mapping[str, Any]) -> Hyperparameters:
    """What is known of a job that is refused, as far as ranges depend on it."""
    words = {key: options[key] for key in ("method", "class_prompt", "optimizer") if options.get(key)}
    try:
        return Hyperparameters.parse({"instance_prompt": "photo of zwx", **words})
    except UserError:
        return Hyperparameters()


def _refused(name: str, options: Mapping[str, Any], search: Search) -> Problems:
    """What is wrong whatever the job is."""
    problems = Problems()
    if refusal := refused_name(name):
        problems.found.append(refusal)
    problems.found += [*search.problems(), *_refused_options(options)]
    return problems


def _refused_options(options: Mapping[str, Any]) -> Iterator[str]:
    """Options of a job that mean nothing, or harm, where many run at a time."""
    if options.get("checkpoint"):
        yield "checkpoint: each trial has a place of its own; leave it out"
    if options.get("keep_alive"):
        yield "keep_alive: automatic tuning keeps no instances; leave it out"
    if options.get("compression"):
        yield "compression: pictures of trials can't be compared in archives; leave it out"
    for name in ("manual_upload_model_path", "manul_upload_model_path"):
        if options.get(name):
            yield f"{name}: all trials would write there; leave it out, and set output"
    if options.get("output_mode") == "direct":
        yield "output_mode=direct: all trials would write to one place; leave it out"
    for name in ("fleet", "fleet_outcomes"):
        if options.get(name):
            yield f"{name}: values are searched for one subject; leave it out"
    if isinstance(options.get("tags"), Mapping) and len(options["tags"]) >= MAX_TAGS:
        yield f"tags: a tuning job has one of its own, so that {MAX_TAGS - 1} are left; leave some out"


def _refused_request(request: Mapping[str, Any]) -> Iterator[str]:
    """What breaks a limit of CreateHyperParameterTuningJob that a training job does not have."""
    definition = request["TrainingJobDefinition"]
    ranges = request["HyperParameterTuningJobConfig"]["ParameterRanges"].values()
    count = len(definition["StaticHyperParameters"]) + sum(map(len, ranges))
    if count > MAX_HYPERPARAMETERS:
        yield f"a job has at most {MAX_HYPERPARAMETERS} hyperparameters, and these trials {count}"
    if len(definition.get("Environment", {})) > MAX_ENVIRONMENT:
        yield f"environment: a tuning job takes at most {MAX_ENVIRONMENT} variables; leave some out"
    if TENSORBOARD in definition["StaticHyperParameters"].get("report_to", ""):
        yield "report_to: automatic tuning does not take TensorBoard's events to S3; leave tensorboard out"


def _check_parents(search: Search, account: Account) -> None:
    """Looks whether the trials of earlier tuning jobs can count.

    Raises:
        UserError: the tuning job was not found, has not ended, or had another goal.
    """
    problems = Problems()
    for name in search.warm_start:
        with problems.collected():
            found = Tuning(name, account.clients).describe()
            goal = found["HyperParameterTuningJobConfig"].get("HyperParameterTuningJobObjective", {}).get("MetricName")
            if found["HyperParameterTuningJobStatus"] in ("InProgress", "Stopping"):
                raise UserError(f"warm_start: {name} has not ended; wait for it, or leave it out")
            if goal != search.objective:
                raise UserError(f"warm_start: {name} searched for the best {goal}, and not {search.objective}")
    problems.raise_any()


def _within_quota(job: PreparedJob, search: Search, account: Account) -> tuple[int, list[str]]:
    """Trials that may run at a time, and a line where these are fewer than were asked for."""
    name, count = job.estimate.instance.name, job.resources.instance_count
    room = account.room_for(name, spot=job.resources.spot)
    if room is None or room // count >= search.parallel:
        return search.parallel, []
    fewer = max(1, room // count)
    return fewer, [f"quota: {fewer} trials on {name} at a time, and not {search.parallel}"]
