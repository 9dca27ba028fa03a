"""The jobs of a fleet in a queue of AWS Batch, whose service jobs are SageMaker's training jobs.

The queue shares the account's instances fairly between those who use it, and lets jobs wait: all are submitted at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dreambooth_sm.errors import UserError
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.fleets.clock import Clock
from launcher.fleets.jobs import WAITING, FleetJobs, JobState

_KIND = "SAGEMAKER_TRAINING"
# Published limits of service jobs, which can't be raised.
SUBMISSIONS_A_SECOND, MAX_PAYLOAD, MAX_PRIORITY, MAX_ATTEMPTS = 5, 10 * 1024, 9999, 10
_SHARE = re.compile(r"[a-zA-Z0-9_-]{1,255}")
_STATUS = {
    "SCHEDULED": "InProgress",
    "STARTING": "InProgress",
    "RUNNING": "InProgress",
    "SUCCEEDED": "Completed",
    "FAILED": "Failed",
}
# Both spellings are AWS's own. What a job itself ends with would be the same another time.
_RETRIED = (
    "Received status from SageMaker: InternalServerError*",
    "Received status from SageMaker:InternalServerError*",
)
# Of an error that says that another process has submitted the job.
_SUBMITTED = re.compile(r"client ?token|idempotent", re.IGNORECASE)


@dataclass(frozen=True)
class Queue:
    """How jobs are put into a queue.

    Attributes:
        name: of the job queue, or its ARN.
        share: identifier by which a queue with a fair-share policy shares its instances.
        priority: of these jobs among those of the same share, 0 to 9999; higher ones first.
        attempts: how often a job may start, after faults of SageMaker's own; lack of capacity does not count.
    """

    name: str
    share: str | None = None
    priority: int | None = None
    attempts: int = 1

    def facts(self) -> dict[str, Any]:
        """As ``fleet.json`` holds it."""
        return asdict(self)

    def problems(self) -> Iterator[str]:
        """What AWS Batch would refuse, whatever the account has."""
        if self.share is not None and not _SHARE.fullmatch(self.share):
            yield f"share: {self.share!r} is not a share identifier; set letters, digits, hyphens and underscores"
        if self.priority is not None and not 0 <= self.priority <= MAX_PRIORITY:
            yield f"priority={self.priority}: set 0 to {MAX_PRIORITY}"
        if not 1 <= self.attempts <= MAX_ATTEMPTS:
            yield f"attempts={self.attempts}: set 1 to {MAX_ATTEMPTS}"

    def submission(self, request: Mapping[str, Any], token: str) -> dict[str, Any]:
        """The request of SubmitServiceJob.

        Args:
            request: of CreateTrainingJob.
            token: the same for the same job, which is submitted once whoever does it.

        Raises:
            UserError: the request is too long for a queue.
        """
        payload = json.dumps({key: value for key, value in request.items() if key != "Tags"}, separators=(",", ":"))
        if (size := len(payload.encode())) > MAX_PAYLOAD:
            raise UserError(
                f"queue: the request of a job has {size:,} bytes, and AWS Batch takes {MAX_PAYLOAD:,}; set fewer or "
                "shorter hyperparameters and environment variables, or leave queue out"
            )
        rules = [{"action": "RETRY", "onStatusReason": reason} for reason in _RETRIED]
        submission: dict[str, Any] = {
            "jobName": request["TrainingJobName"],
            "jobQueue": self.name,
            "serviceJobType": _KIND,
            "serviceRequestPayload": payload,
            "retryStrategy": {
                "attempts": self.attempts,
                "evaluateOnExit": [*rules, {"action": "EXIT", "onStatusReason": "*"}],
            },
            "timeoutConfig": {"attemptDurationSeconds": _longest(request["StoppingCondition"])},
            "clientToken": token,
        }
        if self.share is not None:
            submission["shareIdentifier"] = self.share
        if self.priority is not None:
            submission["schedulingPriority"] = self.priority
        if tags := {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}:
            submission["tags"] = tags
        return submission

    def check(self, clients: Clients) -> None:
        """Looks whether the queue takes such jobs.

        Raises:
            UserError: it does not, or can't be looked at.
        """
        try:
            with asking(f"queue: {self.name} can't be looked at"):
                found = clients("batch").describe_job_queues(jobQueues=[self.name])["jobQueues"]
        except ServiceError as error:
            raise UserError(str(error)) from error
        if not found:
            raise UserError(f"queue: job queue {self.name!r} was not found in {clients('batch').meta.region_name}")
        (queue,) = found
        if queue.get("jobQueueType") != _KIND:
            raise UserError(f"queue: {self.name} is not a queue of the type {_KIND}; name one that is")
        if queue["state"] != "ENABLED" or queue.get("status", "VALID") not in ("VALID", "UPDATING"):
            raise UserError(
                f"queue: {self.name} is {queue['state']} and {queue.get('status')}; enable it, or name another"
            )
        if queue.get("schedulingPolicyArn") and self.share is None:
            raise UserError(f"share: {self.name} has a scheduling policy; set share to one of its share identifiers")
        if not queue.get("schedulingPolicyArn") and self.share is not None:
            raise UserError(f"share: {self.name} has no scheduling policy; leave share out")


class QueuedJobs(FleetJobs):
    """Training jobs that AWS Batch starts, under names of its own.

    Args:
        queue: that they wait in.
        fleet, clients, clock, instance_type: as for :class:`FleetJobs`.
    """

    takes_all = True

    def __init__(self, queue: Queue, fleet: str, clients: Clients, clock: Clock, instance_type: str) -> None:
        super().__init__(fleet, clients, clock, instance_type)
        self._queue = queue
        self._ids: dict[str, str] = {}
        self._next = 0.0

    def look(self) -> int:
        """See :meth:`FleetJobs.look`. Batch lists all jobs of a name, as it takes one filter at a time."""
        request: dict[str, Any] = {
            "jobQueue": self._queue.name,
            "filters": [{"name": "JOB_NAME", "values": [f"{self._fleet}-*"]}],
            "maxResults": 100,
        }
        found: dict[str, JobState] = {}
        count, token = 0, ""
        while count == 0 or token:
            with asking(f"the jobs of {self._fleet} in {self._queue.name} can't be listed"):
                page = self._clients("batch").list_service_jobs(**request, **({"nextToken": token} if token else {}))
            count, token = count + 1, page.get("nextToken", "")
            for job in page["jobSummaryList"]:
                state, known = _queued_state(job), found.get(job["jobName"])
                if self._is_ours(job["jobName"]) and (known is None or known.created < state.created):
                    found[job["jobName"]], self._ids[job["jobName"]] = state, job["jobId"]
        self.states |= found
        return count

    def send(self, request: Mapping[str, Any]) -> None:
        """Submits a job, five a second at most; one that was submitted before stays as it is."""
        now = self._clock.now()
        if now < self._next:
            self._clock.sleep(self._next - now)
        self._next = max(now, self._next) + 1 / SUBMISSIONS_A_SECOND
        name = request["TrainingJobName"]
        token = hashlib.sha256(f"{request['CheckpointConfig']['S3Uri']}".encode()).hexdigest()
        try:
            with asking(f"{name} was not submitted"):
                self._clients("batch").submit_service_job(**self._queue.submission(request, token))
        except ServiceError as error:
            if error.kind is not Kind.OTHER:
                raise
            if not _SUBMITTED.search(error.reason):
                raise UserError(f"AWS Batch refuses the job: {error.reason}") from error
        self.states[name] = JobState(WAITING, self._clock.now())

    def stop(self, name: str) -> None:
        """Takes a job out of the queue, or ends it."""
        with asking(f"{name} can't be stopped"):
            self._clients("batch").terminate_service_job(jobId=self._ids[name], reason="the fleet was stopped")


def _queued_state(job: Mapping[str, Any]) -> JobState:
    """From a summary, whose times are milliseconds."""
    place = job.get("latestAttempt", {}).get("serviceResourceId", {}).get("value", "")
    started, stopped = job.get("startedAt") or job["createdAt"], job.get("stoppedAt")
    status = _STATUS.get(job.get("status", ""), WAITING)
    return JobState(
        status,
        started / 1000,
        stopped / 1000 if stopped else None,
        place.rpartition("/")[2] or None,
        "Pending" if job.get("status") == "SCHEDULED" or status == WAITING else "",
        job.get("statusReason", "") if status == "Failed" else "",
    )


def _longest(condition: Mapping[str, int]) -> int:
    """Seconds that an attempt may take, as the training job's own limits say."""
    return condition.get("MaxWaitTimeInSeconds", condition["MaxRuntimeInSeconds"])
