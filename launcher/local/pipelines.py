"""Pipelines of the embedded SageMaker: their steps really run, one after another.

Steps train, process, decide and register; what an execution decides stands in their requests as expressions.
"""

from __future__ import annotations

import json
import operator
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dreambooth_sm.storage import S3Uri, get_object
from launcher.aws.clients import Clients
from launcher.local.answers import Operation, RequestError, arn_of, check_shape

_NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,255}")
_PARTS = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.?([^.\[\]]+)")
_TYPES: dict[str, Callable[[Any], Any]] = {"String": str, "Float": float, "Integer": int, "Boolean": bool}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "Equals": operator.eq,
    "GreaterThan": operator.gt,
    "GreaterThanOrEqualTo": operator.ge,
    "LessThan": operator.lt,
    "LessThanOrEqualTo": operator.le,
}
_STEPS = ("Training", "Processing", "RegisterModel", "Condition", "Fail")
_POLL = 0.05


class RunningJob(Protocol):
    """A job that a step starts."""

    arn: str

    @property
    def ended(self) -> bool: ...

    def describe(self) -> dict[str, Any]: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Platform:
    """What steps are done with.

    Attributes:
        train, process: start jobs, with a request and a region.
        operations: of the registry.
        clients: of a region.
    """

    train: Callable[[dict[str, Any], str], RunningJob]
    process: Callable[[dict[str, Any], str], RunningJob]
    operations: Mapping[str, Operation]
    clients: Callable[[str], Clients]


class StepError(Exception):
    """A step can't do what it should; its message says why."""


@dataclass
class _Step:
    """A step that has begun.

    Attributes:
        described: what expressions of later steps may ask of it.
    """

    definition: Mapping[str, Any]
    status: str = "Executing"
    reason: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    ended: float = 0.0

    def summary(self) -> dict[str, Any]:
        """One entry of ListPipelineExecutionSteps."""
        told = {"EndTime": self.ended, "FailureReason": self.reason, "Metadata": self.metadata}
        return {
            "StepName": self.definition["Name"],
            "StepStatus": self.status,
            "StartTime": self.began,
            **{name: value for name, value in told.items() if value},
        }


class Execution:
    """One run of a pipeline, in a thread.

    Args:
        arn: of the execution.
        definition: of the pipeline, as it is now.
        parameters: names to values, as StartPipelineExecution has them.
    """

    def __init__(
        self, arn: str, definition: Mapping[str, Any], parameters: Mapping[str, str], platform: Platform
    ) -> None:
        self.arn, self.region, self.id = arn, arn.split(":")[3], arn.split("/")[-1]
        self._definition, self._platform = definition, platform
        self._parameters = {
            each["Name"]: _TYPES[each["Type"]](parameters.get(each["Name"], each.get("DefaultValue")))
            for each in definition.get("Parameters", ())
        }
        self.steps: dict[str, _Step] = {}
        self.status, self.reason, self.created = "Executing", "", time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.id, daemon=True)
        self.start, self.join = self._thread.start, self._thread.join

    def describe(self) -> dict[str, Any]:
        """The answer of DescribePipelineExecution."""
        return {
            "PipelineArn": self.arn.partition("/execution/")[0],
            "PipelineExecutionArn": self.arn,
            "PipelineExecutionStatus": self.status,
            "CreationTime": self.created,
            **({"FailureReason": self.reason} if self.reason else {}),
        }

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        try:
            self._run_all(self._definition["Steps"])
            self.status = "Succeeded"
        except StepError as error:
            self.reason = str(error)
            self.status = "Stopped" if self._stop.is_set() else "Failed"

    def _run_all(self, steps: list[Mapping[str, Any]]) -> None:
        for definition in steps:
            step = self.steps[definition["Name"]] = _Step(definition)
            try:
                self._do(step)
            except Exception as error:
                step.status, step.reason = ("Stopped" if self._stop.is_set() else "Failed"), str(error)
                raise StepError(f"{definition['Name']}: {error}") from error
            finally:
                step.ended = time.time()

    def _do(self, step: _Step) -> None:
        kind, arguments = step.definition["Type"], step.definition["Arguments"]
        name = f"pipelines-{self.id}-{step.definition['Name']}-{uuid.uuid4().hex[:10]}"
        if kind == "Training":
            request = {"TrainingJobName": name, **self._value(arguments)}
            self._follow(step, self._platform.train(request, self.region), "TrainingJob")
        elif kind == "Processing":
            request = {"ProcessingJobName": name, **self._value(arguments)}
            self._follow(step, self._platform.process(request, self.region), "ProcessingJob")
        elif kind == "RegisterModel":
            request = self._value(arguments)
            check_shape("CreateModelPackage", request)
            made = self._platform.operations["CreateModelPackage"](request, self.region)
            step.metadata = {"RegisterModel": {"Arn": made["ModelPackageArn"]}}
        elif kind == "Fail":
            raise StepError(str(self._value(arguments["ErrorMessage"])))
        else:
            met = all(self._is_met(condition) for condition in arguments["Conditions"])
            step.metadata, step.status = {"Condition": {"Outcome": str(met)}}, "Succeeded"
            self._run_all(arguments["IfSteps" if met else "ElseSteps"])
        step.status = "Succeeded"

    def _follow(self, step: _Step, job: RunningJob, kind: str) -> None:
        step.metadata = {kind: {"Arn": job.arn}}
        while not job.ended:
            if self._stop.wait(_POLL):
                job.stop()
                break
        while not job.ended:
            time.sleep(_POLL)
        step.described = job.describe()
        if (status := step.described[f"{kind}Status"]) != "Completed":
            raise StepError(step.described.get("FailureReason", f"the job is {status}"))

    def _is_met(self, condition: Mapping[str, Any]) -> bool:
        left, right = self._value(condition["LeftValue"]), self._value(condition["RightValue"])
        return _COMPARISONS[condition["Type"]](left, right)

    def _value(self, value: Any) -> Any:
        """The same with values in the place of expressions, all the way down."""
        if isinstance(value, list):
            return [self._value(each) for each in value]
        if not isinstance(value, Mapping):
            return value
        if set(value) == {"Get"}:
            return self._got(value["Get"])
        if set(value) == {"Std:Join"}:
            return value["Std:Join"].get("On", "").join(str(self._value(each)) for each in value["Std:Join"]["Values"])
        if set(value) == {"Std:JsonGet"}:
            return self._read(value["Std:JsonGet"])
        return {name: self._value(each) for name, each in value.items()}

    def _got(self, path: str) -> Any:
        kind, name, *rest = path.split(".", 2)
        if kind == "Parameters":
            return self._parameters[name]
        if kind == "Execution":
            return {"PipelineExecutionId": self.id, "PipelineExecutionArn": self.arn}[name]
        return _at(self.steps[name].described, rest[0])

    def _read(self, wanted: Mapping[str, Any]) -> Any:
        """A value of a property file, which a processing step has left in S3."""
        _, name, _, file = wanted["PropertyFile"]["Get"].split(".")
        step = self.steps[name]
        found = next(each for each in step.definition["PropertyFiles"] if each["PropertyFileName"] == file)
        outputs = step.described["ProcessingOutputConfig"]["Outputs"]
        place = next(each["S3Output"]["S3Uri"] for each in outputs if each["OutputName"] == found["OutputName"])
        client = self._platform.clients(self.region)("s3")
        content = get_object(S3Uri.parse(place) / found["FilePath"], client=client)
        if content is None:
            raise StepError(f"{place}/{found['FilePath']} is missing")
        return _at(json.loads(content), wanted["Path"])


