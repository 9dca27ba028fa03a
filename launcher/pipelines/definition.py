"""The definition of a pipeline, by version 2020-12-01 of its schema; pure, as requests are.

Its steps are requests of SageMaker's API in which expressions stand for what an execution decides. The launcher's own
code makes these requests, with :data:`EXECUTION` and :data:`TRAINED` in their texts, which :func:`filled` replaces.

https://docs.aws.amazon.com/sagemaker/latest/dg/build-and-manage-pipeline.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.evaluation import (
    EVALUATION,
    EVALUATION_DIRECTORY,
    PROPERTIES,
    REPORT_DIRECTORY,
    key_of,
)
from dreambooth_sm.serving.report import REPORT
from dreambooth_sm.storage import S3Uri
from launcher.registry.requests import version_request
from launcher.training_request import CHANNELS, IMAGES_CHANNEL, MODEL_CHANNEL

VERSION = "2020-12-01"
CHECK, TRAIN, EVALUATE, DECIDE, REGISTER = "Check", "Train", "Evaluate", "Decide", "Register"
IMAGES, APPROVAL = "Images", "Approval"
# In the place of an execution's id, and of the training job's ARN.
EXECUTION, TRAINED = "EXECUTION-ID", "arn:aws:sagemaker:us-west-2:000000000000:training-job/TRAINED"
_EXPRESSIONS = {
    EXECUTION: {"Get": "Execution.PipelineExecutionId"},
    TRAINED: {"Get": f"Steps.{TRAIN}.TrainingJobArn"},
}
_PLACES = re.compile("|".join(f"({re.escape(place)})" for place in _EXPRESSIONS))
# What processing jobs run, and where they see what a training sees below /opt/ml.
PROGRAM, PROCESSING = "/opt/dreambooth-sm/container/process.py", "/opt/ml/processing"
_FILE = "evaluation"
# SageMaker's own limit of a processing job's arguments.
MOST_ARGUMENTS = 100
_PROMPTS = {"instance_prompt": "InstancePrompt", "class_prompt": "ClassPrompt"}
# Processing jobs look at files for minutes.
_PROCESSING_SECONDS, _PROCESSING_GB = 3600, 30
# Measures of which less is better.
_LESS_IS_BETTER = ("prior",)


@dataclass(frozen=True)
class Registration:
    """What becomes of a model that is good enough.

    Attributes:
        group: of its versions.
        approval: of them.
        required: measures to their limits: the least, of ``prior`` the most.
    """

    group: str
    approval: str
    required: Mapping[str, float]


def pipeline_definition(
    training: Mapping[str, Any],
    place: S3Uri,
    registration: Registration,
    container: Mapping[str, Any],
    *,
    check_instance: str,
) -> dict[str, Any]:
    """The definition.

    Args:
        training: the request of the training job; its model goes to :func:`model_of` ``place``.
        place: prefix that executions have their results below.
        container: that serves the model.
        check_instance: instance type of the processing jobs.
    """
    parameters, known = _parameters(training, registration)
    train = _with_parameters({name: value for name, value in training.items() if name != "TrainingJobName"}, known)
    looked_at = {name: value for name, value in train["HyperParameters"].items() if name != "manual_upload_model_path"}
    arguments = [word for name, value in looked_at.items() for word in (f"--{name}", value)]
    inputs = [
        _input(channel["ChannelName"], channel["DataSource"]["S3DataSource"], CHANNELS)
        for channel in train["InputDataConfig"]
        if channel["ChannelName"] != MODEL_CHANNEL
    ]
    report = str(model_of(place) / REPORT)
    read = _input("report", {"S3DataType": "S3Prefix", "S3Uri": report}, "/opt/ml/input")
    output = {
        "OutputName": _FILE,
        "AppManaged": False,
        "S3Output": {
            "S3Uri": str(place / EXECUTION / _FILE),
            "LocalPath": f"{PROCESSING}/{EVALUATION_DIRECTORY}",
            "S3UploadMode": "EndOfJob",
        },
    }
    assert f"{PROCESSING}/{REPORT_DIRECTORY}" == read["S3Input"]["LocalPath"]
    measures = list(registration.required)
    version = version_request(
        registration.group,
        f"Models of the pipeline in {place}",
        container=container,
        approval=registration.approval,
        report=report,
        properties={name: _from_evaluation(f"properties.{key_of(name)}") for name in PROPERTIES},
        job_arn=TRAINED,
    )
    version["ModelApprovalStatus"] = {"Get": f"Parameters.{APPROVAL}"}
    conditions = [
        {
            "Type": "LessThanOrEqualTo" if measure in _LESS_IS_BETTER else "GreaterThanOrEqualTo",
            "LeftValue": _from_evaluation(measure),
            "RightValue": {"Get": f"Parameters.{limit_name(measure)}"},
        }
        for measure in measures
    ]
    steps = [
        _step(CHECK, "Processing", _processing(training, check_instance, ["check", *arguments], inputs)),
        _step(TRAIN, "Training", train, DependsOn=[CHECK]),
        _step(
            EVALUATE,
            "Processing",
            _processing(training, check_instance, ["evaluate", *measures], [read], output),
            DependsOn=[TRAIN],
            PropertyFiles=[{"PropertyFileName": _FILE, "OutputName": _FILE, "FilePath": EVALUATION}],
        ),
        _step(
            DECIDE,
            "Condition",
            {"Conditions": conditions, "IfSteps": [_step(REGISTER, "RegisterModel", version)], "ElseSteps": []},
        ),
    ]
    return {"Version": VERSION, "Metadata": {}, "Parameters": parameters, "Steps": filled(steps)}


def model_of(place: S3Uri) -> S3Uri:
    """Where the model of an execution goes."""
    return place / EXECUTION / "model"


def limit_name(measure: str) -> str:
    """The parameter that holds a measure's limit."""
    return f"{'Most' if measure in _LESS_IS_BETTER else 'Least'}{measure.capitalize()}"


