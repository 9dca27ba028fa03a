"""Writes the examples beside it from the launcher's own code: ``python -m examples.make``.

``step-functions.asl.json`` is the pipeline of ``docs/pipelines.md`` as a state machine. ``terraform/main.tf.json`` is
what both need of an account: repository, bucket, roles with the least policies, and who is told of ended jobs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dreambooth_sm.errors import Problems
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri
from launcher.aws.iam import execution_policy, pipeline_role_policy, trust_policy
from launcher.endpoints.requests import container_of
from launcher.events.requests import notification_requests
from launcher.measured import measuring, with_values
from launcher.pipelines.definition import EXECUTION, Registration, model_of, pipeline_definition
from launcher.resources import Resources
from launcher.training_request import training_request

HERE = Path(__file__).parent
STATES, TERRAFORM = HERE / "step-functions.asl.json", HERE / "terraform" / "main.tf.json"
# An account, as the state machine has it; Terraform fills in its own.
REGION, ACCOUNT, BUCKET, TAG = "us-west-2", "123456789012", "dreambooth-sm-models", "TAG-OF-THE-BUILD"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/dreambooth-sm"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/dreambooth-sm:{TAG}"
GROUP = "toys"
_OPERATIONS = {
    "Processing": ("sagemaker:createProcessingJob.sync", "ProcessingJobName"),
    "Training": ("sagemaker:createTrainingJob.sync", "TrainingJobName"),
    "RegisterModel": ("aws-sdk:sagemaker:createModelPackage", ""),
}
_COMPARISONS = {
    "GreaterThanOrEqualTo": "NumericGreaterThanEqualsPath",
    "LessThanOrEqualTo": "NumericLessThanEqualsPath",
}


def definition() -> dict[str, Any]:
    """The pipeline's definition: a LoRA of Stable Diffusion 1.5, registered with a score of 0.2."""
    place = S3Uri(BUCKET, "dreambooth-sm/pipelines/toys")
    h = Hyperparameters.parse(
        {
            "instance_prompt": "photo of zwx toy",
            "class_prompt": "photo of a toy",
            "method": "lora",
            "max_train_steps": 400,
            "instance_data_dir": "/opt/ml/input/data/images",
            "manual_upload_model_path": str(model_of(place)),
        }
    )
    resources = Resources.parse(
        {
            "instance_type": "ml.g5.xlarge",
            "name": "toys",
            "bucket": BUCKET,
            "role": ROLE,
            "image_uri": IMAGE,
            "checkpoint": str(place / EXECUTION / "checkpoints"),
        }
    )
    problems = Problems()
    container = container_of(str(model_of(place)), IMAGE, problems)
    problems.raise_any()
    training = training_request(with_values(h, measuring(h)), resources, {"images": S3Uri(BUCKET, "pictures/zwx")})
    registration = Registration(GROUP, "PendingManualApproval", {"score": 0.2})
    return pipeline_definition(training, place, registration, container, check_instance="ml.m5.large")


