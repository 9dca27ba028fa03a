"""``launcher.notify``: tells people, or a program, that jobs have ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dreambooth_sm.aws_secrets import secret_text
from dreambooth_sm.errors import UserError
from dreambooth_sm.printing import redact
from launcher.aws.clients import Clients
from launcher.aws.service_errors import Kind, ServiceError, asking
from launcher.events.requests import CONNECTION, DESTINATION, OUR_PREFIX, SECRET, AwsRequest, notification_requests
from launcher.jobs.outputs import ENDED

if TYPE_CHECKING:
    from boto3.session import Session

DEFAULT_NAME = f"{OUR_PREFIX}jobs"
_TAKEN = ("ResourceAlreadyExistsException", "EntityAlreadyExists")
# What takes away what was made, in this order.
_REMOVALS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("events", "delete_rule", ("Name",)),
    ("events", "delete_api_destination", ("Name",)),
    ("events", "delete_connection", ("Name",)),
    ("iam", "delete_role_policy", ("RoleName", "PolicyName")),
    ("iam", "delete_role", ("RoleName",)),
)


def notify(
    to: str,
    *,
    name: str = DEFAULT_NAME,
    jobs: str | Sequence[str] = "dreambooth-",
    statuses: Sequence[str] = ENDED,
    secret: str | None = None,
    header: str = "Authorization",
    tags: Mapping[str, str] | None = None,
    dry_run: bool = False,
    session: Session | None = None,
    log: Callable[[str], None] = print,
) -> list[AwsRequest]:
    """Lets EventBridge tell that jobs have ended: their names, states and ARNs, and neither prompts nor reasons.

    Prints each request before it is sent. The same call again changes what is there, and completes what was
    interrupted.

    Args:
        to: an address of mail, which has to be confirmed; the ARN of a topic of SNS; or ``https://...`` of a webhook,
            which gets JSON with the keys ``text``, ``job``, ``status``, ``arn``, ``time``, ``region``, ``account``.
        name: of the rule and of what is made for it; begins with ``dreambooth-sm-``.
        jobs: what the names of jobs begin with; several are alternatives.
        statuses: some of ``Completed``, ``Failed``, ``Stopped``.
        secret: name of the secret in AWS Secrets Manager whose text a webhook gets as a header.
        header: of that name.
        tags: of rule, topic and role.
        dry_run: only print.
        session: boto3's, for credentials and region; default: the standard AWS settings.
        log: gets each line.

    Returns:
        the requests.

    Raises:
        UserError: with everything that is wrong with the arguments, before anything is made; or AWS refuses a request.
        ServiceError: AWS can't be reached, or not with these credentials.
    """
    clients = Clients(session)
    account, region, partition = _here(clients)
    requests = notification_requests(
        to,
        name=name,
        account=account,
        region=region,
        partition=partition,
        jobs=jobs,
        statuses=statuses,
        secret=secret,
        header=header,
        tags=tags,
    )
    known: dict[str, str] = {}
    if secret is not None and not dry_run:
        known[SECRET] = secret_text("secret", secret, clients("secretsmanager"))
    for asked in requests:
        log(redact(f"{asked.service}.{asked.operation}: {json.dumps(asked.request)}"))
        if not dry_run:
            known |= _send(asked, known, clients)
    return requests


def stop_notifying(name: str = DEFAULT_NAME, *, session: Session | None = None) -> None:
    """Removes what :func:`notify` has made of this name; a topic that was there before stays.

    Raises:
        UserError: the rule was not found.
        ServiceError: AWS can't be reached, or does not remove it.
    """
    if not name.startswith(OUR_PREFIX):
        raise UserError(f"name: {name!r} was not made by launcher.notify, whose names begin with {OUR_PREFIX}")
    clients = Clients(session)
    account, region, partition = _here(clients)
    there = _remove_targets(name, clients)
    for service, operation, fields in _REMOVALS:
        there |= _remove(name, clients(service), operation, dict.fromkeys(fields, name))
    # Of a topic that is not there, SNS says the same as of one that is.
    _remove(name, clients("sns"), "delete_topic", {"TopicArn": f"arn:{partition}:sns:{region}:{account}:{name}"})
    if not there:
        raise UserError(f"rule {name!r} was not found in {region}")


def _here(clients: Clients) -> tuple[str, str, str]:
    """Account, region and partition."""
    with asking("whose account it is can't be told"):
        identity = clients("sts").get_caller_identity()
    return identity["Account"], clients("events").meta.region_name, identity["Arn"].split(":")[1]


def _remove_targets(name: str, clients: Clients) -> bool:
    """Whether there is such a rule, which has none then; topics don't let it publish any more."""
    events = clients("events")
    try:
        with asking(f"the rule {name} can't be looked at"):
            found = events.list_targets_by_rule(Rule=name)["Targets"]
    except ServiceError as error:
        if error.kind is not Kind.MISSING:
            raise
        return False
    for target in found:
        if ":sns:" in target["Arn"] and not target["Arn"].endswith(f":{name}"):
            _withdraw(target["Arn"], name, clients("sns"))
    if found:
        with asking(f"{name} was not removed"):
            events.remove_targets(Rule=name, Ids=[target["Id"] for target in found])
    return True


