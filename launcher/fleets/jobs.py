"""The jobs of a fleet as the platform knows them: sent, listed, and looked at once when they have ended."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.errors import UserError
from launcher.aws.clients import Clients
from launcher.aws.service_errors import ServiceError, asking
from launcher.fleets.clock import Clock
from launcher.instances import INSTANCES
from launcher.jobs.job import Job
from launcher.jobs.outputs import ENDED
from launcher.submit import submit

WAITING = "Waiting"
# Seconds, twice as many as this machine's clock and AWS's may differ by: AWS refuses requests beyond five minutes.
_CLOCKS_APART = 600.0
# Of ended jobs, looked at one by one between two listings.
_DESCRIBED = 20
# What a job's instance does before it is paid for.
_UNPAID = ("Starting", "Pending")
# A spot job that has waited as long as it may.
_WAITED = "MaxWaitTimeExceeded"
NO_CAPACITY = re.compile(f"CapacityError|{_WAITED}")
# Reasons of SageMaker's own for which a job has ended, and may well do what it should another time.
_PASSING = re.compile(r"(Received status from SageMaker: ?)?(CapacityError|InternalServerError|InternalFailure)")
_KEPT = ("FailureReason", "BillableTimeInSeconds", "ResourceConfig")


@dataclass(frozen=True)
class JobState:
    """A job of a fleet.

    Attributes:
        status: ``Waiting`` in a queue, or SageMaker's TrainingJobStatus.
        created, ended: seconds since 1970; ``ended`` is None as long as it has not.
        training_job: the name that SageMaker knows it by; None before it has one.
        doing: SageMaker's SecondaryStatus, where it is known.
        reason: why it has ended, where the listing says it.
    """

    status: str
    created: float
    ended: float | None = None
    training_job: str | None = None
    doing: str = ""
    reason: str = ""

    @property
    def is_open(self) -> bool:
        return self.status not in ENDED


class FleetJobs:
    """Training jobs that are sent to SageMaker itself.

    Args:
        fleet: its name, with which those of its jobs begin.
        instance_type: that most of them run on.

    Attributes:
        states: of the jobs that the platform knows, by their names.
        takes_all: whether all jobs may be sent at once, as something else lets them wait.
    """

    takes_all = False

    def __init__(self, fleet: str, clients: Clients, clock: Clock, instance_type: str) -> None:
        self.states: dict[str, JobState] = {}
        self._fleet, self._clients, self._clock, self._instance_type = fleet, clients, clock, instance_type
        self._is_ours = re.compile(rf"{re.escape(fleet)}(-r\d+)?-\d+").fullmatch
        self._descriptions: dict[str, dict[str, Any]] = {}

    def look(self) -> int:
        """Lists the jobs, from the first one on that has not ended.

        Returns:
            the number of requests that it took.

        Raises:
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        since = min((state.created for state in self.states.values() if state.is_open), default=None)
        when = {"CreationTimeAfter": since - _CLOCKS_APART} if since is not None else {}
        pages = (
            self._clients("sagemaker")
            .get_paginator("list_training_jobs")
            .paginate(NameContains=self._fleet, SortBy="CreationTime", SortOrder="Ascending", MaxResults=100, **when)
        )
        count = 0
        with asking(f"the jobs of {self._fleet} can't be listed"):
            for page in pages:
                count += 1
                for job in page["TrainingJobSummaries"]:
                    if self._is_ours(job["TrainingJobName"]):
                        self.states[job["TrainingJobName"]] = _state(job)
        return count

    def send(self, request: Mapping[str, Any]) -> None:
        """Starts a job, or finds that another process has.

        Raises:
            UserError: SageMaker refuses the request; its own words follow.
            ServiceError: AWS can't be reached, not with these credentials, or has a fault of its own.
        """
        name = request["TrainingJobName"]
        try:
            submit(request, self._clients)
        except UserError as error:
            if "ResourceInUse" not in str(error):
                raise
        self.states[name] = JobState("InProgress", self._clock.now(), training_job=name, doing="Starting")

    def stop(self, name: str) -> None:
        """Ends a job, which saves a checkpoint first.

        Raises:
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        job = Job(self.states[name].training_job or name, self._clients)
        job.stop()

    def look_at_ended(self) -> int:
        """Looks at jobs that have ended, once at each and at some of them between two listings; failed ones first.

        Returns:
            the number of requests that it took.
        """
        ended = [each for each in self.states.values() if not each.is_open and each.training_job]
        new = sorted(
            (each for each in ended if each.training_job not in self._descriptions),
            key=lambda state: state.status != "Failed",
        )
        for count, state in enumerate(new[:_DESCRIBED]):
            try:
                with asking(f"{state.training_job} can't be looked at"):
                    found = self._clients("sagemaker").describe_training_job(TrainingJobName=state.training_job)
            except ServiceError as error:
                if not error.kind.passes:
                    raise
                return count + 1
            self._descriptions[str(state.training_job)] = {key: found[key] for key in _KEPT if key in found}
        return min(len(new), _DESCRIBED)

    def why_again(self, job: str) -> str | None:
        """SageMaker's own reason for which a job has ended; empty where it is the job's own, or a person's; None where
        it is not known yet."""
        state = self.states[job]
        if state.status != "Failed":
            return state.doing if state.doing == _WAITED else ""
        if state.training_job and state.training_job not in self._descriptions and not state.reason:
            return None
        reason = self.why_failed(job)
        return reason if _PASSING.match(reason) else ""

    def why_failed(self, job: str) -> str:
        """Why a job has failed, in its own words or SageMaker's; empty where it has not, or that is not known."""
        state = self.states.get(job)
        if state is None or state.status != "Failed":
            return ""
        return state.reason or str(self._descriptions.get(state.training_job or "", {}).get("FailureReason", ""))

    def dollars(self) -> float | None:
        """What instances have cost so far, on demand or spot; None on this machine, and where a price is not known.

        Jobs that run are counted from their creation, those that have ended as SageMaker bills them.
        """
        if self._clients.is_local("sagemaker"):
            return None
        costs = [self._cost(state) for state in self.states.values()]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    def _cost(self, state: JobState) -> float | None:
        if not state.training_job or state.doing in _UNPAID:
            return 0.0
        found = self._descriptions.get(state.training_job, {})
        resources = found.get("ResourceConfig", {})
        kind = resources.get("SelectedInstanceType") or resources.get("InstanceType") or self._instance_type
        price = INSTANCES[kind].usd_per_hour if kind in INSTANCES else None
        if price is None:
            return None
        if found or state.status == "Failed":
            return price / 3600 * float(found.get("BillableTimeInSeconds", 0.0))
        return price / 3600 * ((state.ended or self._clock.now()) - state.created)


def _state(job: Mapping[str, Any]) -> JobState:
    ended = job["TrainingJobStatus"] in ENDED
    return JobState(
        job["TrainingJobStatus"],
        job["CreationTime"].timestamp(),
        job.get("TrainingEndTime", job["LastModifiedTime"]).timestamp() if ended else None,
        job["TrainingJobName"],
        job.get("SecondaryStatus", ""),
    )