def _at(value: Any, path: str) -> Any:
    """What lies at ``a.b['c'][0]``."""
    for quoted, index, plain in _PARTS.findall(path):
        try:
            value = value[int(index) if index else quoted or plain]
        except (KeyError, IndexError, TypeError):
            raise StepError(f"{path} was not found") from None
    return value


class EmbeddedPipelines:
    """Pipelines and their executions, each of the region that its request is signed for.

    Args:
        platform: what steps are done with.
        tags: of everything, by ARN.
    """

    def __init__(self, platform: Platform, tags: dict[str, dict[str, str]]) -> None:
        self._platform, self._tags = platform, tags
        self._pipelines: dict[str, dict[str, Any]] = {}
        self._executions: dict[str, Execution] = {}
        self.operations: dict[str, Operation] = {
            "CreatePipeline": self._create,
            "UpdatePipeline": self._update,
            "DescribePipeline": lambda request, region: dict(self._find(request["PipelineName"], region)),
            "DeletePipeline": self._delete,
            "ListPipelines": self._list,
            "StartPipelineExecution": self._start,
            "DescribePipelineExecution": lambda request, region: self._execution(request).describe(),
            "ListPipelineExecutions": self._list_executions,
            "ListPipelineExecutionSteps": self._list_steps,
            "StopPipelineExecution": self._stop,
        }

    def close(self) -> None:
        """Stops what still runs, and waits for its end."""
        for execution in list(self._executions.values()):
            execution.stop()
        for execution in list(self._executions.values()):
            execution.join()

    def _create(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        name = request["PipelineName"]
        arn = arn_of("pipeline", name, region)
        if arn in self._pipelines:
            raise RequestError(f"Pipeline names must be unique within an AWS account and region: {name}")
        if problems := list(_refused(name, request)):
            raise RequestError("; ".join(problems))
        kept = {key: value for key, value in request.items() if key not in ("Tags", "ClientRequestToken")}
        self._pipelines[arn] = {
            **kept,
            "PipelineArn": arn,
            "PipelineStatus": "Active",
            "CreationTime": time.time(),
            "LastModifiedTime": time.time(),
        }
        self._tags[arn] = {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
        return {"PipelineArn": arn}

    def _update(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        found = self._find(request["PipelineName"], region)
        if "PipelineDefinition" in request and (problems := list(_refused(request["PipelineName"], request))):
            raise RequestError("; ".join(problems))
        found |= {**request, "LastModifiedTime": time.time()}
        return {"PipelineArn": found["PipelineArn"]}

    def _find(self, name: str, region: str) -> dict[str, Any]:
        arn = name if name.startswith("arn:") else arn_of("pipeline", name, region)
        if arn not in self._pipelines:
            raise RequestError(f"Pipeline '{name}' does not exist.", "ResourceNotFound")
        return self._pipelines[arn]

    def _delete(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        arn = self._find(request["PipelineName"], region)["PipelineArn"]
        if any(each.status == "Executing" for of, each in self._executions.items() if of.startswith(f"{arn}/")):
            raise RequestError(f"{request['PipelineName']} has executions that run; stop them first")
        del self._pipelines[arn]
        self._tags.pop(arn, None)
        return {"PipelineArn": arn}

    def _list(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        names = ("PipelineArn", "PipelineName", "RoleArn", "CreationTime", "LastModifiedTime")
        found = [each for arn, each in self._pipelines.items() if arn.split(":")[3] == region]
        return {"PipelineSummaries": [{name: each[name] for name in names} for each in found]}

    def _start(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        pipeline = self._find(request["PipelineName"], region)
        definition = json.loads(pipeline["PipelineDefinition"])
        given = {each["Name"]: each["Value"] for each in request.get("PipelineParameters", ())}
        known = {each["Name"] for each in definition.get("Parameters", ())}
        if unknown := given.keys() - known:
            raise RequestError(f"Unknown parameters: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
        arn = f"{pipeline['PipelineArn']}/execution/{uuid.uuid4().hex[:12]}"
        try:
            execution = Execution(arn, definition, given, self._platform)
        except ValueError as error:
            raise RequestError(f"a parameter is not of its type: {error}") from None
        self._executions[arn] = execution
        execution.start()
        return {"PipelineExecutionArn": arn}

    def _execution(self, request: Mapping[str, Any]) -> Execution:
        try:
            return self._executions[request["PipelineExecutionArn"]]
        except KeyError:
            raise RequestError("Pipeline execution does not exist.", "ResourceNotFound") from None

    def _list_executions(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        start = f"{self._find(request['PipelineName'], region)['PipelineArn']}/"
        found = [each for arn, each in self._executions.items() if arn.startswith(start)]
        if request.get("SortOrder", "Descending") == "Descending":
            found.reverse()
        listed = [
            {
                "PipelineExecutionArn": each.arn,
                "StartTime": each.created,
                "PipelineExecutionStatus": each.status,
            }
            for each in found
        ]
        return {"PipelineExecutionSummaries": listed}

    def _list_steps(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        steps = [each.summary() for each in self._execution(request).steps.values()]
        return {"PipelineExecutionSteps": steps if request.get("SortOrder") == "Ascending" else steps[::-1]}

    def _stop(self, request: dict[str, Any], region: str) -> dict[str, Any]:
        self._execution(request).stop()
        return {"PipelineExecutionArn": request["PipelineExecutionArn"]}


def _refused(name: str, request: Mapping[str, Any]) -> Iterator[str]:
    """What SageMaker refuses of a pipeline, and what a laptop can't do."""
    if not _NAME.fullmatch(name):
        yield f"PipelineName {name!r}: at most 256 letters, digits and hyphens"
    try:
        definition = json.loads(request["PipelineDefinition"])
        steps, parameters = definition["Steps"], {each["Name"] for each in definition.get("Parameters", ())}
        named = list(_named(steps))
    except (ValueError, KeyError, TypeError) as error:
        yield f"PipelineDefinition is not a definition: {error!r}; set JSON with Version and Steps"
        return
    for step in named:
        if step["Type"] not in _STEPS:
            yield f"{step['Name']}: the embedded SageMaker has no steps of the type {step['Type']}"
    known: set[str] = set()
    for step in named:
        for path in _references(step["Arguments"] if step["Type"] != "Condition" else step["Arguments"]["Conditions"]):
            kind, _, rest = path.partition(".")
            place = rest.partition(".")[0]
            if kind not in ("Parameters", "Steps", "Execution") or place not in {
                "Parameters": parameters,
                "Steps": known,
            }.get(kind, {place}):
                yield f"{step['Name']}: {path} is not known"
        if step["Name"] in known:
            yield f"{step['Name']}: two steps have this name"
        known.add(step["Name"])


def _named(steps: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """All steps, those of conditions behind them."""
    for step in steps:
        yield step
        for branch in ("IfSteps", "ElseSteps"):
            yield from _named(step["Arguments"].get(branch, []))


def _references(value: Any) -> Iterator[str]:
    """What expressions refer to."""
    if isinstance(value, Mapping):
        if set(value) == {"Get"}:
            yield value["Get"]
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)