def _send(asked: AwsRequest, known: Mapping[str, str], clients: Clients) -> dict[str, str]:
    """Sends a request; the ARNs that it is answered with."""
    client, request = clients(asked.service), _filled(asked.request, known)
    if asked.operation == "set_topic_attributes":
        request = _added(request, client)
    try:
        with asking(f"{asked.operation} was refused"):
            answer = getattr(client, asked.operation)(**request)
    except ServiceError as error:
        taken = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") in _TAKEN
        if not (taken and asked.instead):
            raise _explained(asked, error) from error
        answer = _change(asked, request, client)
    if failed := answer.get("FailedEntries"):
        raise UserError(f"EventBridge refuses the target: {failed[0].get('ErrorMessage', failed[0])}")
    return {place: answer[place[1:-1]] for place in (CONNECTION, DESTINATION) if place[1:-1] in answer}


def _explained(asked: AwsRequest, error: ServiceError) -> Exception:
    if error.kind is not Kind.OTHER:
        return error
    return UserError(
        f"{asked.service}.{asked.operation} is refused: {error.reason}; put that right, and make the same call again"
    )


def _change(asked: AwsRequest, request: dict[str, Any], client: Any) -> dict[str, Any]:
    """Changes what is there already."""
    assert asked.instead is not None
    if asked.instead == "update_assume_role_policy":
        request = {"RoleName": request["RoleName"], "PolicyDocument": request["AssumeRolePolicyDocument"]}
    with asking(f"{asked.instead} was refused"):
        return dict(getattr(client, asked.instead)(**request))


def _added(request: dict[str, Any], sns: Any) -> dict[str, Any]:
    """The topic's policy with one statement more, or another one of its name."""
    with asking("the topic can't be looked at"):
        found = sns.get_topic_attributes(TopicArn=request["TopicArn"])["Attributes"]
    policy, wanted = json.loads(found.get("Policy", "{}")), json.loads(request["AttributeValue"])
    (ours,) = wanted["Statement"]
    others = [each for each in policy.get("Statement", []) if each.get("Sid") != ours["Sid"]]
    return {**request, "AttributeValue": json.dumps({**wanted, **policy, "Statement": [*others, ours]})}


def _withdraw(topic: str, name: str, sns: Any) -> None:
    """Takes a statement out of a topic's policy."""
    with asking(f"the policy of {topic} was not changed"):
        policy = json.loads(sns.get_topic_attributes(TopicArn=topic)["Attributes"].get("Policy", "{}"))
        kept = [each for each in policy.get("Statement", []) if each.get("Sid") != name]
        if kept and kept != policy["Statement"]:
            value = json.dumps({**policy, "Statement": kept})
            sns.set_topic_attributes(TopicArn=topic, AttributeName="Policy", AttributeValue=value)


def _filled(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(each, known) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, known) for each in value]
    return known.get(value, value) if isinstance(value, str) else value


def _remove(name: str, client: Any, operation: str, request: Mapping[str, str]) -> bool:
    """Removes something; whether it was there."""
    try:
        with asking(f"{name} was not removed: {operation}"):
            getattr(client, operation)(**request)
    except ServiceError as error:
        if error.kind is not Kind.MISSING:
            raise
        return False
    return operation != "delete_rule"  # which EventBridge does of any name
