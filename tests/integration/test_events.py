"""Jobs of the embedded SageMaker that have ended are told of, as rules say it."""

from __future__ import annotations

import json
import re
import shlex
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

import launcher
from dreambooth_sm.errors import UserError
from launcher.aws.iam import events_policy
from launcher.cli import main
from launcher.local.services import embedded_services
from tests.helpers.services import eventually

NAME, HOOK = "dreambooth-sm-hook", "https://hooks.example/T1"
PROMPT = {"instance_prompt": "photo of my child"}


@pytest.fixture(autouse=True, scope="module")
def _services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Services whose jobs fail or not as their hyperparameter ``code`` says; they are this process's AWS."""
    program = tmp_path_factory.mktemp("program") / "train.py"
    program.write_text(
        "import json, os, sys\n"
        "config = os.environ['SAGEMAKER_BASE_DIR'] + '/input/config/hyperparameters.json'\n"
        "sys.exit(int(json.load(open(config)).get('code', 0)))\n"
    )
    with embedded_services(entrypoint=program) as services, pytest.MonkeyPatch.context() as environment:
        for name, value in services.environment("us-west-2").items():
            environment.setenv(name, value)
        boto3.setup_default_session()
        yield
    boto3.DEFAULT_SESSION = None


def bucket() -> str:
    name = f"models-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    return f"s3://{name}"


