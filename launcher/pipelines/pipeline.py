"""A pipeline after it was made: its executions, and what they come to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import redact
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.endpoints.made import tags_of
from launcher.jobs.job import Job, JobFailed
from launcher.pipelines.definition import DECIDE, REGISTER, TRAIN
from launcher.registry.packages import ModelPackage

# What a pipeline of the launcher's is known by.
PIPELINE_TAG = "dreambooth-sm:pipeline"
# Seconds between two looks, on this machine and at AWS.
_POLL_LOCAL, _POLL = 0.25, 30.0
# States that an execution does not leave again.
_ENDED = ("Succeeded", "Failed", "Stopped")


@dataclass(frozen=True)
class StepState:
    """A step of an execution.

    Attributes:
        status: ``Starting``, ``Executing``, ``Succeeded``, ``Failed``, ``Stopped`` ...
        reason: why it has failed.
        metadata: SageMaker's, with the ARN of what the step has started.
    """

    name: str
    status: str
    reason: str
    metadata: Mapping[str, Any]


class PipelineExecution:
    """One run of a pipeline.

    Args:
        arn: of the execution.
        clients: of AWS services.
    """

    def __init__(self, arn: str, clients: Clients) -> None:
        self.arn, self._clients = arn, clients

    def __repr__(self) -> str:
        return f"PipelineExecution({self.arn!r})"

    @property
    def status(self) -> str:
        """``Executing``, ``Stopping``, ``Stopped``, ``Failed`` or ``Succeeded``, now."""
        with asking(f"{self.arn} can't be looked at"):
            found = self._clients("sagemaker").describe_pipeline_execution(PipelineExecutionArn=self.arn)
        return str(found["PipelineExecutionStatus"])

    def steps(self) -> list[StepState]:
        """Those that have begun, in their order."""
        with asking(f"the steps of {self.arn} can't be listed"):
            found = self._clients("sagemaker").list_pipeline_execution_steps(
                PipelineExecutionArn=self.arn, SortOrder="Ascending"
            )
        return [
            StepState(each["StepName"], each["StepStatus"], each.get("FailureReason", ""), each.get("Metadata", {}))
            for each in found["PipelineExecutionSteps"]
        ]

    def wait(self, log: Callable[[str], None] = print) -> PipelineExecution:
        """Follows it until it has ended.

        Args:
            log: gets a line for each step that begins or ends.

        Raises:
            JobFailed: with the reason of the step that failed.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        pause = _POLL_LOCAL if self._clients.is_local("sagemaker") else _POLL
        told: dict[str, str] = {}
        while True:
            status = self.status
            for step in self.steps():
                if told.get(step.name) != step.status:
                    told[step.name] = step.status
                    log(redact(": ".join(filter(None, (step.name, step.status, step.reason)))))
            if status in _ENDED:
                break
            time.sleep(pause)
        if status != "Succeeded":
            reasons = [f"{step.name}: {step.reason}" for step in self.steps() if step.reason]
            raise JobFailed(self.arn.split("/")[1], redact("\n".join(reasons) or status))
        return self

    def stop(self) -> None:
        """Ends it.

        Raises:
            ServiceError: AWS refuses, or can't be reached.
        """
        with asking(f"{self.arn} can't be stopped"):
            self._clients("sagemaker").stop_pipeline_execution(
                PipelineExecutionArn=self.arn, ClientRequestToken=f"stop-{self.arn.split('/')[-1]:0>32}"
            )

    @property
    def good_enough(self) -> bool | None:
        """Whether the model has met its conditions; None before that is decided."""
        metadata = next((step.metadata for step in self.steps() if step.name == DECIDE), {})
        outcome = metadata.get("Condition", {}).get("Outcome")
        return None if outcome is None else outcome == "True"

    @property
    def job(self) -> Job | None:
        """Its training job; None before it has started."""
        arn = self._made_by(TRAIN, "TrainingJob")
        return Job(arn.split("/")[-1], self._clients) if arn else None

    @property
    def package(self) -> ModelPackage | None:
        """The version that it has registered, if any."""
        arn = self._made_by(REGISTER, "RegisterModel")
        return ModelPackage(arn, self._clients) if arn else None

    def _made_by(self, step: str, kind: str) -> str | None:
        found = next((each.metadata for each in self.steps() if each.name == step), {})
        return str(found.get(kind, {}).get("Arn", "")) or None


