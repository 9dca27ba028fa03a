"""What EventBridge is told to tell, and what leaves it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dreambooth_sm.errors import UserError
from launcher.events.requests import CONNECTION, DESTINATION, SECRET, AwsRequest, notification_requests
from launcher.local.events import event_of, message_of
from tests.helpers.api import refusals

ACCOUNT: dict[str, Any] = {"account": "123456789012", "region": "us-west-2", "name": "dreambooth-sm-toys"}
HOOK, TOPIC, MAIL = "https://hooks.example/T1/B2?c=d", "arn:aws:sns:us-west-2:123456789012:mine", "me@toys.example"
ARNS = {
    CONNECTION: "arn:aws:events:us-west-2:123456789012:connection/dreambooth-sm-toys/12ab",
    DESTINATION: "arn:aws:events:us-west-2:123456789012:api-destination/dreambooth-sm-toys/12ab",
    SECRET: "the key",
}
DESCRIPTION = {
    "TrainingJobName": "dreambooth-1",
    "TrainingJobArn": "arn:aws:sagemaker:us-west-2:123456789012:training-job/dreambooth-1",
    "TrainingJobStatus": "Failed",
    "FailureReason": 'instance_prompt: "photo of my child" has too many tokens',
    "HyperParameters": {"instance_prompt": "photo of my child"},
    "CreationTime": 1764500000.5,
    "SecondaryStatusTransitions": [{"Status": "Starting", "StartTime": 1764500000.25}],
}


def pascal(operation: str) -> str:
    return "".join(word.capitalize() for word in operation.split("_"))


def find(requests: list[AwsRequest], operation: str) -> dict[str, Any]:
    (found,) = [asked.request for asked in requests if asked.operation == operation]
    return dict(found)


@pytest.mark.parametrize("to", [HOOK, TOPIC, MAIL])
def test_aws_takes_every_request(to: str) -> None:
    secret = {"secret": "hook-key", "header": "X-Key"} if to == HOOK else {}
    requests = notification_requests(to, **ACCOUNT, jobs=["toy-", "dreambooth-"], tags={"team": "toys"}, **secret)
    for asked in requests:
        request = json.loads(json.dumps(asked.request))
        request |= {key: ARNS[value] for key, value in request.items() if isinstance(value, str) and value in ARNS}
        for target in request.get("Targets", []):
            target["Arn"] = ARNS.get(target["Arn"], target["Arn"])
        assert refusals(pascal(asked.operation), request, asked.service) == []
    tagged = [asked.operation for asked in requests if "Tags" in asked.request]
    assert tagged == {HOOK: ["create_role", "put_rule"], TOPIC: ["put_rule"], MAIL: ["create_topic", "put_rule"]}[to]


@pytest.mark.parametrize("to", [HOOK, TOPIC])
def test_no_prompt_leaves(to: str) -> None:
    (target,) = find(notification_requests(to, **ACCOUNT), "put_targets")["Targets"]
    event = event_of(DESCRIPTION, {"team": "toys"}, "us-west-2")
    assert "my child" in json.dumps(event)
    message = message_of(target, event)
    assert "my child" not in message
    assert "dreambooth-1: Failed" in message
    if to == HOOK:
        told = json.loads(message)
        assert told.keys() == {"text", "job", "status", "arn", "time", "region", "account"}
        assert (told["job"], told["status"], told["region"]) == ("dreambooth-1", "Failed", "us-west-2")
    else:
        assert "dreambooth-launcher logs dreambooth-1 --region us-west-2" in message


def test_an_event_is_sagemakers() -> None:
    event = event_of(DESCRIPTION, {"team": "toys"}, "us-west-2")
    assert (event["source"], event["resources"]) == ("aws.sagemaker", [DESCRIPTION["TrainingJobArn"]])
    assert event["detail"]["Tags"] == {"team": "toys"}
    assert event["detail"]["CreationTime"] == 1764500000500
    assert event["detail"]["SecondaryStatusTransitions"][0]["StartTime"] == 1764500000250
    assert json.loads(message_of({}, event)) == event


def test_the_rule_and_its_rights_are_as_narrow_as_they_can_be() -> None:
    requests = notification_requests(HOOK, **ACCOUNT, jobs="toy-", statuses=["Failed"], secret="hook-key")
    pattern = json.loads(find(requests, "put_rule")["EventPattern"])
    assert pattern["detail"] == {"TrainingJobStatus": ["Failed"], "TrainingJobName": [{"prefix": "toy-"}]}
    (calling,) = json.loads(find(requests, "put_role_policy")["PolicyDocument"])["Statement"]
    place = "arn:aws:events:us-west-2:123456789012:api-destination/dreambooth-sm-toys/*"
    assert (calling["Action"], calling["Resource"]) == ("events:InvokeApiDestination", place)
    rule = "arn:aws:events:us-west-2:123456789012:rule/dreambooth-sm-toys"
    (trust,) = json.loads(find(requests, "create_role")["AssumeRolePolicyDocument"])["Statement"]
    (publishing,) = json.loads(find(notification_requests(MAIL, **ACCOUNT), "set_topic_attributes")["AttributeValue"])[
        "Statement"
    ]
    for statement in (trust, publishing):
        assert statement["Principal"] == {"Service": "events.amazonaws.com"}
        assert statement["Condition"] == {"ArnEquals": {"aws:SourceArn": rule}}
    key = find(requests, "create_connection")["AuthParameters"]["ApiKeyAuthParameters"]
    assert key == {"ApiKeyName": "Authorization", "ApiKeyValue": SECRET}, "the key itself is in none of them"


def test_everything_that_is_wrong_is_said_at_once() -> None:
    bad = {"jobs": [], "statuses": ["Ended"], "secret": "key", "header": "a b", "tags": {"aws:x": "y"}}
    with pytest.raises(UserError) as caught:
        notification_requests("http://insecure.example", **{**ACCOUNT, "name": "toys"}, **bad)
    said = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 7
    for word in (
        "to: 'http:",
        "name: 'toys'",
        "jobs:",
        "statuses: Ended",
        "secret is for webhooks",
        "header:",
        "aws:x",
    ):
        assert word in said
    with pytest.raises(UserError, match="would be removed with the rule"):
        notification_requests(f"{TOPIC[:-4]}{ACCOUNT['name']}", **ACCOUNT)
    with pytest.raises(UserError, match="use secret") as caught:
        notification_requests("https://me:xyzzy-1@hooks.example", **ACCOUNT)
    assert "xyzzy" not in str(caught.value)
