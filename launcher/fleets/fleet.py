"""A fleet after its start: which job has which subjects, what has ended and how, and what is to be started yet.

All of its state is in S3, so that any process goes on with it: ``fleet.json``, the request of its jobs and where models
go; ``jobs/JOB/fleet.jsonl``, the subjects of each job, started or not; ``outcomes/ID/``, a copy of the manifest or the
failure of each subject that has ended.
"""

from __future__ import annotations

import copy
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.fleet.outcome import FAILURE_NAME, Failure, states
from dreambooth_sm.fleet.subjects import FleetSubject, read_list, write_list
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.printing import redact
from dreambooth_sm.storage import S3Uri, delete_directory, get_object, list_objects, put_object
from launcher.aws.clients import Clients
from launcher.aws.service_errors import ServiceError, asking
from launcher.jobs.outputs import ENDED
from launcher.submit import submit

FLEET_CHANNEL, LIST_FILE, OUTCOMES = "fleet", "fleet.jsonl", "outcomes"
# Seconds between two looks at a fleet: of AWS, and of this machine.
_POLL, _POLL_LOCAL = 60.0, 0.25
# Seconds before a job that was not taken is tried again: the first time, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 15.0, 600.0
# Reasons of SageMaker's own for which a job is not taken, or has ended, and may well be another time.
_FULL = re.compile(r"ResourceLimitExceeded|LimitExceeded|Throttl|TooManyRequests|Capacity")
_PASSING = re.compile(r"^(CapacityError|InternalServerError|InternalFailure)")
_ROUND = re.compile(r"-r(\d+)-\d+$")
# How often a subject is tried again by itself when its job has ended for such a reason.
_MOST_ROUNDS = 3
_WORKERS = 16


@dataclass(frozen=True)
class FleetStatus:
    """How far a fleet is: each of its subjects is in one of four places.

    Attributes:
        done: ids of those with a model.
        failed: ids of those without one, to the reasons.
        running: ids of those in jobs that run.
        remaining: ids of those in jobs that have not started, or that have ended before their turn.
        jobs: names of the jobs that were started, to their status.
    """

    done: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    running: tuple[str, ...] = ()
    remaining: tuple[str, ...] = ()
    jobs: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """For people."""
        at_work = sum(status not in ENDED for status in self.jobs.values())
        return (
            f"{len(self.done)} done, {len(self.failed)} failed, {len(self.running)} in {at_work} running "
            f"job{'s' * (at_work != 1)}, {len(self.remaining)} remaining"
        )


def job_names(fleet: str, count: int, round: int = 0) -> list[str]:
    """Names of a fleet's jobs.

    Args:
        round: how often their subjects were tried before.
    """
    return [f"{fleet}{f'-r{round}' if round else ''}-{number:04d}" for number in range(1, count + 1)]


