"""SageMaker, AWS Batch and S3 whose jobs only take time, on a clock that does not wait: what a fleet's launcher meets.

Training jobs start late, write what their subjects end with, are interrupted, lose their instance, find no capacity.
Requests are throttled and counted. Nothing here knows the launcher.
"""

from __future__ import annotations

import heapq
import io
import itertools
import json
import random
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import ClientError

from dreambooth_sm.fleet.outcome import FAILURE_NAME, Failure
from dreambooth_sm.manifest import MANIFEST_NAME
from launcher.aws.clients import Clients
from launcher.fleets.clock import Clock

# Published: of AWS Batch, which can't be raised. Assumed: SageMaker publishes no rates of its own.
SUBMISSIONS_A_SECOND, SAGEMAKER_A_SECOND, BURST = 5.0, 2.0, 10
_PAGE = 1000
# Seconds by which SageMaker's clock is behind the launcher's.
_BEHIND = 120.0


@dataclass(frozen=True)
class World:
    """What jobs meet; all of it assumed.

    Attributes:
        start_minutes, subject_minutes: of a job, and of each of its subjects.
        rooms: instances of each type that the account may use at a time.
        short: share of the hours in which a type has no capacity.
        hours_to_interruption: of a spot instance, on the mean; each costs up to 20 minutes.
        lost_jobs: share of jobs that SageMaker ends with a fault of its own, at any moment.
        failing: share of subjects that fail at their first try.
        bad: share of them whose pictures are at fault.
        throttled: share of requests that are refused, whatever their rate.
    """

    start_minutes: float
    subject_minutes: float
    rooms: dict[str, int]
    short: float = 0.15
    hours_to_interruption: float = 6.0
    lost_jobs: float = 0.02
    failing: float = 0.005
    bad: float = 0.5
    throttled: float = 0.02


