"""Pipelines: the definition, as the services take what it becomes; and what its steps decide by."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import launcher
from container import process
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK, Problems, UserError
from dreambooth_sm.evaluation import EVALUATION, measures_of
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri
from launcher.aws.iam import execution_policy, pipeline_role_policy
from launcher.endpoints.requests import container_of
from launcher.pipelines.definition import EXECUTION, TRAINED, Registration, model_of, pipeline_definition
from launcher.resources import Resources
from launcher.training_request import training_request
from tests.helpers.api import refusals

PLACE = S3Uri("models", "dreambooth-sm/pipelines/toys")
IMAGE = "123456789012.dkr.ecr.us-west-2.amazonaws.com/dreambooth-sm:1"
OPERATIONS = {
    "Training": "CreateTrainingJob",
    "Processing": "CreateProcessingJob",
    "RegisterModel": "CreateModelPackage",
}
REPORT: dict[str, Any] = {
    "candidates": [
        {"candidate": 0, "score": 0.9, "subject": 0.1},
        {"candidate": 100, "score": 0.4, "subject": 0.7, "prompt": None},
        {"candidate": 200, "score": 0.3, "subject": 0.8},
    ],
    "hyperparameters": {"method": "lora", "select_best": False},
    "subjects": [{"instance_prompt": "photo of <zwx> toy"}],
    "base_model": "toybox",
    "attempts": [{"last_step": 200}],
    "verdicts": [],
    "versions": {"image": "", "dreambooth-sm": "1"},
}


def definition(required: dict[str, float] | None = None, **options: Any) -> dict[str, Any]:
    h = Hyperparameters.parse(
        {
            "instance_prompt": "photo of zwx toy",
            "class_prompt": "photo of a toy",
            "validation_prompt": "photo of zwx toy",
            "instance_data_dir": "/opt/ml/input/data/images",
            "fidelity_encoders": "judge",
            "manual_upload_model_path": str(model_of(PLACE)),
        }
    )
    resources = Resources.parse(
        {
            "instance_type": "ml.g5.xlarge",
            "name": "toys",
            "bucket": "models",
            "role": "arn:aws:iam::123456789012:role/train",
            "image_uri": IMAGE,
            "checkpoint": str(PLACE / EXECUTION / "checkpoints"),
            **options,
        }
    )
    channels = {"images": S3Uri("models", "pictures"), "model": S3Uri("models", "base")}
    problems = Problems()
    container = container_of(str(model_of(PLACE)), IMAGE, problems, base_model="s3://models/base")
    problems.raise_any()
    registration = Registration("toys", "PendingManualApproval", required or {"score": 0.2, "prior": 0.5})
    training = training_request(h, resources, channels)
    return pipeline_definition(training, PLACE, registration, container, check_instance="ml.m5.large")


def steps_of(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in found:
        yield step
        yield from steps_of(step["Arguments"].get("IfSteps", []))


def expressions(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if len(value) == 1 and next(iter(value)) in ("Get", "Std:Join", "Std:JsonGet"):
            yield value
        for each in value.values():
            yield from expressions(each)
    elif isinstance(value, list):
        for each in value:
            yield from expressions(each)


def executed(value: Any, known: dict[str, Any]) -> Any:
    """As an execution has it."""
    if isinstance(value, list):
        return [executed(each, known) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"Get"}:
        return known[value["Get"]]
    if set(value) == {"Std:Join"}:
        return value["Std:Join"]["On"].join(executed(each, known) for each in value["Std:Join"]["Values"])
    if set(value) == {"Std:JsonGet"}:
        return "0.25"
    return {name: executed(each, known) for name, each in value.items()}


@pytest.mark.parametrize(
    "options", [{}, {"spot": True, "vpc": ["subnet-0a", "sg-0c"], "tags": {"team": "toys"}, "kms": "1234abcd"}], ids=str
)
def test_each_step_becomes_a_request_that_the_service_takes(options: dict[str, Any]) -> None:
    found = definition(**options)
    known = {f"Parameters.{each['Name']}": each["DefaultValue"] for each in found["Parameters"]}
    known |= {"Execution.PipelineExecutionId": "abcdefghijkl", "Steps.Train.TrainingJobArn": TRAINED}
    asked = {}
    for step in steps_of(found["Steps"]):
        if step["Type"] == "Condition":
            continue
        operation = OPERATIONS[step["Type"]]
        named = {} if step["Type"] == "RegisterModel" else {f"{step['Type']}JobName": "pipelines-abcdefghijkl-x"}
        asked[step["Name"]] = executed(step["Arguments"], known)
        assert refusals(operation, {**named, **asked[step["Name"]]}) == [], step["Name"]
    assert list(asked) == ["Check", "Train", "Evaluate", "Register"]
    model = "s3://models/dreambooth-sm/pipelines/toys/abcdefghijkl/model"
    assert asked["Train"]["HyperParameters"]["manual_upload_model_path"] == model
    assert asked["Evaluate"]["ProcessingInputs"][0]["S3Input"]["S3Uri"] == f"{model}/report.json"
    (container,) = asked["Register"]["InferenceSpecification"]["Containers"]
    assert container["ModelDataSource"]["S3DataSource"]["S3Uri"] == f"{model}/"
    request = {
        "PipelineName": "toys",
        "ClientRequestToken": "x" * 32,
        "PipelineDefinition": json.dumps(found),
        "RoleArn": "arn:aws:iam::123456789012:role/train",
    }
    assert refusals("CreatePipeline", request) == []
    tags = [{"Key": "team", "Value": "toys"}] if options else None
    assert [each.get("Tags") for each in asked.values()] == [tags, tags, tags, None], "versions take none"


def test_without_credentials_the_rest_is_told_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(UserError) as caught:
        launcher.pipeline(tmp_path, group="g g", require={"scre": 0.5}, instance_prompt="photo of zwx toy")
    said = "\n".join(caught.value.problems)
    for problem in ("'scre' is not a measure", "group: 'g g'", "holds no pictures", "no valid AWS credentials"):
        assert problem in said


def test_what_steps_refer_to_is_there() -> None:
    found = definition()
    text, names = json.dumps(found), {each["Name"] for each in found["Parameters"]}
    assert EXECUTION not in text
    assert TRAINED not in text
    asked = {each["Get"] for each in expressions(found) if "Get" in each}
    assert {each.partition(".")[2] for each in asked if each.startswith("Parameters.")} == names
    assert {each for each in asked if not each.startswith("Parameters.")} == {
        "Execution.PipelineExecutionId",
        "Steps.Train.TrainingJobArn",
        "Steps.Evaluate.PropertyFiles.evaluation",
    }
    evaluate = next(each for each in found["Steps"] if each["Name"] == "Evaluate")
    (file,), (output,) = evaluate["PropertyFiles"], evaluate["Arguments"]["ProcessingOutputConfig"]["Outputs"]
    assert (file["OutputName"], file["FilePath"]) == (output["OutputName"], EVALUATION)


def test_less_is_better_of_the_prior_alone() -> None:
    decide = definition({"subject": 0.6, "prior": 0.5})["Steps"][-1]
    kinds = {each["RightValue"]["Get"]: each["Type"] for each in decide["Arguments"]["Conditions"]}
    assert kinds == {
        "Parameters.LeastSubject": "GreaterThanOrEqualTo",
        "Parameters.MostPrior": "LessThanOrEqualTo",
    }


def test_a_pipelines_role_may_start_its_jobs_and_nothing_else_of_theirs() -> None:
    statements = pipeline_role_policy(account="123456789012", region="us-west-2")["Statement"]
    jobs = next(each for each in statements if each["Sid"] == "RunSteps")
    assert all(":training-job/pipelines-" in each or ":processing-job/pipelines-" in each for each in jobs["Resource"])
    alone = {action for each in execution_policy("models")["Statement"] for action in each["Action"]}
    assert not any(action.startswith("sagemaker:Create") for action in alone)


# What runs in its steps


def test_the_measures_are_those_of_the_model_that_was_exported() -> None:
    assert measures_of(REPORT) == {"score": 0.3, "subject": 0.8}
    chosen = {**REPORT, "hyperparameters": {"method": "lora", "select_best": True}}
    assert measures_of(chosen) == {"score": 0.4, "subject": 0.7}
    assert measures_of({**REPORT, "candidates": REPORT["candidates"][:1]}) == {}


@pytest.fixture
def processing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    return tmp_path / "processing"


def test_evaluate_writes_what_conditions_and_versions_read(processing: Path) -> None:
    report = processing / "input" / "report" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps(REPORT))
    assert process.main(["evaluate", "score", "subject"]) == EXIT_OK
    written = json.loads((processing / "output" / EVALUATION).read_text())
    assert (written["score"], written["subject"]) == (0.3, 0.8)
    read = {
        each["Std:JsonGet"]["Path"].rpartition(".")[2]
        for each in expressions(definition()["Steps"][-1]["Arguments"]["IfSteps"])
        if "Std:JsonGet" in each
    }
    assert read == written["properties"].keys()
    assert written["properties"]["instance_prompt"] == "photo of  zwx  toy"
    assert (written["properties"]["image"], written["properties"]["score"]) == ("unknown", "0.3")


@pytest.mark.parametrize(
    ("words", "said"),
    [(["evaluate", "score"], "report.json is missing"), (["draw"], "draw: unknown"), ([], "none: unknown")],
    ids=str,
)
def test_what_steps_fail_with_is_where_sagemaker_reads_it(processing: Path, words: list[str], said: str) -> None:
    assert process.main(words) == EXIT_BAD_INPUT
    assert said in (processing.parent / "output" / "message").read_text()


def test_evaluate_wants_the_measures_that_decide(processing: Path) -> None:
    report = processing / "input" / "report" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text(json.dumps(REPORT))
    assert process.main(["evaluate", "score", "prior", "prompt"]) == EXIT_BAD_INPUT
    assert "prior, prompt: the model was not measured" in (processing.parent / "output" / "message").read_text()
    assert not (processing / "output").exists()


def test_check_looks_at_what_a_training_would_see(processing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = processing / "input" / "data" / "images"
    folder.mkdir(parents=True)
    Image.effect_noise((80, 80), 90).convert("RGB").save(folder / "1.png")
    words = ["check", "--instance_prompt", "photo of zwx toy", "--instance_data_dir", "/opt/ml/input/data/images"]
    assert process.main([*words, "--resolution", "64"]) == EXIT_OK
    assert "1 pictures: photo of zwx toy" in capsys.readouterr().out
    (folder / "2.png").write_bytes(b"no picture")
    assert process.main([*words, "--resolution", "64"]) == EXIT_BAD_INPUT
    assert "2.png" in (processing.parent / "output" / "message").read_text()
