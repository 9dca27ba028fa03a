"""An embedded AWS Batch: queues of training jobs in front of the embedded SageMaker. moto knows no service jobs.

A queue shares its instances by weighted fair queueing, as its scheduling policy says: the next job is of the share that
has had least of them lately, a weight factor of half as much counting half; within a share, by priority and age.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from launcher.local.answers import ACCOUNT, Operation, RequestError, arn_of, check_shape, respond
from launcher.local.sagemaker import EmbeddedSageMaker
from launcher.local.signatures import REGION_KEY, Application

_KIND = "SAGEMAKER_TRAINING"
# Seconds between two looks at the jobs that run.
_PAUSE = 0.05
# Seconds that a share's use is remembered where its policy says nothing else.
_REMEMBERED = 600.0
_ENDED = {"Completed": "SUCCEEDED", "Failed": "FAILED", "Stopped": "FAILED"}


@dataclass
class ServiceJob:
    """A job in a queue; times in milliseconds since 1970.

    Attributes:
        request: of SubmitServiceJob.
        attempts: names of the training jobs that were started for it.
    """

    id: str
    request: dict[str, Any]
    created: int
    status: str = "RUNNABLE"
    reason: str = ""
    attempts: list[str] = field(default_factory=list)
    started: int | None = None
    stopped: int | None = None

    @property
    def name(self) -> str:
        return str(self.request["jobName"])

    @property
    def share(self) -> str:
        return str(self.request.get("shareIdentifier", ""))


@dataclass
class JobQueue:
    """A queue of an environment, with so many instances.

    Attributes:
        weights: weight factors of shares; others have 1.
        used: when jobs of each share were started.
    """

    name: str
    capacity: int
    policy: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    remembered: float = _REMEMBERED
    jobs: list[ServiceJob] = field(default_factory=list)
    used: dict[str, list[float]] = field(default_factory=dict)

    def next(self, now: float) -> ServiceJob | None:
        """The job whose turn it is."""
        waiting = [job for job in self.jobs if job.status == "RUNNABLE"]

        def turn(job: ServiceJob) -> tuple[float, int, int]:
            lately = sum(at > now - self.remembered for at in self.used.get(job.share, ()))
            priority: int = job.request.get("schedulingPriority", 0)
            return lately * self.weights.get(job.share, 1.0), -priority, job.created

        return min(waiting, key=turn, default=None)


class EmbeddedBatch:
    """Service environments, queues and service jobs of one region after another.

    Args:
        sagemaker: starts the training jobs.
    """

    def __init__(self, sagemaker: EmbeddedSageMaker) -> None:
        self._sagemaker = sagemaker
        self._environments: dict[tuple[str, str], int] = {}
        self._policies: dict[str, dict[str, Any]] = {}
        self._queues: dict[tuple[str, str], JobQueue] = {}
        self._jobs: dict[str, ServiceJob] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._counter = itertools.count(1)
        self._operations: dict[str, Operation] = {
            "CreateServiceEnvironment": self._create_environment,
            "CreateSchedulingPolicy": self._create_policy,
            "CreateJobQueue": self._create_queue,
            "DescribeJobQueues": self._describe_queues,
            "SubmitServiceJob": self._submit,
            "ListServiceJobs": self._list,
            "DescribeServiceJob": lambda request, region: self._description(self._find(request["jobId"])),
            "TerminateServiceJob": self._terminate,
        }

    def answer(
        self, application: Application, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answers a WSGI request that concerns queues of training jobs, and passes every other one on."""
        path, method = environ.get("PATH_INFO", ""), environ.get("REQUEST_METHOD")
        name = next((each for each in self._operations if path == f"/v1/{each.lower()}"), None)
        if name is None or method != "POST" or "/batch/aws4_request" not in environ.get("HTTP_AUTHORIZATION", ""):
            return application(environ, start_response)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))

        def checked(request: dict[str, Any], region: str) -> dict[str, Any]:
            check_shape(name, request, "batch")
            with self._lock:
                return self._operations[name](request, region)

        return respond(start_response, checked, json.loads(body or b"{}"), environ[REGION_KEY])

    def close(self) -> None:
        """Starts no more jobs."""
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _create_environment(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        name = request["serviceEnvironmentName"]
        self._environments[region, name] = sum(limit.get("maxCapacity", 0) for limit in request["capacityLimits"])
        return {"serviceEnvironmentName": name, "serviceEnvironmentArn": _arn(region, "service-environment", name)}

    def _create_policy(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        arn = _arn(region, "scheduling-policy", request["name"])
        self._policies[arn] = request.get("fairsharePolicy", {})
        return {"name": request["name"], "arn": arn}

    def _create_queue(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        if request.get("jobQueueType") != _KIND:
            raise _refused(f"the embedded Batch has queues of the type {_KIND} alone")
        (order,) = request.get("serviceEnvironmentOrder") or [{}]
        name, environment = request["jobQueueName"], str(order.get("serviceEnvironment", "")).rpartition("/")[2]
        if (region, environment) not in self._environments:
            raise _refused(f"service environment {environment!r} does not exist")
        queue = JobQueue(name, self._environments[region, environment], request.get("schedulingPolicyArn"))
        if queue.policy is not None:
            if queue.policy not in self._policies:
                raise _refused(f"scheduling policy {queue.policy!r} does not exist")
            policy = self._policies[queue.policy]
            shares = policy.get("shareDistribution", [])
            queue.weights = {share["shareIdentifier"]: share.get("weightFactor", 1.0) for share in shares}
            queue.remembered = policy.get("shareDecaySeconds") or _REMEMBERED
        self._queues[region, name] = queue
        return {"jobQueueName": name, "jobQueueArn": _arn(region, "job-queue", name)}

    def _describe_queues(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        wanted = [name.rpartition("/")[2] for name in request.get("jobQueues", [])]
        return {
            "jobQueues": [
                {
                    "jobQueueName": name,
                    "jobQueueArn": _arn(region, "job-queue", name),
                    "state": "ENABLED",
                    "status": "VALID",
                    "priority": 1,
                    "jobQueueType": _KIND,
                    "computeEnvironmentOrder": [],
                    **({"schedulingPolicyArn": queue.policy} if queue.policy else {}),
                }
                for (place, name), queue in self._queues.items()
                if place == region and (not wanted or name in wanted)
            ]
        }

    def _queue(self, request: dict[str, Any], region: str) -> JobQueue:
        name = str(request.get("jobQueue", "")).rpartition("/")[2]
        if (region, name) not in self._queues:
            raise _refused(f"job queue {name!r} does not exist")
        return self._queues[region, name]

    def _submit(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        queue = self._queue(request, region)
        if len(request["serviceRequestPayload"].encode()) > 10 * 1024:
            raise _refused("serviceRequestPayload has more than 10 KiB")
        if bool(request.get("shareIdentifier")) != bool(queue.policy):
            raise _refused("shareIdentifier goes with a scheduling policy of the queue")
        payload = json.loads(request["serviceRequestPayload"])
        check_shape("CreateTrainingJob", {"TrainingJobName": "any", **payload})
        token = request.get("clientToken")
        known = next((job for job in queue.jobs if token and job.request.get("clientToken") == token), None)
        if known is None:
            known = ServiceJob(str(uuid.uuid4()), {**request, "region": region}, _now() + next(self._counter))
            queue.jobs.append(known)
            self._jobs[known.id] = known
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
            self._thread.start()
        return {"jobArn": _arn(region, "service-job", known.id), "jobName": known.name, "jobId": known.id}

    def _list(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        filters = {each["name"]: each["values"] for each in request.get("filters", [])}
        jobs = self._queue(request, region).jobs
        if names := filters.get("JOB_NAME"):
            jobs = [job for job in jobs if any(fnmatch.fnmatch(job.name.lower(), name.lower()) for name in names)]
        elif not filters:
            jobs = [job for job in jobs if job.status == request.get("jobStatus", "RUNNING")]
        else:
            raise _refused(f"the embedded Batch filters by JOB_NAME alone, and not by {', '.join(filters)}")
        jobs = sorted(jobs, key=lambda job: -job.created)
        start, most = int(request.get("nextToken", 0)), request.get("maxResults", 100)
        more = {"nextToken": str(start + most)} if start + most < len(jobs) else {}
        return {"jobSummaryList": [self._summary(job) for job in jobs[start : start + most]], **more}

    def _find(self, id: str) -> ServiceJob:
        job = self._jobs.get(id.rpartition("/")[2])
        if job is None:
            raise _refused(f"service job {id!r} does not exist")
        return job

    def _summary(self, job: ServiceJob) -> dict[str, Any]:
        region = job.request["region"]
        optional = {
            "statusReason": job.reason,
            "shareIdentifier": job.share,
            "startedAt": job.started,
            "stoppedAt": job.stopped,
            "latestAttempt": {"serviceResourceId": self._resource(job, job.attempts[-1])} if job.attempts else None,
        }
        return {
            "jobArn": _arn(region, "service-job", job.id),
            "jobId": job.id,
            "jobName": job.name,
            "serviceJobType": _KIND,
            "status": job.status,
            "createdAt": job.created,
            **{name: value for name, value in optional.items() if value},
        }

    def _description(self, job: ServiceJob) -> dict[str, Any]:
        kept = ("retryStrategy", "schedulingPriority", "serviceRequestPayload", "tags", "timeoutConfig")
        return {
            **self._summary(job),
            **{name: job.request[name] for name in kept if name in job.request},
            "jobQueue": _arn(job.request["region"], "job-queue", job.request["jobQueue"].rpartition("/")[2]),
            "startedAt": job.started or 0,
            "attempts": [{"serviceResourceId": self._resource(job, name)} for name in job.attempts],
        }

    def _resource(self, job: ServiceJob, name: str) -> dict[str, str]:
        return {"name": "TrainingJobArn", "value": arn_of("training-job", name, job.request["region"])}

    def _terminate(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        job = self._find(request["jobId"])
        if job.status == "RUNNABLE":
            self._end(job, "FAILED", request["reason"])
        elif job.status == "RUNNING":
            job.request["retryStrategy"] = {"attempts": 1}
            self._sagemaker.named(job.attempts[-1]).stop()
        return {}

    # The queue at work

    def _run(self) -> None:
        while not self._closed.wait(_PAUSE):
            with self._lock:
                for queue in self._queues.values():
                    self._advance(queue)

    def _advance(self, queue: JobQueue) -> None:
        for running in [job for job in queue.jobs if job.status == "RUNNING"]:
            self._look_at(running)
        while sum(job.status == "RUNNING" for job in queue.jobs) < queue.capacity:
            if (job := queue.next(time.monotonic())) is None:
                return
            self._start(job)
            queue.used.setdefault(job.share, []).append(time.monotonic())

    def _start(self, job: ServiceJob) -> None:
        name = f"AWSBatch{job.name[:40]}{uuid.uuid4().hex[:12]}".replace("_", "-")
        request = {**json.loads(job.request["serviceRequestPayload"]), "TrainingJobName": name}
        try:
            self._sagemaker.create(request, region=job.request["region"])
        except RequestError as error:
            self._end(job, "FAILED", f"Received status from SageMaker: {error.code}: {error}")
            return
        job.status, job.started = "RUNNING", _now()
        job.attempts.append(name)

    def _look_at(self, job: ServiceJob) -> None:
        found = self._sagemaker.named(job.attempts[-1]).describe()
        status = _ENDED.get(found["TrainingJobStatus"])
        if status is None:
            return
        reason = f"Received status from SageMaker: {found['FailureReason']}" if "FailureReason" in found else ""
        strategy = job.request.get("retryStrategy", {"attempts": 1})
        if status == "FAILED" and len(job.attempts) < strategy["attempts"] and _is_retried(strategy, reason):
            job.status = "RUNNABLE"
        else:
            self._end(job, status, reason)

    def _end(self, job: ServiceJob, status: str, reason: str) -> None:
        job.status, job.reason, job.stopped = status, reason, _now()


def _is_retried(strategy: dict[str, Any], reason: str) -> bool:
    """By the first rule that fits; a failed job without rules is tried again."""
    rules: Iterator[dict[str, str]] = iter(strategy.get("evaluateOnExit", []))
    fits = (rule["action"] for rule in rules if fnmatch.fnmatchcase(reason, rule.get("onStatusReason", "*")))
    return next(fits, "RETRY") == "RETRY"


def _refused(message: str) -> RequestError:
    return RequestError(message, "ClientException")


def _arn(region: str, kind: str, name: str) -> str:
    return f"arn:aws:batch:{region}:{ACCOUNT}:{kind}/{name}"


def _now() -> int:
    return round(1000 * time.time())
