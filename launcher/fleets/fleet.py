"""A fleet after its start: what has ended and how, what runs, and what is to be started yet.

All of its state is in S3 (:mod:`launcher.fleets.state`), so that any process goes on with it.
"""

from __future__ import annotations

import io
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from dreambooth_sm.errors import UserError
from dreambooth_sm.fleet.subjects import FleetSubject
from dreambooth_sm.printing import redact
from dreambooth_sm.storage import S3Uri, TransferError, get_object, list_objects
from launcher.aws.clients import Clients
from launcher.aws.service_errors import ServiceError
from launcher.fleets.clock import Clock
from launcher.fleets.jobs import NO_CAPACITY, WAITING, FleetJobs
from launcher.fleets.queue import Queue, QueuedJobs
from launcher.fleets.state import FleetState
from launcher.fleets.status import FleetStatus
from launcher.fleets.views import choose_table
from launcher.jobs.job import Job
from launcher.jobs.outputs import ENDED
from launcher.jobs.views import Display, Pictures

T = TypeVar("T")
# Seconds between two looks at a fleet of this machine, and of AWS; and a minute for each so many requests of a look.
_POLL_LOCAL, _POLL, REQUESTS_A_MINUTE = 0.25, 60.0, 10
# Of the time that is left, the next look at AWS waits for this share, and for so many seconds at most.
_POLLED_SHARE, _LONGEST_POLL = 0.1, 300.0
# How long AWS may give no answer before a fleet is not followed any further.
_PATIENCE = 3600.0
# Seconds before a job that was not taken is tried again: the first time, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 15.0, 600.0
# For which a job is not taken, and may well be another time.
_FULL = re.compile(r"ResourceLimitExceeded|LimitExceeded|Capacity")
_BUSY = re.compile(r"Throttl|TooManyRequests")
# How often a subject is tried again by itself when its job has ended for a fault of SageMaker's own; lack of capacity
# is waited for as long as it takes.
_MOST_FAULTS = 4
# The time left is told from what has ended in so many seconds.
_RECENT = 1800.0
# So many failures for one reason, and no success, are not the subjects' own.
SAME_FAILURES = 3
# How many of a subject's pictures are shown.
_PICTURES = 5


