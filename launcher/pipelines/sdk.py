"""A pipeline's definition as an object of the SageMaker SDK 2 or 3, whichever is installed.

Both check what steps refer to each other by. Their steps are made of jobs' own requests here, which the launcher has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import UserError

if TYPE_CHECKING:
    from boto3.session import Session

# Where each SDK has its modules; and those that the second has elsewhere.
_SDK_2, _SDK_3, _CORE = "sagemaker.workflow", "sagemaker.mlops.workflow", "sagemaker.core.workflow"
_MODULES = ("pipeline", "steps", "condition_step")
_SHARED = ("conditions", "execution_variables", "functions", "parameters", "properties")
_SHAPES = {
    "Processing": "DescribeProcessingJobResponse",
    "Training": "DescribeTrainingJobResponse",
    "RegisterModel": "DescribeModelPackageOutput",
}


def sdk_pipeline(request: Mapping[str, Any], session: Session | None = None) -> Any:
    """See :func:`launcher.sagemaker_pipeline`."""
    sdk, definition = _load(), json.loads(request["PipelineDefinition"])
    parameters = {each["Name"]: _parameter(each, sdk) for each in definition["Parameters"]}
    steps = _Steps(sdk, parameters).made(definition["Steps"])
    return sdk.Pipeline(
        name=request["PipelineName"],
        parameters=list(parameters.values()),
        steps=steps,
        pipeline_experiment_config=None,
        sagemaker_session=sdk.Session(session) if session else None,
    )


def _load() -> SimpleNamespace:
    """What is needed of the SDK that is installed, by name."""
    for first, second, session in (
        (_SDK_3, _CORE, "sagemaker.core.helper.session_helper"),
        (_SDK_2, _SDK_2, "sagemaker.session"),
    ):
        try:
            found = [import_module(f"{first}.{name}") for name in _MODULES]
            found += [import_module(f"{second}.{name}") for name in _SHARED]
            found.append(import_module(session))
        except ImportError:
            continue
        return SimpleNamespace(**{name: value for module in found for name, value in vars(module).items()})
    raise UserError(
        "launcher.sagemaker_pipeline needs the SageMaker SDK: pip install 'dreambooth-sm[estimator]' for its version "
        "2, or sagemaker-mlops for 3, in an environment without the other"
    )


def _parameter(described: Mapping[str, Any], sdk: SimpleNamespace) -> Any:
    kind = {"String": sdk.ParameterString, "Float": sdk.ParameterFloat}[described["Type"]]
    return kind(name=described["Name"], default_value=described["DefaultValue"])


class _Steps:
    """Makes steps of their descriptions, one after another: each may refer to those before it."""

    def __init__(self, sdk: SimpleNamespace, parameters: Mapping[str, Any]) -> None:
        self._sdk, self._parameters = sdk, parameters
        self._known: dict[str, Any] = {}

        class DefinedStep(sdk.Step):  # type: ignore[misc, name-defined]  # the SDKs have no types
            """A step with the request that it makes."""

            def __init__(self, described: Mapping[str, Any], arguments: Any) -> None:
                kind = described["Type"]
                super().__init__(
                    described["Name"],
                    step_type=sdk.StepTypeEnum(kind),
                    depends_on=list(described.get("DependsOn", ())) or None,
                )
                self._arguments = arguments
                self._properties = sdk.Properties(step_name=self.name, shape_name=_SHAPES[kind], step=self)
                self.property_files = [
                    sdk.PropertyFile(each["PropertyFileName"], each["OutputName"], each["FilePath"])
                    for each in described.get("PropertyFiles", ())
                ]

            @property
            def arguments(self) -> Any:
                return self._arguments

            @property
            def properties(self) -> Any:
                return self._properties

            def to_request(self) -> dict[str, Any]:
                files = [each.expr for each in self.property_files]
                return {**super().to_request(), **({"PropertyFiles": files} if files else {})}

        self._step = DefinedStep

    def made(self, described: list[Mapping[str, Any]]) -> list[Any]:
        steps = []
        for each in described:
            if each["Type"] == "Condition":
                steps.append(self._decision(each["Name"], each["Arguments"]))
            else:
                steps.append(self._step(each, self._value(each["Arguments"])))
            self._known[each["Name"]] = steps[-1]
        return steps

    def _decision(self, name: str, arguments: Mapping[str, Any]) -> Any:
        kinds = {
            "GreaterThanOrEqualTo": self._sdk.ConditionGreaterThanOrEqualTo,
            "LessThanOrEqualTo": self._sdk.ConditionLessThanOrEqualTo,
        }
        conditions = [
            kinds[each["Type"]](left=self._value(each["LeftValue"]), right=self._value(each["RightValue"]))
            for each in arguments["Conditions"]
        ]
        return self._sdk.ConditionStep(
            name=name,
            conditions=conditions,
            if_steps=self.made(arguments["IfSteps"]),
            else_steps=self.made(arguments["ElseSteps"]),
        )

    def _value(self, value: Any) -> Any:
        """Expressions as the SDK's objects, all the way down."""
        if isinstance(value, list):
            return [self._value(each) for each in value]
        if not isinstance(value, Mapping):
            return value
        if set(value) == {"Get"}:
            return self._got(*value["Get"].split("."))
        if "Std:Join" in value:
            return self._sdk.Join(on=value["Std:Join"]["On"], values=self._value(value["Std:Join"]["Values"]))
        if "Std:JsonGet" in value:
            _, step, _, file = value["Std:JsonGet"]["PropertyFile"]["Get"].split(".")
            return self._sdk.JsonGet(step_name=step, property_file=file, json_path=value["Std:JsonGet"]["Path"])
        return {name: self._value(each) for name, each in value.items()}

    def _got(self, kind: str, name: str, *path: str) -> Any:
        if kind == "Parameters":
            return self._parameters[name]
        if kind == "Execution":
            return self._sdk.ExecutionVariables.PIPELINE_EXECUTION_ID
        found = self._known[name].properties
        for each in path:
            found = getattr(found, each)
        return found
