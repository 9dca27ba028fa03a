"""Pipelines on the embedded SageMaker: made, changed, and run with a real training."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import boto3
import pytest

import launcher
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, UserError
from launcher.aws.iam import notebook_policy, pipeline_policy
from launcher.cli import main
from launcher.local.pipelines import Execution
from launcher.local.services import EmbeddedServices
from tests.helpers.api import refusals

# Without a class, which would be measured by 16 more pictures.
SMALL = ["--resolution", "64", "--max_train_steps", "2", "--method", "lora"]
SMALL += ["--instance_prompt", "photo of zwx toy", "--instance_type", "ml.g5.xlarge"]
OPTIONS: dict[str, Any] = {
    "base_model": "toybox",
    "resolution": 64,
    "instance_prompt": "photo of zwx toy",
    "instance_type": "ml.g5.xlarge",
    "log": lambda line: None,
}


@pytest.mark.slow
def test_a_pipeline_checks_trains_measures_and_registers(
    services: EmbeddedServices, pictures: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured_by = ["--base_model", str(tiny_base), "--fidelity_encoders", "judge"]
    made = [
        "pipeline",
        str(pictures),
        *SMALL,
        *measured_by,
        "--group",
        "toys",
        "--require",
        "score=-1",
        "--tags",
        "team=toys",
    ]
    assert main([*made, "--dry_run"]) == EXIT_OK
    printed = json.loads(capsys.readouterr().out)
    with pytest.raises(UserError, match="'dreambooth-toys' was not found"):
        launcher.attach_pipeline("dreambooth-toys")

    assert main([*made, "--start"]) == EXIT_OK
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if "Succeeded" in line] == [
        f"{step}: Succeeded" for step in ("Check", "Train", "Evaluate", "Decide", "Register")
    ]
    pipeline = launcher.attach_pipeline("dreambooth-toys")
    assert json.loads(pipeline.describe()["PipelineDefinition"]) == printed
    (execution,) = pipeline.executions()
    package, job = execution.package, execution.job
    assert execution.good_enough
    assert package
    assert job
    assert f"package: {package.arn}" in told
    version = package.describe()
    assert version["SourceUri"] == job.describe()["TrainingJobArn"]
    (container,) = version["InferenceSpecification"]["Containers"]
    assert container["ModelDataSource"]["S3DataSource"]["S3Uri"] == f"{job.model_uri}/"
    assert version["CustomerMetadataProperties"]["instance_prompt"] == "photo of zwx toy"
    measured = [line.split("score=")[1].split()[0] for line in job.lines() if line.startswith("candidate=2 ")]
    assert float(version["CustomerMetadataProperties"]["score"]) == pytest.approx(float(measured[0]), rel=1e-3)
    assert job.describe()["CheckpointConfig"]["S3Uri"].endswith(f"/{execution.arn.split('/')[-1]}/checkpoints")

    # Pictures that can't be trained on cost no training.
    nothing = job.model_uri.replace("/model", "/evaluation")
    failed = ["run_pipeline", "dreambooth-toys", "--parameters", f"Images={nothing}"]
    assert main(failed) == EXIT_FAILURE
    assert [step.name for step in pipeline.executions()[0].steps()] == ["Check"]
    assert "Check: " in capsys.readouterr().err


def test_the_same_call_again_changes_what_is_there(services: EmbeddedServices, pictures: Path) -> None:
    session, sent = boto3.Session(), list[str]()
    session.events.register("before-call.sagemaker", lambda model, **_: sent.append(model.name))

    def make(**options: Any) -> launcher.TrainingPipeline:
        sent.clear()
        return launcher.pipeline(
            pictures, group="others", require={"score": 0.2}, session=session, **{**OPTIONS, **options}
        )

    made = make(tags={"team": "toys"})
    assert "CreatePipeline" in sent
    first = made.describe()
    tags = services.clients()("sagemaker").list_tags(ResourceArn=first["PipelineArn"])["Tags"]
    assert {each["Key"]: each["Value"] for each in tags} == {
        "team": "toys",
        "dreambooth-sm:pipeline": "dreambooth-others",
    }
    make(tags={"team": "toys"})
    assert not {"CreatePipeline", "UpdatePipeline"} & {*sent}, "nothing has changed"
    make(max_train_steps=300, tags={"team": "toys"})
    assert "UpdatePipeline" in sent
    training = json.loads(made.describe()["PipelineDefinition"])["Steps"][1]["Arguments"]
    assert training["HyperParameters"]["max_train_steps"] == "300"
    allowed = [*notebook_policy("models")["Statement"], *pipeline_policy()["Statement"]]
    assert {f"sagemaker:{each}" for each in sent} <= {action for each in allowed for action in each["Action"]}


def test_what_others_have_made_is_left_alone(services: EmbeddedServices, pictures: Path) -> None:
    sagemaker = services.clients()("sagemaker")
    theirs = json.dumps({"Version": "2020-12-01", "Steps": []})
    sagemaker.create_pipeline(PipelineName="theirs", PipelineDefinition=theirs, RoleArn=services.role)
    with pytest.raises(UserError, match="theirs is a pipeline that the launcher has not made"):
        launcher.pipeline(pictures, group="toys", require={"score": 0.2}, name="theirs", **OPTIONS)
    with pytest.raises(UserError, match="theirs is a pipeline that the launcher has not made, and stays"):
        launcher.attach_pipeline("theirs").delete()
    assert sagemaker.describe_pipeline(PipelineName="theirs")["PipelineDefinition"] == theirs


def test_a_pipeline_is_deleted_where_nothing_of_it_runs(
    services: EmbeddedServices, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = launcher.pipeline(pictures, group="gone", require={"score": 0.2}, **OPTIONS)
    going = threading.Event()
    monkeypatch.setattr(Execution, "_do", lambda self, step: going.wait())
    execution = made.start()
    assert main(["delete_pipeline", "dreambooth-gone"]) == EXIT_BAD_INPUT
    assert "does not delete dreambooth-gone: " in capsys.readouterr().err
    going.set()
    execution.wait(lambda line: None)
    assert main(["delete_pipeline", "dreambooth-gone"]) == EXIT_OK
    with pytest.raises(UserError, match="was not found"):
        launcher.attach_pipeline("dreambooth-gone")
    made.delete()
    groups = services.clients()("sagemaker").list_model_package_groups()["ModelPackageGroupSummaryList"]
    assert "gone" in [each["ModelPackageGroupName"] for each in groups]


def test_every_problem_is_told_at_once(
    services: EmbeddedServices, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["pipeline", str(pictures), *SMALL, "--group", "to ys", "--require", "beauty=1", "prior=2"]
    bad += [
        "--checkpoint",
        "s3://models/x",
        "--network_isolation",
        "true",
        "--approval",
        "maybe",
        "--learning_rate",
        "x",
    ]
    assert main(bad) == EXIT_BAD_INPUT
    said = capsys.readouterr().err
    for words in ("group: 'to ys'", "'beauty' is not a measure", "checkpoint: each execution", "network_isolation: ",
                  "approval: 'maybe'", "learning_rate"):  # fmt: skip
        assert words in said, words
    with pytest.raises(UserError, match="prior is measured of a class; set class_prompt"):
        launcher.pipeline(pictures, group="toys", require={"prior": 0.5}, **OPTIONS)
    with pytest.raises(UserError, match="pipelines run on SageMaker"):
        launcher.pipeline(pictures, group="toys", require={"score": 0.5}, **{**OPTIONS, "instance_type": "local"})


def test_the_request_is_one_that_sagemaker_takes(services: EmbeddedServices, pictures: Path) -> None:
    request = launcher.pipeline_request(
        pictures, group="toys", require={"score": 0.2}, **{k: v for k, v in OPTIONS.items() if k != "log"}
    )
    assert refusals("CreatePipeline", {**request, "ClientRequestToken": "x" * 32}) == []


def decision(least: float) -> str:
    """A pipeline that decides by a parameter, and fails where it is too small."""
    condition = {"Type": "GreaterThan", "LeftValue": {"Get": "Parameters.Given"}, "RightValue": least}
    fail = {
        "Name": "No",
        "Type": "Fail",
        "Arguments": {"ErrorMessage": {"Std:Join": {"On": " ", "Values": ["too", "small"]}}},
    }
    arguments = {"Conditions": [condition], "IfSteps": [], "ElseSteps": [fail]}
    return json.dumps(
        {
            "Version": "2020-12-01",
            "Parameters": [{"Name": "Given", "Type": "Float", "DefaultValue": 1}],
            "Steps": [{"Name": "Decide", "Type": "Condition", "Arguments": arguments}],
        }
    )


def test_conditions_decide(services: EmbeddedServices) -> None:
    services.clients()("sagemaker").create_pipeline(
        PipelineName="decides", PipelineDefinition=decision(0.5), RoleArn=services.role
    )
    pipeline = launcher.attach_pipeline("decides")
    assert pipeline.start().wait(lambda line: None).good_enough
    refused = pipeline.start(Given=0.25)
    with pytest.raises(launcher.JobFailed, match="No: too small"):
        refused.wait(lambda line: None)
    assert refused.good_enough is False
    with pytest.raises(UserError, match="Unknown parameters: Other; known: Given"):
        pipeline.start(Other=1)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{", "is not a definition"),
        (decision(0.5).replace("Parameters.Given", "Parameters.Lost"), "Parameters.Lost is not known"),
        (decision(0.5).replace('"Fail"', '"Lambda"'), "no steps of the type Lambda"),
    ],
    ids=["no JSON", "a parameter", "a type"],
)
def test_definitions_that_can_not_run_are_refused(services: EmbeddedServices, broken: str, said: str) -> None:
    sagemaker = services.clients()("sagemaker")
    with pytest.raises(sagemaker.exceptions.ClientError, match=said):
        sagemaker.create_pipeline(PipelineName="broken", PipelineDefinition=broken, RoleArn=services.role)