def filled(value: Any) -> Any:
    """The same with expressions in the place of what stands for them, all the way down."""
    if isinstance(value, Mapping):
        return {name: filled(each) for name, each in value.items()}
    if isinstance(value, list):
        return [filled(each) for each in value]
    if not isinstance(value, str) or not _PLACES.search(value):
        return value
    parts = [_EXPRESSIONS.get(part, part) for part in _PLACES.split(value) if part]
    return parts[0] if len(parts) == 1 else {"Std:Join": {"On": "", "Values": parts}}


def _parameters(
    training: Mapping[str, Any], registration: Registration
) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """The parameters of executions, and the expressions of those that hyperparameters have, by their names."""
    (images,) = (each for each in training["InputDataConfig"] if each["ChannelName"] == IMAGES_CHANNEL)
    values = training["HyperParameters"]
    texts = {IMAGES: images["DataSource"]["S3DataSource"]["S3Uri"], APPROVAL: registration.approval}
    known: dict[str, dict[str, str]] = {}
    for name, parameter in _PROMPTS.items():
        if name in values:
            texts[parameter] = values[name]
            known[name] = {"Get": f"Parameters.{parameter}"}
    if values.get("validation_prompt") == values.get("instance_prompt") and "instance_prompt" in known:
        known["validation_prompt"] = known["instance_prompt"]
    numbers = {limit_name(measure): limit for measure, limit in registration.required.items()}
    return [
        *({"Name": name, "Type": "String", "DefaultValue": text} for name, text in texts.items()),
        *({"Name": name, "Type": "Float", "DefaultValue": number} for name, number in numbers.items()),
    ], known


def _with_parameters(train: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    channels = []
    for channel in train["InputDataConfig"]:
        source = dict(channel["DataSource"]["S3DataSource"])
        if channel["ChannelName"] == IMAGES_CHANNEL:
            source["S3Uri"] = {"Get": f"Parameters.{IMAGES}"}
        channels.append({**channel, "DataSource": {"S3DataSource": source}})
    return {**train, "HyperParameters": {**train["HyperParameters"], **known}, "InputDataConfig": channels}


def _processing(
    training: Mapping[str, Any],
    instance: str,
    arguments: list[Any],
    inputs: list[dict[str, Any]],
    output: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The request of a processing job by the image that trains, with the training's role, network and tags."""
    request: dict[str, Any] = {
        "AppSpecification": {
            "ImageUri": training["AlgorithmSpecification"]["TrainingImage"],
            "ContainerEntrypoint": ["python", PROGRAM],
            "ContainerArguments": arguments,
        },
        "RoleArn": training["RoleArn"],
        "ProcessingInputs": inputs,
        "ProcessingResources": {
            "ClusterConfig": {"InstanceType": instance, "InstanceCount": 1, "VolumeSizeInGB": _PROCESSING_GB}
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": _PROCESSING_SECONDS},
    }
    if output:
        request["ProcessingOutputConfig"] = {"Outputs": [output]}
    if "VpcConfig" in training:
        request["NetworkConfig"] = {"VpcConfig": training["VpcConfig"]}
    if "Tags" in training:
        request["Tags"] = training["Tags"]
    return request


def _input(name: str, source: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """A channel as processing jobs have it, in the folder where a training would have it."""
    below = folder.removeprefix("/opt/ml/")
    return {
        "InputName": name,
        "AppManaged": False,
        "S3Input": {
            "S3Uri": source["S3Uri"],
            "LocalPath": f"{PROCESSING}/{below}/{name}",
            "S3DataType": source["S3DataType"],
            "S3InputMode": "File",
            "S3DataDistributionType": "FullyReplicated",
            "S3CompressionType": "None",
        },
    }


def _from_evaluation(path: str) -> dict[str, Any]:
    return {"Std:JsonGet": {"PropertyFile": {"Get": f"Steps.{EVALUATE}.PropertyFiles.{_FILE}"}, "Path": path}}


def _step(name: str, kind: str, arguments: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"Name": name, "Type": kind, "Arguments": dict(arguments), **more}