class Fleet:
    """A fleet that was started, by whatever process.

    Args:
        root: where its state is.
        clients: of SageMaker and S3.

    Raises:
        UserError: the fleet can't be found.
    """

    def __init__(self, root: S3Uri, clients: Clients) -> None:
        self.root, self._clients = root, clients
        state = get_object(root / "fleet.json", client=clients("s3"))
        if state is None:
            raise UserError(f"{root} holds no fleet: check its name, or name it as s3://bucket/prefix")
        self._state: dict[str, Any] = json.loads(state)
        self.name: str = self._state["name"]
        # What is written later is written as its jobs write.
        self._options = Hyperparameters.parse(self._state["request"]["HyperParameters"]).s3_options
        # By the name of the job.
        self._lists: dict[str, tuple[FleetSubject, ...]] = {}
        self._failures: dict[str, Failure] = {}
        self._not_taken = 0
        self._not_before = 0.0

    def __repr__(self) -> str:
        return f"Fleet({str(self.root)!r})"

    # State

    def status(self) -> FleetStatus:
        """How far it is, now: by one listing of outcomes and one of jobs, however many subjects there are.

        Raises:
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        jobs = self._jobs()  # first: a job that has ended by now has left the outcomes of all its subjects
        ended = states(list_objects(self.root / OUTCOMES, self._options, client=self._clients("s3")))
        job_of = self._job_of()
        open_yet = {subject: jobs.get(job, "") for subject, job in job_of.items() if subject not in ended}
        running = [subject for subject, status in open_yet.items() if status and status not in ENDED]
        failed = [subject for subject, is_done in ended.items() if not is_done]
        return FleetStatus(
            tuple(subject for subject, is_done in ended.items() if is_done),
            dict(zip(failed, self._in_parallel(self._reason, failed), strict=True)),
            tuple(running),
            tuple(open_yet.keys() - {*running}),
            jobs,
        )

    def models(self) -> dict[str, str]:
        """Where the models of the subjects lie that are done, by their ids."""
        done = states(list_objects(self.root / OUTCOMES, self._options, client=self._clients("s3")))
        found = {subject.id: subject.output or f"{self._state['models']}/{subject.id}" for subject in self.subjects()}
        return {name: found[name] for name, is_done in done.items() if is_done}

    def subjects(self) -> list[FleetSubject]:
        """All of them."""
        self._read_lists()
        return [*{subject.id: subject for its in self._lists.values() for subject in its}.values()]

    def _job_of(self) -> dict[str, str]:
        """The last job of each subject."""
        self._read_lists()
        return {subject.id: job for job in sorted(self._lists, key=_round_of) for subject in self._lists[job]}

    def _read_lists(self) -> None:
        """Reads the lists that are new."""
        names = list_objects(self.root / "jobs", self._options, client=self._clients("s3"))
        new = [name for name in names if name.endswith(f"/{LIST_FILE}") and name.partition("/")[0] not in self._lists]

        def read(name: str) -> tuple[FleetSubject, ...]:
            content = get_object(self.root / "jobs" / name, self._options, client=self._clients("s3")) or b""
            return read_list(content.decode(), name)

        self._lists |= dict(zip((name.partition("/")[0] for name in new), self._in_parallel(read, new), strict=True))

    def _jobs(self) -> dict[str, str]:
        """The jobs that SageMaker knows, and their status."""
        pages = (
            self._clients("sagemaker")
            .get_paginator("list_training_jobs")
            .paginate(NameContains=self.name, SortBy="CreationTime", SortOrder="Ascending")
        )
        with asking(f"the jobs of {self.name} can't be listed"):
            return {
                job["TrainingJobName"]: job["TrainingJobStatus"]
                for page in pages
                for job in page["TrainingJobSummaries"]
                if job["TrainingJobName"].startswith(f"{self.name}-")
            }

    def _failure(self, subject: str) -> Failure | None:
        """What a subject has failed with; None where that can't be read."""
        if subject not in self._failures:
            place = self.root / OUTCOMES / subject / FAILURE_NAME
            try:
                content = get_object(place, self._options, client=self._clients("s3"))
                self._failures[subject] = Failure.from_json(content or b"")
            except ValueError:
                return None
        return self._failures[subject]

    def _reason(self, subject: str) -> str:
        failure = self._failure(subject)
        return redact(failure.reason) if failure else "unknown"

    def _in_parallel(self, act: Callable[[str], Any], names: list[str]) -> list[Any]:
        with ThreadPoolExecutor(_WORKERS) as pool:
            return list(pool.map(act, names))

    # Following

    def wait(self, log: Callable[[str], None] = print) -> Fleet:
        """Starts what remains as others end, and follows it until every subject has ended or nothing can be started.

        Ctrl-C leaves the jobs that run running; :func:`launcher.attach_fleet` goes on with the rest.

        Args:
            log: gets a line whenever something has changed.

        Raises:
            UserError: SageMaker refuses a job for another reason than lack of capacity.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        told = ""
        while True:
            status = self.status()
            if (line := status.line()) != told:
                log(f"{self.name}: {line}")
                told = line
            self.advance(log, status)
            status = self.status() if status.remaining and not status.running else status
            if not status.running and not self._waiting(status):
                break
            time.sleep(_POLL_LOCAL if self._clients.is_local("sagemaker") else _POLL)
        for subject, reason in status.failed.items():
            log(f"failed: {subject}: {reason}")
        if status.remaining:
            log(f"without an end: {', '.join(sorted(status.remaining))}; retry() tries them again")
        return self

    def advance(self, log: Callable[[str], None] = lambda line: None, status: FleetStatus | None = None) -> None:
        """Starts as many jobs as may run beside those that do; and plans subjects again whose job SageMaker has ended
        for lack of capacity or for a fault of its own.

        Raises:
            UserError: SageMaker refuses a job for another reason than lack of capacity.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        status = status or self.status()
        self._plan_again_what_was_lost(status)
        at_work = sum(each not in ENDED for each in status.jobs.values())
        for job in self._waiting(status):
            if at_work >= self._state["parallel"] or time.monotonic() < self._not_before:
                return
            try:
                self._submit(job)
            except (ServiceError, UserError) as error:
                if not _may_pass(error):
                    raise
                pause = min(_LONGEST_WAIT, _FIRST_WAIT * 2**self._not_taken) * random.uniform(0.75, 1.25)
                self._not_taken += 1
                self._not_before = time.monotonic() + pause
                log(f"{job} is not taken now, and tried again in {pause:.0f} s: {error}")
                return
            log(f"started: {job}, with {len(self._lists[job])} subjects")
            self._not_taken = 0
            at_work += 1

    def _waiting(self, status: FleetStatus) -> list[str]:
        """Jobs that are planned and not started, and have subjects that have not ended."""
        open_yet = {*status.remaining, *status.running}
        current = self._job_of()
        return [
            job
            for job in sorted(self._lists, key=_round_of)
            if job not in status.jobs
            and any(subject.id in open_yet and current[subject.id] == job for subject in self._lists[job])
        ]

    def _submit(self, job: str) -> None:
        request = copy.deepcopy(self._state["request"])
        request["TrainingJobName"] = job
        for channel in request["InputDataConfig"]:
            if channel["ChannelName"] == FLEET_CHANNEL:
                channel["DataSource"]["S3DataSource"]["S3Uri"] = f"{self.root / 'jobs' / job}/"
        request["CheckpointConfig"]["S3Uri"] = str(self.root / "checkpoints" / job)
        try:
            submit(request, self._clients)
        except UserError as error:
            if "ResourceInUse" not in str(error):  # another process has started it
                raise

    def retry(self, log: Callable[[str], None] = print, *, bad_input: bool = False) -> Fleet:
        """Tries again subjects that have failed, and those whose job has ended before their turn.

        Args:
            bad_input: those as well whose input was wrong, and has been put right where it lies.
            log: gets a line for each job that is started.
        """
        status = self.status()
        lost = [subject for subject in status.remaining if self._job_of()[subject] in status.jobs]
        again = [subject for subject in status.failed if bad_input or not self._was_bad(subject)]
        for subject in again:
            delete_directory(self.root / OUTCOMES / subject, self._options, client=self._clients("s3"))
            self._failures.pop(subject, None)
        self._plan([*lost, *again])
        self.advance(log)
        return self

    def _was_bad(self, subject: str) -> bool:
        failure = self._failure(subject)
        return failure is not None and failure.bad_input

    def _plan_again_what_was_lost(self, status: FleetStatus) -> None:
        job_of = self._job_of()
        lost = [subject for subject in status.remaining if status.jobs.get(job_of[subject]) == "Failed"]
        ended = {job_of[subject] for subject in lost if _round_of(job_of[subject])[0] < _MOST_ROUNDS}
        again = {job for job in ended if self._may_try(job)}
        self._plan([subject for subject in lost if job_of[subject] in again])

    def _may_try(self, job: str) -> bool:
        with asking(f"{job} can't be looked at"):
            found = self._clients("sagemaker").describe_training_job(TrainingJobName=job)
        return bool(_PASSING.search(found.get("FailureReason", "")))

    def _plan(self, subjects: list[str]) -> None:
        """Writes new lists for subjects, as long as those of the jobs that they were in."""
        if not subjects:
            return
        job_of = self._job_of()
        known = {subject.id: subject for subject in self.subjects()}
        round = 1 + max(_round_of(job)[0] for job in self._lists)
        largest = max(len(self._lists[job_of[subject]]) for subject in subjects)
        parts = [subjects[first : first + largest] for first in range(0, len(subjects), largest)]
        for job, part in zip(job_names(self.name, len(parts), round), parts, strict=True):
            lines = write_list(known[subject] for subject in part).encode()
            put_object(self.root / "jobs" / job / LIST_FILE, lines, self._options, client=self._clients("s3"))
        self._read_lists()


def _round_of(job: str) -> tuple[int, str]:
    """How often the subjects of a job were tried before, and its name."""
    found = _ROUND.search(job)
    return (int(found[1]) if found else 0), job


def _may_pass(error: Exception) -> bool:
    """Whether a job may be taken a little later: quotas, throttling, capacity."""
    told: list[Exception | None] = [error, *_causes(error)]
    return any((isinstance(each, ServiceError) and each.kind.passes) or bool(_FULL.search(str(each))) for each in told)


def _causes(error: BaseException) -> Iterator[Any]:
    while error.__cause__:
        error = error.__cause__
        yield error
