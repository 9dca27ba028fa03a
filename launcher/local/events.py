"""Events of the embedded SageMaker: what EventBridge is told of each change of a job, and what its rules make of it.

moto keeps rules, targets and destinations; it delivers to fewer places than rules have here.
"""

from __future__ import annotations

import json
import sys
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from dreambooth_sm.background import Background
from launcher.events.requests import DETAIL_TYPE
from launcher.local.answers import ACCOUNT
from launcher.local.clients import EmbeddedClients
from launcher.local.s3 import EmbeddedS3

# Seconds that a webhook may take.
_PATIENCE = 10.0


class EmbeddedEvents:
    """Tells rules of changes, one after another, beside what changes.

    Args:
        server: that queues and topics are on.
    """

    def __init__(self, server: EmbeddedS3) -> None:
        self._server = server
        self._background: Background[tuple[dict[str, Any], str]] | None = None

    def tell(self, description: Mapping[str, Any], tags: Mapping[str, str], region: str) -> None:
        """Takes a description of a training job, and returns at once."""
        if _backend(region) is None:
            return
        if self._background is None:
            self._background = Background("events", self._deliver)
            self._background.start()
        self._background.add((event_of(description, tags, region), region))

    def close(self) -> None:
        """Waits until everything is delivered."""
        if self._background:
            self._background.close()

    def _deliver(self, item: tuple[dict[str, Any], str]) -> None:
        event, region = item
        for target in list(_targets(event, region)):
            with suppress(Exception):  # EventBridge drops what can't be delivered
                self._send(target, event, region)

    def _send(self, target: Mapping[str, Any], event: Mapping[str, Any], region: str) -> None:
        clients, arn, message = EmbeddedClients(self._server, region=region), target["Arn"], message_of(target, event)
        _, _, service, _, _, name = arn.split(":", 5)
        if service == "sqs":
            url = clients("sqs").get_queue_url(QueueName=name)["QueueUrl"]
            clients("sqs").send_message(QueueUrl=url, MessageBody=message)
        elif service == "sns":
            clients("sns").publish(TopicArn=arn, Message=message)
        elif name.startswith("api-destination/"):
            _call(name.split("/")[1], message, region)


def event_of(description: Mapping[str, Any], tags: Mapping[str, str], region: str) -> dict[str, Any]:
    """SageMaker's event about a job: all of its description, with times in milliseconds."""
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": DETAIL_TYPE,
        "source": "aws.sagemaker",
        "account": ACCOUNT,
        "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "region": region,
        "resources": [description["TrainingJobArn"]],
        "detail": {**_in_milliseconds(description), "Tags": dict(tags)},
    }


def _in_milliseconds(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {key: _in_milliseconds(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_in_milliseconds(each) for each in value]
    return round(value * 1000) if isinstance(value, float) and name.endswith("Time") else value


def message_of(target: Mapping[str, Any], event: Mapping[str, Any]) -> str:
    """What a target gets: the event, or what its input transformer lets through."""
    transformer = target.get("InputTransformer")
    if transformer is None:
        return json.dumps(event)
    text = str(transformer["InputTemplate"])
    for name, path in transformer.get("InputPathsMap", {}).items():
        value: Any = event
        for key in path.removeprefix("$.").split("."):
            value = value.get(key, "") if isinstance(value, Mapping) else ""
        text = text.replace(f"<{name}>", value if isinstance(value, str) else json.dumps(value))
    with suppress(ValueError):
        if isinstance(plain := json.loads(text), str):
            return plain
    return text


def _backend(region: str) -> Any:
    """What moto knows of EventBridge; None where nobody has asked for it yet."""
    module = sys.modules.get("moto.events.models")
    return module.events_backends[ACCOUNT][region] if module else None


def _targets(event: Mapping[str, Any], region: str) -> Iterator[Mapping[str, Any]]:
    for rule in list(_backend(region).event_buses["default"].rules.values()):
        if rule.state == "ENABLED" and rule.event_pattern and rule.event_pattern.matches_event(event):
            yield from rule.targets


def _call(name: str, message: str, region: str) -> None:
    """Calls a webhook, with the header of its connection."""
    backend = _backend(region)
    destination = backend.destinations[name]
    connection = next(each for each in backend.connections.values() if each.arn == destination.connection_arn)
    key = connection.auth_parameters.get("ApiKeyAuthParameters", {})
    headers = {"Content-Type": "application/json", **({key["ApiKeyName"]: key["ApiKeyValue"]} if key else {})}
    request = urllib.request.Request(
        destination.invocation_endpoint, message.encode(), headers, method=destination.http_method
    )
    with urllib.request.urlopen(request, timeout=_PATIENCE):
        pass