@contextmanager
def webhook() -> Iterator[tuple[str, list[tuple[dict[str, str], Any]]]]:
    """A server, and what it was sent: headers and JSON."""
    got: list[tuple[dict[str, str], Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((dict(self.headers), json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        server.server_close()


def train(name: str, code: int = 0) -> None:
    values = {**PROMPT, "code": str(code)}
    boto3.client("sagemaker").create_training_job(
        TrainingJobName=name,
        AlgorithmSpecification={"TrainingImage": "image", "TrainingInputMode": "File"},
        RoleArn="arn:aws:iam::123456789012:role/train",
        HyperParameters=values,
        OutputDataConfig={"S3OutputPath": bucket()},
        ResourceConfig={"InstanceType": "ml.g5.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 1},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
    )


def test_a_webhook_is_told_of_ended_jobs_and_of_nothing_else() -> None:
    boto3.client("secretsmanager").create_secret(Name="hook-key", SecretString="Bearer xyzzy-1")
    session, asked, said = boto3.Session(), set[str](), list[str]()
    session.events.register("before-call", lambda model, **_: asked.add(_permission(model)))
    options: dict[str, Any] = {"name": NAME, "secret": "hook-key", "tags": {"team": "toys"}}
    launcher.notify(HOOK, **options, dry_run=True, log=said.append)
    events = boto3.client("events")
    with pytest.raises(ClientError):
        events.describe_rule(Name=NAME)
    launcher.notify(HOOK, **options, session=session, log=said.append)
    launcher.notify(HOOK, **options, session=session, log=said.append)  # it is there
    assert "xyzzy" not in " ".join(said)
    assert boto3.client("iam").list_role_tags(RoleName=NAME)["Tags"] == [{"Key": "team", "Value": "toys"}]
    with webhook() as (address, got):
        events.update_api_destination(Name=NAME, InvocationEndpoint=address, HttpMethod="POST")
        train("dreambooth-good")
        train("dreambooth-bad", code=3)
        train("another")
        eventually(lambda: len(got) == 2)
        told = {body["job"]: body for _, body in got}
        assert {name: body["status"] for name, body in told.items()} == {
            "dreambooth-good": "Completed",
            "dreambooth-bad": "Failed",
        }
        assert all(headers["Authorization"] == "Bearer xyzzy-1" for headers, _ in got)
        assert "my child" not in json.dumps([body for _, body in got])
        events.remove_targets(Rule=NAME, Ids=["told"])  # as an interrupted call leaves it
        events.delete_rule(Name=NAME)
        launcher.stop_notifying(NAME, session=session)
        train("dreambooth-after")
        eventually(lambda: _ended(3))
        assert len(got) == 2
    with pytest.raises(ClientError):
        events.describe_rule(Name=NAME)
    for left in (
        events.list_connections(NamePrefix=NAME)["Connections"],
        events.list_api_destinations(NamePrefix=NAME)["ApiDestinations"],
        [role for role in boto3.client("iam").list_roles()["Roles"] if role["RoleName"] == NAME],
    ):
        assert left == []
    with pytest.raises(UserError, match="was not found in us-west-2"):
        launcher.stop_notifying(NAME)
    allowed = {action.lower() for statement in events_policy()["Statement"] for action in statement["Action"]}
    assert {each for each in asked if not each.startswith(("sts:", "secretsmanager:"))} <= allowed


def test_a_topic_is_told_and_keeps_its_own_policy(capsys: pytest.CaptureFixture[str]) -> None:
    sns, sqs = boto3.client("sns"), boto3.client("sqs")
    topic = sns.create_topic(Name="mine")["TopicArn"]
    before = json.loads(sns.get_topic_attributes(TopicArn=topic)["Attributes"]["Policy"])["Statement"]
    queue = sqs.create_queue(QueueName="told")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    sns.subscribe(TopicArn=topic, Protocol="sqs", Endpoint=arn)
    assert main(["notify", topic, "--jobs", "toy-", "--statuses", "Failed"]) == 0
    assert main(["notify", topic, "--jobs", "toy-", "--statuses", "Failed"]) == 0
    after = json.loads(sns.get_topic_attributes(TopicArn=topic)["Attributes"]["Policy"])["Statement"]
    assert [each for each in after if each.get("Sid") != "dreambooth-sm-jobs"] == before
    assert len(after) == len(before) + 1
    train("toy-good")
    train("toy-bad", code=3)
    (message,) = eventually(lambda: sqs.receive_message(QueueUrl=queue).get("Messages"))
    assert json.loads(message["Body"])["Message"].startswith("toy-bad: Failed at 20")
    assert main(["stop_notifying"]) == 0
    assert topic in [each["TopicArn"] for each in sns.list_topics()["Topics"]], "it is not the launcher's"
    assert json.loads(sns.get_topic_attributes(TopicArn=topic)["Attributes"]["Policy"])["Statement"] == before
    assert "is removed" in capsys.readouterr().out
    sns.delete_topic(TopicArn=topic)


def test_the_commands_are_those_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    sns = boto3.client("sns")
    topic = sns.create_topic(Name="mine")["TopicArn"]
    document = (Path(__file__).parents[2] / "docs" / "events.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    for line in block.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "dreambooth-launcher"
        assert main(arguments) == 0, line
    printed = capsys.readouterr().out
    assert f'sns.subscribe: {{"TopicArn": "{topic.removesuffix("mine")}dreambooth-sm-jobs"' in printed
    assert boto3.client("events").list_rules()["Rules"] == []
    sns.delete_topic(TopicArn=topic)


def test_mail_needs_a_topic_which_goes_with_the_rule() -> None:
    launcher.notify("me@toys.example", tags={"team": "toys"}, log=lambda line: None)
    sns = boto3.client("sns")
    (topic,) = [each["TopicArn"] for each in sns.list_topics()["Topics"]]
    (subscription,) = sns.list_subscriptions_by_topic(TopicArn=topic)["Subscriptions"]
    assert (subscription["Protocol"], subscription["Endpoint"]) == ("email", "me@toys.example")
    assert sns.list_tags_for_resource(ResourceArn=topic)["Tags"] == [{"Key": "team", "Value": "toys"}]
    launcher.stop_notifying()
    assert sns.list_topics()["Topics"] == []


def _ended(jobs: int) -> bool:
    found = boto3.client("sagemaker").list_training_jobs(NameContains="dreambooth-")["TrainingJobSummaries"]
    return len(found) == jobs and all(each["TrainingJobStatus"] in ("Completed", "Failed") for each in found)


def _permission(operation: Any) -> str:
    signed = operation.service_model.metadata.get("signingName") or operation.service_model.metadata["endpointPrefix"]
    return f"{signed}:{operation.name}".lower()