def state_machine(pipeline: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline's definition in the Amazon States Language; parameters are the execution's input."""
    check, train, evaluate, decide = pipeline["Steps"]
    (register,) = decide["Arguments"]["IfSteps"]
    (output,) = evaluate["Arguments"]["ProcessingOutputConfig"]["Outputs"]
    bucket, _, key = _format(output["S3Output"]["S3Uri"]).removeprefix("States.Format('s3://").partition("/")
    defaults = {each["Name"]: each["DefaultValue"] for each in pipeline["Parameters"]}
    choices = [
        {
            "Variable": _path(each["LeftValue"]),
            _COMPARISONS[each["Type"]]: _path(each["RightValue"]),
        }
        for each in decide["Arguments"]["Conditions"]
    ]
    read = {
        "Type": "Task",
        "Resource": "arn:aws:states:::aws-sdk:s3:getObject",
        "Parameters": {
            "Bucket": bucket,
            "Key.$": f"States.Format('{key}".replace("evaluation'", f"evaluation/{_file(evaluate)}'"),
        },
        "ResultSelector": {"found.$": "States.StringToJson($.Body)"},
        "ResultPath": "$.evaluation",
        "Next": "Decide",
    }
    return {
        "Comment": "Checks pictures, trains, measures, and registers what is good enough: python -m examples.make",
        "StartAt": "Defaults",
        "States": {
            "Defaults": {"Type": "Pass", "Result": defaults, "ResultPath": "$.defaults", "Next": "Input"},
            "Input": {
                "Type": "Pass",
                "Parameters": {"all.$": "States.JsonMerge($.defaults, $$.Execution.Input, false)"},
                "OutputPath": "$.all",
                "Next": "Check",
            },
            "Check": _task(check, ResultPath=None, Next="Train"),
            "Train": _task(train, ResultPath="$.trained", Next="Evaluate"),
            "Evaluate": _task(evaluate, ResultPath=None, Next="Read"),
            "Read": read,
            "Decide": {
                "Type": "Choice",
                "Choices": [{"And": choices, "Next": "Register"}]
                if len(choices) > 1
                else [{**choices[0], "Next": "Register"}],
                "Default": "NotGoodEnough",
            },
            "Register": _task(register, End=True),
            "NotGoodEnough": {"Type": "Succeed"},
        },
    }


def _file(step: Mapping[str, Any]) -> str:
    (file,) = step["PropertyFiles"]
    return str(file["FilePath"])


def _task(step: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    operation, name = _OPERATIONS[step["Type"]]
    named = {f"{name}.$": f"States.Format('pipelines-{{}}-{step['Name']}', $$.Execution.Name)"} if name else {}
    parameters = {**named, **_fields(step["Arguments"])}
    return {"Type": "Task", "Resource": f"arn:aws:states:::{operation}", "Parameters": parameters, **more}


def _fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """Fields whose values the execution decides have names that end with ``.$``."""
    found: dict[str, Any] = {}
    for name, each in value.items():
        if _is_expression(each):
            found[f"{name}.$"] = _path(each)
        elif isinstance(each, Mapping):
            found[name] = _fields(each)
        elif isinstance(each, list) and any(map(_is_expression, each)):
            found[f"{name}.$"] = f"States.Array({', '.join(map(_path, each))})"
        else:
            found[name] = (
                [_fields(one) if isinstance(one, Mapping) else one for one in each] if isinstance(each, list) else each
            )
    return found


def _is_expression(value: Any) -> bool:
    return isinstance(value, Mapping) and bool({"Get", "Std:Join", "Std:JsonGet"} & value.keys())


def _path(value: Any) -> str:
    """An expression, or a text, as States Language has it inside others."""
    if isinstance(value, str):
        return f"'{value}'"
    if "Std:Join" in value:
        return _format(value)
    if "Std:JsonGet" in value:
        return f"$.evaluation.found.{value['Std:JsonGet']['Path']}"
    kind, _, rest = value["Get"].partition(".")
    return {"Parameters": f"$.{rest}", "Execution": "$$.Execution.Name", "Steps": "$.trained.TrainingJobArn"}[kind]


def _format(value: Mapping[str, Any]) -> str:
    parts = value["Std:Join"]["Values"]
    text = "".join(part if isinstance(part, str) else "{}" for part in parts)
    return f"States.Format('{text}', {', '.join(_path(part) for part in parts if not isinstance(part, str))})"


def terraform() -> dict[str, Any]:
    """What an account needs, in Terraform's own JSON."""
    account, region = "${data.aws_caller_identity.here.account_id}", "${var.region}"
    here = {"account": account, "region": region}
    requests = {
        each.operation: each.request
        for each in notification_requests(
            "arn:aws:sns:us-west-2:123456789012:told", name="dreambooth-sm-jobs", account=ACCOUNT, region=REGION
        )
    }
    (target,) = requests["put_targets"]["Targets"]
    transformer = target["InputTransformer"]
    execution = execution_policy("${var.bucket}", **here)
    execution["Statement"] += pipeline_role_policy(**here)["Statement"]
    return {
        "//": "python -m examples.make writes it from the launcher's own policies and requests",
        "terraform": {"required_providers": {"aws": {"source": "hashicorp/aws", "version": ">= 5.0"}}},
        "provider": {"aws": {"region": region}},
        "variable": {
            "region": {"type": "string", "default": REGION},
            "bucket": {"type": "string", "description": "Name of the bucket for pictures, checkpoints and models"},
            "image_tag": {"type": "string", "description": "That build_and_push.sh has printed"},
        },
        "data": {"aws_caller_identity": {"here": {}}},
        "resource": {
            "aws_ecr_repository": {
                "image": {
                    "name": "dreambooth-sm",
                    "image_tag_mutability": "IMMUTABLE",
                    "image_scanning_configuration": {"scan_on_push": True},
                }
            },
            "aws_s3_bucket": {"models": {"bucket": "${var.bucket}"}},
            "aws_s3_bucket_public_access_block": {
                "models": {
                    "bucket": "${aws_s3_bucket.models.id}",
                    **dict.fromkeys(
                        ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets"),
                        True,
                    ),
                }
            },
            "aws_iam_role": {
                "execution": {"name": "dreambooth-sm", "assume_role_policy": json.dumps(trust_policy())},
                "states": {
                    "name": "dreambooth-sm-states",
                    "assume_role_policy": json.dumps(_trust("states.amazonaws.com")),
                },
            },
            "aws_iam_role_policy": {
                "execution": {
                    "name": "dreambooth-sm",
                    "role": "${aws_iam_role.execution.id}",
                    "policy": json.dumps(execution),
                },
                "states": {
                    "name": "dreambooth-sm-states",
                    "role": "${aws_iam_role.states.id}",
                    "policy": json.dumps(_states_policy(account, region)),
                },
            },
            "aws_sagemaker_model_package_group": {"toys": {"model_package_group_name": GROUP}},
            "aws_sfn_state_machine": {
                "train": {
                    "name": "dreambooth-sm-toys",
                    "role_arn": "${aws_iam_role.states.arn}",
                    "definition": _filled_in('${file("${path.module}/../step-functions.asl.json")}'),
                }
            },
            "aws_sns_topic": {"told": {"name": "dreambooth-sm-jobs"}},
            "aws_sns_topic_policy": {
                "told": {
                    "arn": "${aws_sns_topic.told.arn}",
                    "policy": json.dumps(_publishing()),
                }
            },
            "aws_cloudwatch_event_rule": {
                "ended": {
                    "name": "dreambooth-sm-jobs",
                    "description": requests["put_rule"]["Description"],
                    "event_pattern": requests["put_rule"]["EventPattern"].replace('"dreambooth-"', '"pipelines-"'),
                }
            },
            "aws_cloudwatch_event_target": {
                "told": {
                    "rule": "${aws_cloudwatch_event_rule.ended.name}",
                    "target_id": target["Id"],
                    "arn": "${aws_sns_topic.told.arn}",
                    "input_transformer": {
                        "input_paths": transformer["InputPathsMap"],
                        "input_template": transformer["InputTemplate"],
                    },
                }
            },
        },
        "output": {
            "role": {"value": "${aws_iam_role.execution.arn}"},
            "state_machine": {"value": "${aws_sfn_state_machine.train.arn}"},
        },
    }


def _filled_in(text: str) -> str:
    """The state machine's file with this account's values in the place of the example's."""
    inner = text.removeprefix("${").removesuffix("}")
    for old, new in (
        (ROLE, "aws_iam_role.execution.arn"),
        (IMAGE, '"${aws_ecr_repository.image.repository_url}:${var.image_tag}"'),
        (BUCKET, "var.bucket"),
    ):
        inner = f'replace({inner}, "{old}", {new})'
    return f"${{{inner}}}"


def _trust(service: str) -> dict[str, Any]:
    return json.loads(json.dumps(trust_policy()).replace("sagemaker.amazonaws.com", service))


def _states_policy(account: str, region: str) -> dict[str, Any]:
    """Of the state machine's own role: to run the steps, to wait for them, and to read the evaluation."""
    steps = pipeline_role_policy(account=account, region=region)
    rules = [f"StepFunctionsGetEventsForSageMaker{kind}JobsRule" for kind in ("Training", "Processing")]
    waiting = {
        "Sid": "WaitForSteps",
        "Effect": "Allow",
        "Action": ["events:PutTargets", "events:PutRule", "events:DescribeRule"],
        "Resource": [f"arn:aws:events:{region}:{account}:rule/{rule}" for rule in rules],
    }
    reading = {
        "Sid": "ReadEvaluations",
        "Effect": "Allow",
        "Action": ["s3:GetObject"],
        "Resource": "arn:aws:s3:::${var.bucket}/dreambooth-sm/pipelines/*/evaluation/*",
    }
    kept = [each for each in steps["Statement"] if each["Sid"] != "WriteLogs"]
    return {**steps, "Statement": [*kept, waiting, reading]}


def _publishing() -> dict[str, Any]:
    statement = {
        "Sid": "EventBridge",
        "Effect": "Allow",
        "Principal": {"Service": "events.amazonaws.com"},
        "Action": "sns:Publish",
        "Resource": "${aws_sns_topic.told.arn}",
        "Condition": {"ArnEquals": {"aws:SourceArn": "${aws_cloudwatch_event_rule.ended.arn}"}},
    }
    return {"Version": "2012-10-17", "Statement": [statement]}


def files() -> Iterator[tuple[Path, str]]:
    """Each file, and what it holds."""
    yield STATES, json.dumps(state_machine(definition()), indent=2) + "\n"
    yield TERRAFORM, json.dumps(terraform(), indent=2) + "\n"


if __name__ == "__main__":
    for path, text in files():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
