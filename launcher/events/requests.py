"""The requests that make a notification, in their order; pure, but for ARNs that AWS makes up.

SageMaker's event about a job holds all of its description: hyperparameters, and so prompts. The rule's input
transformer lets through what :data:`TOLD` names, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.errors import Problems
from dreambooth_sm.printing import has_userinfo
from launcher.jobs.outputs import ENDED
from launcher.training_request import refused_tags

DETAIL_TYPE = "SageMaker Training Job State Change"
# What leaves the rule, by the names that its texts have for it. No reason of a failure: it may quote a prompt.
TOLD = {
    "job": "$.detail.TrainingJobName",
    "status": "$.detail.TrainingJobStatus",
    "arn": "$.detail.TrainingJobArn",
    "time": "$.time",
    "region": "$.region",
    "account": "$.account",
}
# In the place of what AWS answers, or a secret holds.
CONNECTION, DESTINATION, SECRET = "<ConnectionArn>", "<ApiDestinationArn>", "<secret>"
# Names begin so: policies say it.
OUR_PREFIX = "dreambooth-sm-"
_NAME = re.compile(rf"{OUR_PREFIX}[A-Za-z0-9_-]{{1,{64 - len(OUR_PREFIX)}}}")
_TOPIC = re.compile(r"arn:aws[a-z-]*:sns:[a-z0-9-]+:\d{12}:[A-Za-z0-9_-]{1,256}")
_MAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")
_HEADER = re.compile(r"[A-Za-z0-9-]{1,128}")
_TARGET = "told"
# EventBridge wants a header of every webhook; this is one that nobody asks for.
_HARMLESS = ("X-Sent-By", "dreambooth-sm")


@dataclass(frozen=True)
class AwsRequest:
    """One request.

    Attributes:
        service, operation: as boto3 calls them.
        instead: the operation that changes what is there already, where the first one would be refused.
    """

    service: str
    operation: str
    request: Mapping[str, Any]
    instead: str | None = None


def notification_requests(
    to: str,
    *,
    name: str,
    account: str,
    region: str,
    partition: str = "aws",
    jobs: str | Sequence[str] = "dreambooth-",
    statuses: Sequence[str] = ENDED,
    secret: str | None = None,
    header: str = "Authorization",
    tags: Mapping[str, str] | None = None,
) -> list[AwsRequest]:
    """The requests that make, or change, one notification; for the arguments see :func:`launcher.notify`.

    Args:
        account, region, partition: where jobs run.

    Raises:
        UserError: with everything that AWS would refuse.
    """
    prefixes = [jobs] if isinstance(jobs, str) else list(jobs)
    _check(to, name, prefixes, statuses, secret, header, tags or {})
    labels = [{"Key": key, "Value": value} for key, value in (tags or {}).items()]
    tagged = {"Tags": labels} if labels else {}
    rule_arn = f"arn:{partition}:events:{region}:{account}:rule/{name}"
    requests: list[AwsRequest] = []
    target: dict[str, Any] = {"Id": _TARGET, "InputTransformer": _transformer(to)}
    if _is_webhook(to):
        role = f"arn:{partition}:iam::{account}:role/{name}"
        requests += _webhook(to, name, f"arn:{partition}:events:{region}:{account}", rule_arn, secret, header, tagged)
        target |= {"Arn": DESTINATION, "RoleArn": role}
    else:
        topic = to if _TOPIC.fullmatch(to) else f"arn:{partition}:sns:{region}:{account}:{name}"
        if topic != to:
            requests.append(AwsRequest("sns", "create_topic", {"Name": name, **tagged}))
        requests.append(AwsRequest("sns", "set_topic_attributes", _publishing(topic, name, rule_arn)))
        if _MAIL.fullmatch(to):
            requests.append(AwsRequest("sns", "subscribe", {"TopicArn": topic, "Protocol": "email", "Endpoint": to}))
        target["Arn"] = topic
    detail = {"TrainingJobStatus": list(statuses), "TrainingJobName": [{"prefix": each} for each in prefixes]}
    pattern = {"source": ["aws.sagemaker"], "detail-type": [DETAIL_TYPE], "detail": detail}
    rule = {"Name": name, "EventPattern": json.dumps(pattern), "Description": "Tells that jobs of dreambooth-sm ended"}
    return [
        *requests,
        AwsRequest("events", "put_rule", {**rule, **tagged}),
        AwsRequest("events", "put_targets", {"Rule": name, "Targets": [target]}),
    ]


def _is_webhook(to: str) -> bool:
    return to.startswith("https://")


def _check(
    to: str,
    name: str,
    prefixes: Sequence[str],
    statuses: Sequence[str],
    secret: str | None,
    header: str,
    tags: Mapping[str, str],
) -> None:
    problems = Problems()
    if has_userinfo(to):
        problems.found.append("to holds a user's name or password, which the rule's destination would show; use secret")
    elif not (_is_webhook(to) or _TOPIC.fullmatch(to) or _MAIL.fullmatch(to)):
        problems.found.append(
            f"to: {to!r} is not valid; set an address of mail, the ARN of a topic of SNS, or https://... of a webhook"
        )
    if not _NAME.fullmatch(name):
        problems.found.append(
            f"name: {name!r} is not valid; set {OUR_PREFIX} and letters, digits, - or _, at most 64 in all"
        )
    if to.endswith(f":{name}"):
        problems.found.append(f"name: {name} is the topic's, which would be removed with the rule; set another name")
    if not prefixes or any(not isinstance(each, str) or len(each) > 63 for each in prefixes):
        problems.found.append("jobs: set what the names of jobs begin with; '' for all")
    if odd := [each for each in statuses if each not in ENDED] or ([] if statuses else ["nothing"]):
        problems.found.append(f"statuses: {', '.join(odd)}: set some of {', '.join(ENDED)}")
    if secret is not None and not _is_webhook(to):
        problems.found.append("secret is for webhooks; leave it out, or set to to https://...")
    if not _HEADER.fullmatch(header):
        problems.found.append(f"header: {header!r} is not the name of a header")
    problems.found += refused_tags(tags)
    problems.raise_any()


def _transformer(to: str) -> dict[str, Any]:
    said = "<job>: <status>"
    if _is_webhook(to):
        template = json.dumps({"text": said, **{name: f"<{name}>" for name in TOLD}})
    else:
        template = json.dumps(f"{said} at <time>. Its log: dreambooth-launcher logs <job> --region <region>")
    return {"InputPathsMap": TOLD, "InputTemplate": template}


def _webhook(
    to: str, name: str, events: str, rule_arn: str, secret: str | None, header: str, tagged: Mapping[str, Any]
) -> list[AwsRequest]:
    """A webhook as EventBridge knows it, and the role that may call it, and nothing else."""
    key, value = (header, SECRET) if secret is not None else _HARMLESS
    authorization = {
        "Name": name,
        "AuthorizationType": "API_KEY",
        "AuthParameters": {"ApiKeyAuthParameters": {"ApiKeyName": key, "ApiKeyValue": value}},
    }
    destination = {"Name": name, "ConnectionArn": CONNECTION, "InvocationEndpoint": to, "HttpMethod": "POST"}
    trust = {
        "Effect": "Allow",
        "Principal": {"Service": "events.amazonaws.com"},
        "Action": "sts:AssumeRole",
        "Condition": {"ArnEquals": {"aws:SourceArn": rule_arn}},
    }
    calling = {
        "Effect": "Allow",
        "Action": "events:InvokeApiDestination",
        "Resource": f"{events}:api-destination/{name}/*",
    }
    role = {"RoleName": name, "AssumeRolePolicyDocument": _policy(trust), **tagged}
    return [
        AwsRequest("events", "create_connection", authorization, "update_connection"),
        AwsRequest("events", "create_api_destination", destination, "update_api_destination"),
        AwsRequest("iam", "create_role", role, "update_assume_role_policy"),
        AwsRequest(
            "iam", "put_role_policy", {"RoleName": name, "PolicyName": name, "PolicyDocument": _policy(calling)}
        ),
    ]


def _publishing(topic: str, name: str, rule_arn: str) -> dict[str, Any]:
    """Lets the rule, and nothing else of EventBridge's, publish to the topic."""
    statement = {
        "Sid": name,
        "Effect": "Allow",
        "Principal": {"Service": "events.amazonaws.com"},
        "Action": "sns:Publish",
        "Resource": topic,
        "Condition": {"ArnEquals": {"aws:SourceArn": rule_arn}},
    }
    return {"TopicArn": topic, "AttributeName": "Policy", "AttributeValue": _policy(statement)}


def _policy(statement: Mapping[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})