class SimulatedClock(Clock):
    """A clock that jumps: whoever sleeps lets what is due happen."""

    def __init__(self) -> None:
        self._now = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        end = self._now + seconds
        while self._due and self._due[0][0] <= end:
            self._now, _, act = heapq.heappop(self._due)
            act()
        self._now = end

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Lets something happen later."""
        heapq.heappush(self._due, (self._now + seconds, next(self._order), act))


class Counted:
    """Requests, which are counted, and refused where there are too many.

    Args:
        rate: that requests of one operation may have; None: any.
    """

    def __init__(self, clock: SimulatedClock, chance: random.Random, calls: Counter[str], throttled: float) -> None:
        self.clock, self.chance, self.calls, self._throttled = clock, chance, calls, throttled
        self._tokens: dict[str, tuple[float, float]] = {}

    def count(self, service: str, operation: str, rate: float | None = None) -> None:
        """Raises ClientError where the request is throttled."""
        self.calls[f"{service}.{operation}"] += 1
        if rate is None:
            return
        tokens, since = self._tokens.get(operation, (float(BURST), self.clock.now()))
        tokens = min(BURST, tokens + rate * (self.clock.now() - since))
        if tokens < 1 or self.chance.random() < self._throttled:
            self._tokens[operation] = (tokens, self.clock.now())
            raise fault("ThrottlingException", operation)
        self._tokens[operation] = (tokens - 1, self.clock.now())


class SimulatedS3:
    """Objects in memory."""

    def __init__(self, counted: Counted) -> None:
        config = SimpleNamespace(retries={"total_max_attempts": 3})
        self.meta = SimpleNamespace(config=config, endpoint_url="https://s3.simulated")
        self.objects: dict[str, tuple[bytes, float]] = {}
        self._keys: list[str] = []
        self._counted = counted

    def write(self, key: str, body: bytes) -> None:
        """Puts an object there, as a job does."""
        if key not in self.objects:
            self._keys.insert(bisect_left(self._keys, key), key)
        self.objects[key] = (body, self._counted.clock.now())

    def put_object(self, *, Key: str, Body: bytes, **named: Any) -> dict[str, Any]:  # noqa: N803
        self._counted.count("s3", "PutObject")
        if "IfNoneMatch" in named and Key in self.objects:
            raise fault("PreconditionFailed", "PutObject", 412)
        self.write(Key, Body)
        return {"ETag": '"simulated"', "ChecksumCRC64NVME": named.get("ChecksumCRC64NVME", "")}

    def get_object(self, *, Key: str, **_: Any) -> dict[str, Any]:  # noqa: N803
        self._counted.count("s3", "GetObject")
        if Key not in self.objects:
            raise fault("NoSuchKey", "GetObject", 404)
        body = self.objects[Key][0]
        return {"Body": io.BytesIO(body), "ContentLength": len(body)}

    def delete_object(self, *, Key: str, **_: Any) -> dict[str, Any]:  # noqa: N803
        self._counted.count("s3", "DeleteObject")
        if self.objects.pop(Key, None):
            self._keys.remove(Key)
        return {}

    def list_objects_v2(self, **request: Any) -> dict[str, Any]:
        self._counted.count("s3", "ListObjectsV2")
        prefix = request["Prefix"]
        after = request.get("ContinuationToken") or request.get("StartAfter", "")
        first = max(bisect_left(self._keys, prefix), bisect_right(self._keys, after) if after else 0)
        keys = [key for key in self._keys[first : first + _PAGE] if key.startswith(prefix)]
        contents = [
            {"Key": key, "Size": len(self.objects[key][0]), "LastModified": moment(self.objects[key][1])}
            for key in keys
        ]
        more = {"NextContinuationToken": keys[-1]} if len(keys) == _PAGE else {}
        return {"Contents": contents, **more}

    def get_paginator(self, operation: str) -> Any:
        assert operation == "list_objects_v2"
        return SimpleNamespace(paginate=self._pages)

    def _pages(self, **request: Any) -> Iterator[dict[str, Any]]:
        page = self.list_objects_v2(**request)
        yield page
        while token := page.get("NextContinuationToken"):
            page = self.list_objects_v2(**request, ContinuationToken=token)
            yield page


@dataclass
class SimulatedJob:
    """A training job, whose subjects are trained one after another.

    Attributes:
        outcomes: key of what its subjects end with.
        subjects: those that are left.
        starts: of its instance; more than one where it was interrupted.
        failures: of its subjects.
        billed: seconds that its instance is paid for.
    """

    name: str
    kind: str
    spot: bool
    outcomes: str
    subjects: list[str]
    created: float
    status: str = "InProgress"
    doing: str = "Starting"
    reason: str = ""
    ended: float | None = None
    billed: float = 0.0
    starts: int = 0
    failures: int = 0
    on_end: Callable[[], None] = field(default=lambda: None)


class SimulatedSageMaker:
    """Training jobs.

    Attributes:
        trained: how often each subject was trained to its end.
        failed: subjects that failed at their first try.
        done: those with a model, which no job trains again.
        interruptions: of spot instances.
    """

    meta = SimpleNamespace(region_name="us-west-2")

    def __init__(self, world: World, counted: Counted, s3: SimulatedS3) -> None:
        self._world, self._counted, self._s3 = world, counted, s3
        self._clock, self._chance = counted.clock, counted.chance
        self.jobs: dict[str, SimulatedJob] = {}
        self.trained: Counter[str] = Counter()
        self.failed: set[str] = set()
        self.done: set[str] = set()
        self.interruptions = self.lost = self.without_capacity = self.most_at_work = 0
        self._at_work: Counter[str] = Counter()
        self._short: dict[str, dict[int, bool]] = defaultdict(dict)

    def create_training_job(self, **request: Any) -> dict[str, Any]:
        self._counted.count("sagemaker", "CreateTrainingJob", SAGEMAKER_A_SECOND)
        self.create(request)
        return {}

    def create(self, request: dict[str, Any]) -> SimulatedJob:
        """Starts a job. Raises ClientError where the account has no room for it."""
        name, resources = request["TrainingJobName"], request["ResourceConfig"]
        if name in self.jobs:
            raise fault("ResourceInUse", "CreateTrainingJob")
        kinds = [each["InstanceType"] for each in resources.get("InstancePreferences", [resources])]
        free = [kind for kind in kinds if self._at_work[kind] < self._world.rooms.get(kind, 0)]
        if not free:
            raise fault("ResourceLimitExceeded", "CreateTrainingJob")
        kind = next((kind for kind in free if self.has_capacity(kind)), free[0])
        (channel,) = (each for each in request["InputDataConfig"] if each["ChannelName"] == "fleet")
        place = channel["DataSource"]["S3DataSource"]["S3Uri"].split("/", 3)[3]
        lines = self._s3.objects[f"{place}fleet.jsonl"][0].decode().splitlines()
        outcomes = request["HyperParameters"]["fleet_outcomes"].split("/", 3)[3]
        spot = request.get("EnableManagedSpotTraining", False)
        subjects = [subject for line in lines if (subject := json.loads(line)["id"]) not in self.done]
        job = SimulatedJob(name, kind, spot, outcomes, subjects, self._clock.now())
        self.jobs[name] = job
        self._at_work[kind] += 1
        self.most_at_work = max(self.most_at_work, self._at_work.total())
        if self._chance.random() < self._world.lost_jobs:
            self._clock.after(self._chance.uniform(0, 7200), lambda: self._lose(job))
        self._wait_for_capacity(job)
        return job

    def has_capacity(self, kind: str) -> bool:
        """Whether instances of a type can be had in this hour."""
        hour = int(self._clock.now() // 3600)
        hours = self._short[kind]
        if hour not in hours:
            hours[hour] = self._chance.random() < self._world.short
        return not hours[hour]

    def _wait_for_capacity(self, job: SimulatedJob) -> None:
        if self.has_capacity(job.kind):
            self._begin(job)
            return
        job.doing = "Pending"
        self._clock.after(900, lambda: self._give_up(job))

    def _give_up(self, job: SimulatedJob) -> None:
        if job.status != "InProgress":
            return
        if job.starts:  # an interrupted one waits
            self._wait_for_capacity(job)
            return
        self.without_capacity += 1
        self._end(job, "Failed", "CapacityError: Unable to provision requested ML compute capacity.")

    def _begin(self, job: SimulatedJob) -> None:
        if job.status != "InProgress":
            return
        job.doing, job.starts = "Training", job.starts + 1
        start = job.starts
        if job.spot:
            hours = self._chance.expovariate(1 / self._world.hours_to_interruption)
            self._clock.after(3600 * hours, lambda: self._interrupt(job, start))
        self._go_on(job, start, 60 * self._world.start_minutes)

    def _go_on(self, job: SimulatedJob, start: int, before: float = 0.0) -> None:
        if job.subjects:
            seconds = before + 60 * self._world.subject_minutes * self._chance.uniform(0.8, 1.2)
            self._clock.after(seconds, lambda: self._end_subject(job, start, seconds))
        else:
            told = f"AlgorithmError: {job.failures} of its subjects failed" if job.failures else ""
            self._end(job, "Failed" if job.failures else "Completed", told)

    def _end_subject(self, job: SimulatedJob, start: int, seconds: float) -> None:
        if job.status != "InProgress" or job.starts != start or job.doing != "Training":
            return
        job.billed += seconds
        subject = job.subjects.pop(0)
        self.trained[subject] += 1
        if self.trained[subject] == 1 and self._chance.random() < self._world.failing:
            job.failures += 1
            self.failed.add(subject)
            bad = self._chance.random() < self._world.bad
            reason = "2 pictures can't be read" if bad else "the disk is full"
            body = Failure(subject, reason, bad, job.name).to_json().encode()
            self._s3.write(f"{job.outcomes}/{subject}/{FAILURE_NAME}", body)
        else:
            self.done.add(subject)
            self._s3.write(f"{job.outcomes}/{subject}/{MANIFEST_NAME}", b"{}")
        self._go_on(job, start)

    def _interrupt(self, job: SimulatedJob, start: int) -> None:
        if job.status != "InProgress" or job.starts != start:
            return
        self.interruptions += 1
        job.doing = "Interrupted"
        self._clock.after(self._chance.uniform(120, 1200), lambda: self._wait_for_capacity(job))

    def _lose(self, job: SimulatedJob) -> None:
        if job.status == "InProgress":
            self.lost += 1
            self._end(job, "Failed", "InternalServerError: We encountered an internal error. Please try again.")

    def _end(self, job: SimulatedJob, status: str, reason: str) -> None:
        job.status, job.doing, job.reason, job.ended = status, status, reason, self._clock.now()
        self._at_work[job.kind] -= 1
        job.on_end()

    def describe_training_job(self, *, TrainingJobName: str) -> dict[str, Any]:  # noqa: N803
        self._counted.count("sagemaker", "DescribeTrainingJob", 10 * SAGEMAKER_A_SECOND)
        job = self.jobs[TrainingJobName]
        return {
            "FailureReason": job.reason,
            "ResourceConfig": {"InstanceType": job.kind},
            "BillableTimeInSeconds": round(job.billed),
        }

    def get_paginator(self, operation: str) -> Any:
        assert operation == "list_training_jobs"
        return SimpleNamespace(paginate=self._pages)

    def _pages(self, *, CreationTimeAfter: float = 0.0, MaxResults: int = 10, **_: Any) -> Iterator[dict[str, Any]]:  # noqa: N803
        jobs = [job for job in self.jobs.values() if job.created - _BEHIND >= CreationTimeAfter]
        for first in range(0, max(1, len(jobs)), MaxResults):
            self._counted.count("sagemaker", "ListTrainingJobs", SAGEMAKER_A_SECOND)
            yield {"TrainingJobSummaries": [_summary(job) for job in jobs[first : first + MaxResults]]}


@dataclass
class SimulatedServiceJob:
    """A job in the queue."""

    name: str
    payload: dict[str, Any]
    attempts_left: int
    created: float
    status: str = "RUNNABLE"
    job: SimulatedJob | None = None


class SimulatedBatch:
    """One queue: as many jobs at a time as its environment has instances, in their order.

    Args:
        capacity: of the environment.
    """

    meta = SimpleNamespace(region_name="us-west-2")

    def __init__(self, sagemaker: SimulatedSageMaker, counted: Counted, capacity: int) -> None:
        self._sagemaker, self._counted, self._capacity = sagemaker, counted, capacity
        self.jobs: dict[str, SimulatedServiceJob] = {}
        self._running = 0
        self._names = itertools.count()

    def submit_service_job(self, **request: Any) -> dict[str, Any]:
        self._counted.count("batch", "SubmitServiceJob", SUBMISSIONS_A_SECOND)
        token, payload = request["clientToken"], request["serviceRequestPayload"]
        if len(payload.encode()) > 10 * 1024:
            raise fault("ClientException", "SubmitServiceJob")
        attempts = request["retryStrategy"]["attempts"]
        self.jobs.setdefault(
            token, SimulatedServiceJob(request["jobName"], json.loads(payload), attempts, self._counted.clock.now())
        )
        self._dispatch()
        return {}

    def list_service_jobs(self, *, nextToken: str = "0", maxResults: int = 100, **_: Any) -> dict[str, Any]:  # noqa: N803
        self._counted.count("batch", "ListServiceJobs", 10 * SUBMISSIONS_A_SECOND)
        jobs, first = list(self.jobs.values()), int(nextToken)
        more = {"nextToken": str(first + maxResults)} if first + maxResults < len(jobs) else {}
        return {"jobSummaryList": [_service_summary(job) for job in jobs[first : first + maxResults]], **more}

    def _dispatch(self) -> None:
        for waiting in self.jobs.values():
            if self._running >= self._capacity:
                return
            if waiting.status == "RUNNABLE":
                self._start(waiting)

    def _start(self, waiting: SimulatedServiceJob) -> None:
        request = {**waiting.payload, "TrainingJobName": f"AWSBatch{waiting.name}{next(self._names)}"}
        waiting.job, waiting.status = self._sagemaker.create(request), "RUNNING"
        waiting.job.on_end = lambda: self._ended(waiting)
        self._running += 1

    def _ended(self, ended: SimulatedServiceJob) -> None:
        assert ended.job is not None
        self._running -= 1
        ended.status = "SUCCEEDED" if ended.job.status == "Completed" else "FAILED"
        if ended.job.reason.startswith("CapacityError"):  # costs no attempt
            ended.status = "RUNNABLE"
        elif ended.job.reason.startswith("InternalServerError") and ended.attempts_left > 1:
            ended.status, ended.attempts_left = "RUNNABLE", ended.attempts_left - 1
        self._counted.clock.after(60, self._dispatch)


class SimulatedClients(Clients):
    """Clients of the simulated services."""

    def __init__(self, services: dict[str, Any]) -> None:
        super().__init__()
        self._services = services

    def __call__(self, service: str) -> Any:
        return self._services[service]

    def is_local(self, service: str) -> bool:
        return False


def moment(seconds: float) -> datetime:
    """A time as boto3 gives it."""
    return datetime.fromtimestamp(seconds, UTC)


def fault(code: str, operation: str, status: int = 400) -> ClientError:
    """An error as AWS answers with."""
    answer: Any = {"Error": {"Code": code, "Message": "simulated"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, operation)


def _summary(job: SimulatedJob) -> dict[str, Any]:
    return {
        "TrainingJobName": job.name,
        "TrainingJobStatus": job.status,
        "SecondaryStatus": job.doing,
        "CreationTime": moment(job.created - _BEHIND),
        "LastModifiedTime": moment((job.ended or job.created) - _BEHIND),
        **({"TrainingEndTime": moment(job.ended - _BEHIND)} if job.ended else {}),
    }


def _service_summary(waiting: SimulatedServiceJob) -> dict[str, Any]:
    job = waiting.job
    arn = f"arn:aws:sagemaker:us-west-2:123456789012:training-job/{job.name}" if job else ""
    known = {"serviceResourceId": {"name": "TrainingJobArn", "value": arn}}
    reason = {"statusReason": f"Received status from SageMaker: {job.reason}"} if job and job.reason else {}
    return {
        "jobId": waiting.name,
        "jobName": waiting.name,
        "status": waiting.status,
        "createdAt": round(1000 * waiting.created),
        **({"latestAttempt": known, "startedAt": round(1000 * job.created)} if job else {}),
        **({"stoppedAt": round(1000 * job.ended)} if job and job.ended else {}),
        **reason,
    }