class Fleet:
    """A fleet that was started, by whatever process.

    Args:
        root: where its state is.
        clients: of SageMaker, AWS Batch and S3.
        clock: that it is followed by.

    Attributes:
        requests: that the last look took.

    Raises:
        UserError: the fleet can't be found.
    """

    def __init__(self, root: S3Uri, clients: Clients, clock: Clock | None = None) -> None:
        self.root, self._clients, self._clock = root, clients, clock or Clock()
        self._state = FleetState(root, clients)
        facts = self._state.facts
        self._parallel: int = facts["parallel"]
        first = str(facts["request"].get("ResourceConfig", {}).get("InstanceType", ""))
        self._types: list[str] = [first, *facts.get("alternatives", ())]
        jobs = partial(QueuedJobs, Queue(**facts["queue"])) if facts.get("queue") else FleetJobs
        self._jobs: FleetJobs = jobs(self.name, clients, self._clock, first)
        # Jobs that had ended before the last listing of outcomes.
        self._settled: set[str] = set()
        # Jobs that have ended, and nothing of which is to be tried again.
        self._whole: set[str] = set()
        self.requests = 0
        # Jobs that were asked to stop.
        self._stopping: set[str] = set()
        self._not_taken = 0
        self._not_before = 0.0
        # Whether more jobs may start at once, as soon as it was looked at those that have.
        self._has_more = False
        # Whether it is not known yet why some of the jobs have ended, whose subjects may be planned again.
        self._untold = False

    def __repr__(self) -> str:
        return f"Fleet({str(self.root)!r})"

    @property
    def name(self) -> str:
        return self._state.name

    # State

    def status(self) -> FleetStatus:
        """How far it is, now: by one listing of jobs and one of what has ended, however many subjects there are.

        Raises:
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        self._look()
        return self._status()

    def models(self) -> dict[str, str]:
        """Where the models of the subjects lie that are done, by their ids."""
        self._state.look(self._settled)
        subjects = self._state.subjects
        return {name: self._state.model_of(subjects[name]) for name, end in self._state.ended.items() if end.done}

    def subjects(self) -> list[FleetSubject]:
        """All of them."""
        self._state.look(self._settled)
        return list(self._state.subjects.values())

    def job(self, subject: str) -> Job:
        """The training job that a subject was last in: its log, its state.

        Raises:
            UserError: the fleet does not have the subject, or its job has not started.
        """
        self._look()
        self._check_subject(subject)
        name = self._state.job_of[subject]
        state = self._jobs.states.get(name)
        if state is None or state.training_job is None:
            raise UserError(f"{subject} is in {name}, which has not started")
        return Job(state.training_job, self._clients)

    def samples(self, subject: str) -> Pictures:
        """Some of the pictures that a subject's job has drawn, a list of Pillow's by name; a notebook shows them.

        Raises:
            UserError: the fleet does not have the subject.
        """
        from PIL import Image

        from dreambooth_sm.data.pictures import PICTURE_FORMATS

        if subject not in self._state.subjects:  # as after attach_fleet
            self._state.look(self._settled)
        self._check_subject(subject)
        place = S3Uri.parse(self._state.model_of(self._state.subjects[subject])) / "samples"
        s3 = self._clients("s3")
        names = sorted(name for name in list_objects(place, client=s3) if name.endswith((".png", ".jpg", ".webp")))
        files = [get_object(place / name, client=s3) or b"" for name in names[-_PICTURES:]]
        return Pictures(Image.open(io.BytesIO(file), formats=PICTURE_FORMATS) for file in files)

    def _check_subject(self, subject: str) -> None:
        if subject not in self._state.subjects:
            raise UserError(f"{self.name} has no subject {subject!r}; status() lists those that it has")

    def _look(self) -> None:
        # Jobs first: one that has ended by now has left the outcomes of all its subjects.
        self.requests = self._jobs.look() + self._jobs.look_at_ended()
        self.requests += self._state.look(self._settled)
        self._settled = {name for name, job in self._jobs.states.items() if not job.is_open}

    def _status(self) -> FleetStatus:
        """From what was looked at last."""
        ended, jobs = self._state.ended, self._jobs.states
        status = {name: jobs[name].status for name in self._state.lists if name in jobs}
        open_yet = {subject: job for subject, job in self._state.job_of.items() if subject not in ended}
        running = [subject for subject, job in open_yet.items() if status.get(job, WAITING) not in (*ENDED, WAITING)]
        done = sorted(subject for subject, end in ended.items() if end.done)
        failed = sorted(subject for subject, end in ended.items() if not end.done)
        self._state.read_failures(failed)
        return FleetStatus(
            tuple(done),
            {subject: self._reason(subject) for subject in failed},
            tuple(running),
            tuple(open_yet.keys() - {*running}),
            status,
            self._jobs.dollars(),
            self._seconds_left(len(open_yet)),
            max(done, key=lambda subject: ended[subject].at, default=None),
        )

    def _seconds_left(self, count: int) -> float | None:
        if not self._jobs.states or not self._state.ended:
            return None
        now = self._clock.now()
        since = max(now - _RECENT, min(job.created for job in self._jobs.states.values()))
        times = sorted(end.at for end in self._state.ended.values())
        recent = len(times) - bisect_left(times, since)
        return count * (now - since) / recent if recent else None

    def _reason(self, subject: str) -> str:
        failure = self._state.failure(subject)
        return redact(failure.reason) if failure else "unknown"

    # Following

    def wait(self, log: Callable[[str], None] | None = None) -> Fleet:
        """Starts what remains as others end, and follows it until every subject has ended or nothing can be started.

        Ctrl-C leaves the jobs that run running; :func:`launcher.attach_fleet` goes on with the rest.

        Args:
            log: gets a line whenever something has changed. Default: a table, as terminal and notebook can.

        Raises:
            UserError: AWS refuses a job for another reason than lack of capacity.
            ServiceError: AWS can't be reached for an hour, or not with these credentials.
        """
        say = log or print
        try:
            with Display(choose_table(self.name, log, self.samples)) as display:
                while True:
                    status = self._patiently(partial(self._step, display), display.say)
                    runs = any(job.is_open for job in self._jobs.states.values())
                    if not runs and not self._waiting() and not self._untold:
                        break
                    if not self._has_more:
                        self._clock.sleep(self._pause(status))
        except KeyboardInterrupt:
            say(f'what runs keeps running: launcher.attach_fleet("{self.root}").wait() follows it and starts the rest')
            raise
        for subject, reason in status.failed.items():
            say(f"failed: {subject}: {reason}")
        if reason := self._same_failure():
            say(f"nothing more is started: all that ended failed alike: {redact(reason)}; put that right, then retry()")
        if status.remaining:
            for job in sorted({self._state.job_of[subject] for subject in status.remaining}):
                if reason := self._jobs.why_failed(job):
                    say(f"failed: {job}: {redact(reason)}")
            say(f"without an end: {', '.join(sorted(status.remaining))}; retry() tries them again")
        return self

    def _step(self, display: Display[FleetStatus]) -> FleetStatus:
        status = self.status()
        display.show(lambda: status)
        self._start_more(display.say)
        return status

    def _pause(self, status: FleetStatus) -> float:
        """So long that looks are few in all, and a fleet of any size makes few requests a minute."""
        if self._clients.is_local("sagemaker"):
            return _POLL_LOCAL
        left = status.seconds_left
        if left is None:  # nothing has ended lately: as the estimate was
            share = 1 - len(self._state.ended) / max(1, len(self._state.subjects))
            left = share * 60 * (self._state.facts.get("minutes") or 0.0)
        return max(_POLL, min(_LONGEST_POLL, _POLLED_SHARE * left), _POLL * self.requests / REQUESTS_A_MINUTE)

    def _patiently(self, act: Callable[[], T], notice: Callable[[str], None]) -> T:
        """Does something, and again for a while where AWS gives no answer."""
        since, pause = self._clock.now(), _FIRST_WAIT
        while True:
            try:
                return act()
            except (ServiceError, TransferError) as error:
                passes = isinstance(error, TransferError) or error.kind.passes
                if not passes or self._clock.now() - since >= _PATIENCE:
                    raise
                notice(f"no answer from AWS, trying again: {error}")
                self._clock.sleep(pause * random.uniform(0.75, 1.25))
                pause = min(_LONGEST_WAIT, 2 * pause)

    def advance(self, log: Callable[[str], None] = lambda line: None) -> None:
        """Starts as many jobs as may run beside those that do; and plans subjects again whose job SageMaker has ended
        for lack of capacity or for a fault of its own.

        Raises:
            UserError: AWS refuses a job for another reason than lack of capacity.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        self._look()
        self._start_more(log)

    def _start_more(self, log: Callable[[str], None]) -> None:
        if self._state.is_stopped:
            self._untold = False
            self._stop_jobs(log)
            return
        self._plan_again_what_was_lost()
        states = self._jobs.states
        at_work = sum(states[job].is_open for job in self._state.lists if job in states)
        self._has_more, until = False, self._clock.now() + _POLL
        for job in self._waiting():
            if self._clock.now() >= until:  # five submissions a second: thousands take a while
                self._has_more = True
                return
            if (not self._jobs.takes_all and at_work >= self._parallel) or self._clock.now() < self._not_before:
                return
            if not self._start(job, log):
                return
            at_work += 1

    def _start(self, job: str, log: Callable[[str], None]) -> bool:
        """Sends a job, with each of its instance types in turn where the account has no room for one; whether one of
        them was taken."""
        for _ in self._types:
            try:
                self._jobs.send(self._request(job))
            except (ServiceError, UserError) as error:
                if not _may_pass(error):
                    raise
                refusal = error
            else:
                log(f"started: {job}, with {len(self._state.lists[job])} subjects")
                self._not_taken = 0
                return True
            if not _says(refusal, _FULL):
                break
            self._next_type()
        pause = self._step_back()
        log(f"{job} is not taken now, and tried again in {pause:.0f} s: {refusal}")
        return False

    def _step_back(self) -> float:
        """Starts nothing for a while, longer each time; the seconds."""
        pause: float = min(_LONGEST_WAIT, _FIRST_WAIT * 2**self._not_taken) * random.uniform(0.75, 1.25)
        self._not_taken = min(self._not_taken + 1, 10)
        self._not_before = self._clock.now() + pause
        return pause

    def _next_type(self) -> None:
        self._types = [*self._types[1:], self._types[0]]

    def _request(self, job: str) -> dict[str, Any]:
        """With the instance types as they are tried now; SageMaker itself chooses between them, but for spot."""
        request = self._state.request(job)
        if len(self._types) > 1:
            resources = request["ResourceConfig"]
            if request.get("EnableManagedSpotTraining"):
                resources["InstanceType"] = self._types[0]
            else:
                del resources["InstanceType"]
                resources["InstancePreferences"] = [{"InstanceType": each} for each in self._types]
        return request

    def _waiting(self) -> list[str]:
        """Jobs that are planned and not started, and have subjects that have not ended."""
        if self._state.is_stopped or self._same_failure():
            return []
        current, states = self._state.job_of, self._jobs.states
        return [
            job
            for job, subjects in sorted(self._state.lists.items())
            if job not in states
            and any(subject.id not in self._state.ended and current[subject.id] == job for subject in subjects)
        ]

    def _same_failure(self) -> str:
        """What the first subjects have all failed with; empty where one is done, or they failed with several things."""
        ended = self._state.ended
        if len(ended) < SAME_FAILURES or any(end.done for end in ended.values()):
            return ""
        reasons = {failure.reason if (failure := self._state.failure(subject)) else "" for subject in ended}
        return reasons.pop() if len(reasons) == 1 else ""

    def stop(self, log: Callable[[str], None] = print) -> Fleet:
        """Ends the jobs that run, which save checkpoints first, and starts no more, whoever follows the fleet.

        Subjects that have ended keep their models; :meth:`retry` goes on with the others.

        Args:
            log: gets a line for each job.

        Raises:
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        self._state.stop()
        self._look()
        self._stop_jobs(log)
        return self

    def _stop_jobs(self, log: Callable[[str], None]) -> None:
        states = self._jobs.states
        for job in [job for job in self._state.lists if job in states and states[job].is_open]:
            if job not in self._stopping:
                self._jobs.stop(job)
                self._stopping.add(job)
                log(f"stopped: {job}")

    def retry(self, log: Callable[[str], None] = print, *, bad_input: bool = False) -> Fleet:
        """Tries again subjects that have failed, and those whose job has ended before their turn; and goes on with a
        fleet that was stopped.

        Args:
            bad_input: those as well whose input was wrong, and has been put right where it lies.
            log: gets a line for each job that is started.
        """
        self._state.go_on()
        self._stopping.clear()
        status = self.status()
        job_of = self._state.job_of
        lost = [subject for subject in status.remaining if status.jobs.get(job_of[subject]) in ENDED]
        again = [subject for subject in status.failed if bad_input or not self._was_bad(subject)]
        if not self._state.plan_again([*lost, *again]):
            log("another process tries them again")
            self._look()
        self._start_more(log)
        return self

    def _was_bad(self, subject: str) -> bool:
        failure = self._state.failure(subject)
        return failure is not None and failure.bad_input

    def _plan_again_what_was_lost(self) -> None:
        again: list[str] = []
        is_short = self._untold = False
        for job, subjects in list(self._state.lists.items()):
            state = self._jobs.states.get(job)
            if job in self._whole or state is None or state.is_open:
                continue
            lost = [
                each.id for each in subjects if each.id not in self._state.ended and self._state.job_of[each.id] == job
            ]
            reason = self._jobs.why_again(job) if lost else ""
            if reason is None:  # the next look tells
                self._untold = True
                continue
            if NO_CAPACITY.search(reason):
                is_short = True
                again += lost
            elif reason and self._faults(lost[0]) < _MOST_FAULTS:
                again += lost
            else:
                self._whole.add(job)
        if not self._state.plan_again(again):
            self._look()
        if is_short:
            self._next_type()
            self._step_back()

    def _faults(self, subject: str) -> int:
        """How many of the jobs that a subject was in have ended for a fault of SageMaker's own."""
        jobs = [job for job, subjects in self._state.lists.items() if any(each.id == subject for each in subjects)]
        reasons = [self._jobs.why_again(job) or "" for job in jobs if job in self._jobs.states]
        return sum(bool(reason) and not NO_CAPACITY.search(reason) for reason in reasons)


def _may_pass(error: Exception) -> bool:
    """Whether a job may be taken a little later: quotas, throttling, capacity."""
    return (isinstance(error, ServiceError) and error.kind.passes) or _says(error, _FULL) or _says(error, _BUSY)


def _says(error: Exception, words: re.Pattern[str]) -> bool:
    told: list[Exception] = [error, *_causes(error)]
    return any(words.search(str(each)) for each in told)


def _causes(error: BaseException) -> Iterator[Any]:
    while error.__cause__:
        error = error.__cause__
        yield error
