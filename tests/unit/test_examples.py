"""The examples: what the launcher's code makes of them now, and requests that the services take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from examples.make import BUCKET, STATES, TERRAFORM, definition, files
from launcher.aws.iam import execution_policy, trust_policy
from tests.helpers.api import refusals
from tests.unit.test_pipelines import executed, steps_of

INPUT = {
    "Images": "s3://pictures/cat/",
    "InstancePrompt": "photo of zwx cat",
    "ClassPrompt": "photo of a cat",
    "Approval": "Approved",
    "LeastScore": 0.1,
}
OPERATIONS = {"createProcessingJob": "CreateProcessingJob", "createTrainingJob": "CreateTrainingJob",
              "createModelPackage": "CreateModelPackage"}  # fmt: skip
EXECUTION, TRAINED = "f7b3a1e0-52ad-4f0e-8c56-1f9e0d7f9d11", "arn:aws:sagemaker:us-west-2:123456789012:training-job/x"
SAMPLES = {
    "${data.aws_caller_identity.here.account_id}": "123456789012",
    "${var.region}": "us-west-2",
    "${var.bucket}": BUCKET,
    "${aws_s3_bucket.models.id}": BUCKET,
    "${aws_iam_role.execution.id}": "dreambooth-sm",
    "${aws_iam_role.states.id}": "dreambooth-sm-states",
    "${aws_iam_role.states.arn}": "arn:aws:iam::123456789012:role/dreambooth-sm-states",
    "${aws_cloudwatch_event_rule.ended.name}": "dreambooth-sm-jobs",
    "${aws_cloudwatch_event_rule.ended.arn}": "arn:aws:events:us-west-2:123456789012:rule/dreambooth-sm-jobs",
    "${aws_sns_topic.told.arn}": "arn:aws:sns:us-west-2:123456789012:dreambooth-sm-jobs",
}


def test_they_are_what_the_launcher_makes() -> None:
    """Where this fails: ``python -m examples.make``."""
    for path, text in files():
        assert path.read_text(encoding="utf-8") == text, path


# The state machine


def arguments(text: str) -> list[str]:
    """Of a function of the States Language: texts in quotes, and paths."""
    return re.findall(r"'[^']*'|\$[\w$.]*", text)


def value(path: str, state: dict[str, Any]) -> Any:
    if path.startswith("'"):
        return path[1:-1]
    if path == "$$.Execution.Name":
        return EXECUTION
    if path.startswith("States.Format("):
        template, *rest = arguments(path)
        return template[1:-1].format(*(value(each, state) for each in rest))
    if path.startswith("States.Array("):
        return [value(each, state) for each in arguments(path)]
    for name in path.removeprefix("$.").split("."):
        state = state[name]
    return state


def request_of(parameters: Any, state: dict[str, Any]) -> Any:
    if isinstance(parameters, list):
        return [request_of(each, state) for each in parameters]
    if not isinstance(parameters, dict):
        return parameters
    return {
        name.removesuffix(".$"): value(each, state) if name.endswith(".$") else request_of(each, state)
        for name, each in parameters.items()
    }


def test_the_state_machine_asks_what_the_pipeline_asks() -> None:
    states = json.loads(STATES.read_text())["States"]
    known = {f"Parameters.{name}": text for name, text in INPUT.items()}
    known |= {"Execution.PipelineExecutionId": EXECUTION, "Steps.Train.TrainingJobArn": TRAINED}
    steps = {step["Name"]: step for step in steps_of(definition()["Steps"]) if step["Type"] != "Condition"}
    properties = steps["Register"]["Arguments"]["CustomerMetadataProperties"]
    keys = [each["Std:JsonGet"]["Path"].rpartition(".")[2] for each in properties.values()]
    found = {"score": 0.3, "properties": dict.fromkeys(keys, "0.25")}
    state = {**INPUT, "trained": {"TrainingJobArn": TRAINED}, "evaluation": {"found": found}}
    for name, step in steps.items():
        task = states[name]
        operation = OPERATIONS[task["Resource"].split(":")[-1].removesuffix(".sync")]
        request = request_of(task["Parameters"], state)
        assert refusals(operation, request) == [], name
        kept = {key: each for key, each in request.items() if not key.endswith("JobName")}
        assert kept == executed(step["Arguments"], known), name
    read = request_of(states["Read"]["Parameters"], state)
    assert refusals("GetObject", read, "s3") == []
    place = request_of(states["Evaluate"]["Parameters"], state)["ProcessingOutputConfig"]["Outputs"][0]["S3Output"]
    assert f"s3://{read['Bucket']}/{read['Key']}" == f"{place['S3Uri']}/evaluation.json"


def test_every_state_leads_to_one_that_is_there() -> None:
    machine = json.loads(STATES.read_text())
    states = machine["States"]
    ways = {
        name: {each[key] for each in (state, *state.get("Choices", ())) for key in ("Next", "Default") if key in each}
        for name, state in states.items()
    }
    seen, following = set[str](), [machine["StartAt"]]
    while following:
        name = following.pop()
        if name not in seen:
            seen.add(name)
            following += ways[name]
    assert seen == states.keys()
    for name, state in states.items():
        assert ways[name] or state.get("End") or state["Type"] == "Succeed", name
    assert states["Defaults"]["Result"].keys() == INPUT.keys()


# Terraform


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, dict[str, Any]]]:
    text = TERRAFORM.read_text()
    for name, sample in SAMPLES.items():
        text = text.replace(name, sample)
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(text)["resource"]
    return found


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(each)


def test_terraform_refers_to_what_it_has() -> None:
    found = json.loads(TERRAFORM.read_text())
    there = {f"{kind}.{name}" for kind, named in found["resource"].items() for name in named}
    there |= {f"var.{name}" for name in found["variable"]} | {"data.aws_caller_identity", "path.module"}
    asked = {
        name
        for text in texts(found)
        for inside in re.findall(r"\$\{(.*)\}", text)
        for name in re.findall(r"\b(?:aws_\w+|var|data|path)\.\w+", inside)
    }
    assert asked
    assert asked <= there


def test_each_resource_is_a_request_that_its_service_takes(resources: dict[str, dict[str, dict[str, Any]]]) -> None:
    def the(kind: str) -> dict[str, Any]:
        (only,) = resources[kind].values()
        return only

    image, block = the("aws_ecr_repository"), dict(the("aws_s3_bucket_public_access_block"))
    rule, target, machine = (the(f"aws_{kind}") for kind in ("cloudwatch_event_rule", "cloudwatch_event_target",
                                                             "sfn_state_machine"))  # fmt: skip
    topic, policy = the("aws_sns_topic"), the("aws_sns_topic_policy")
    transformer = target["input_transformer"]
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("ecr", "CreateRepository", {
            "repositoryName": image["name"],
            "imageTagMutability": image["image_tag_mutability"],
            "imageScanningConfiguration": {"scanOnPush": image["image_scanning_configuration"]["scan_on_push"]},
        }),
        ("s3", "CreateBucket", {"Bucket": the("aws_s3_bucket")["bucket"]}),
        ("s3", "PutPublicAccessBlock", {
            "Bucket": block.pop("bucket"),
            "PublicAccessBlockConfiguration": {
                "".join(word.capitalize() for word in name.split("_")): on for name, on in block.items()
            },
        }),
        ("sagemaker", "CreateModelPackageGroup",
         {"ModelPackageGroupName": the("aws_sagemaker_model_package_group")["model_package_group_name"]}),
        ("sns", "CreateTopic", {"Name": topic["name"]}),
        ("sns", "SetTopicAttributes",
         {"TopicArn": policy["arn"], "AttributeName": "Policy", "AttributeValue": policy["policy"]}),
        ("events", "PutRule",
         {"Name": rule["name"], "Description": rule["description"], "EventPattern": rule["event_pattern"]}),
        ("events", "PutTargets", {"Rule": target["rule"], "Targets": [{
            "Id": target["target_id"],
            "Arn": target["arn"],
            "InputTransformer": {"InputPathsMap": transformer["input_paths"],
                                 "InputTemplate": transformer["input_template"]},
        }]}),
        ("stepfunctions", "CreateStateMachine",
         {"name": machine["name"], "roleArn": machine["role_arn"], "definition": STATES.read_text()}),
    ]  # fmt: skip
    for role in resources["aws_iam_role"].values():
        made = {"RoleName": role["name"], "AssumeRolePolicyDocument": role["assume_role_policy"]}
        asked.append(("iam", "CreateRole", made))
    for given in resources["aws_iam_role_policy"].values():
        put = {"RoleName": given["role"], "PolicyName": given["name"], "PolicyDocument": given["policy"]}
        asked.append(("iam", "PutRolePolicy", put))
    for service, operation, request in asked:
        assert refusals(operation, request, service) == [], operation
    covered = {"aws_iam_role", "aws_iam_role_policy"}
    assert len(asked) == len(resources.keys() - covered) + 4, "each resource is asked for"


def test_the_execution_roles_policy_is_the_least_one(resources: dict[str, dict[str, dict[str, Any]]]) -> None:
    policy = json.loads(resources["aws_iam_role_policy"]["execution"]["policy"])["Statement"]
    least = execution_policy(BUCKET, account="123456789012", region="us-west-2")["Statement"]
    assert [each for each in least if each not in policy] == []
    more = {action for each in policy if each not in least for action in each["Action"]}
    assert not {action for action in more if action.startswith(("s3:", "ecr:")) or "*" in action}
    assert json.loads(resources["aws_iam_role"]["execution"]["assume_role_policy"]) == trust_policy()
    told = resources["aws_cloudwatch_event_target"]["told"]["input_transformer"]
    assert not re.search('HyperParameters|FailureReason|detail"', json.dumps(told))