class TrainingPipeline:
    """A pipeline of SageMaker's that checks, trains, measures and registers.

    Args:
        name: of it.
        clients: of AWS services; default: those of the standard AWS settings.
    """

    def __init__(self, name: str, clients: Clients | None = None) -> None:
        self.name, self._clients = name, clients or Clients()

    def __repr__(self) -> str:
        return f"TrainingPipeline({self.name!r})"

    def describe(self) -> dict[str, Any]:
        """SageMaker's own description.

        Raises:
            UserError: the pipeline was not found.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        if found := find_pipeline(self.name, self._clients("sagemaker")):
            return found
        raise UserError(f"the pipeline {self.name!r} was not found")

    def delete(self) -> None:
        """Deletes the pipeline. Models, versions, their group and what lies in S3 stay; one that is gone is left so.

        Raises:
            UserError: the launcher has not made it, or SageMaker refuses, as where an execution runs.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        sagemaker = self._clients("sagemaker")
        found = find_pipeline(self.name, sagemaker)
        if found is None:
            return
        if not is_owned(found, sagemaker):
            raise UserError(f"{self.name} is a pipeline that the launcher has not made, and stays as it is")
        try:
            with asking(f"{self.name} was not deleted"):
                sagemaker.delete_pipeline(PipelineName=self.name)
        except ServiceError as error:
            if error.kind is not Kind.OTHER:
                raise
            raise UserError(f"SageMaker does not delete {self.name}: {error.reason}") from error

    def start(self, **parameters: str | float) -> PipelineExecution:
        """Starts an execution.

        Args:
            parameters: of the definition in place of their defaults: ``Images``, ``InstancePrompt``, ``ClassPrompt``,
                ``Approval``, ``LeastScore`` ...

        Raises:
            UserError: SageMaker refuses it; its own words follow.
            ServiceError: AWS can't be reached, or not with these credentials.
        """
        given = [{"Name": name, "Value": str(value)} for name, value in parameters.items()]
        try:
            with asking(f"{self.name} was not started"):
                made = self._clients("sagemaker").start_pipeline_execution(
                    PipelineName=self.name, PipelineParameters=given
                )
        except ServiceError as error:
            if error.kind not in (Kind.OTHER, Kind.MISSING):
                raise
            raise UserError(f"SageMaker does not start {self.name}: {error.reason}") from error
        return PipelineExecution(made["PipelineExecutionArn"], self._clients)

    def executions(self) -> list[PipelineExecution]:
        """The latest, the newest first."""
        with asking(f"the executions of {self.name} can't be listed"):
            found = self._clients("sagemaker").list_pipeline_executions(PipelineName=self.name, SortOrder="Descending")
        return [
            PipelineExecution(each["PipelineExecutionArn"], self._clients)
            for each in found["PipelineExecutionSummaries"]
        ]


def find_pipeline(name: str, sagemaker: Any) -> dict[str, Any] | None:
    """SageMaker's description of a pipeline; None where it was not found.

    Raises:
        ServiceError: it can't be looked at.
    """
    try:
        with asking(f"the pipeline {name} can't be looked at"):
            return dict(sagemaker.describe_pipeline(PipelineName=name))
    except ServiceError as error:
        if error.kind is not Kind.MISSING:
            raise
        return None


def is_owned(found: Mapping[str, Any], sagemaker: Any) -> bool:
    """Whether the launcher has made a pipeline, by its tag.

    Args:
        found: its description.

    Raises:
        ServiceError: its tags can't be read.
    """
    return tags_of(found["PipelineArn"], sagemaker).get(PIPELINE_TAG) == str(found["PipelineName"])
