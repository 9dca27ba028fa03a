"""The registry of the embedded SageMaker: what a job has trained is registered, approved and deployed."""

from __future__ import annotations

import json
import re
import shlex
import uuid
from pathlib import Path
from typing import Any

import boto3
import pytest

import launcher
from dreambooth_sm.errors import UserError
from launcher.aws.clients import Clients
from launcher.aws.iam import notebook_policy, registry_policy
from launcher.cli import main
from launcher.jobs.job import Job
from launcher.local.services import EmbeddedServices
from tests.helpers.api import refusals
from tests.helpers.services import Workplace

TAGS = [{"Key": "team", "Value": "toys"}]


@pytest.fixture(scope="module")
def job(services: EmbeddedServices, pictures: Path, tiny_base: Path) -> Job:
    """One that has ended, with its model as plain files."""
    values = {"class_prompt": "None", "validation_prompt": "a toy", "validation_guidance_scale": "1"}
    return Workplace(services).train(pictures, tiny_base, values, Tags=TAGS).wait(lambda line: None)


@pytest.fixture
def group() -> str:
    return f"toys-{uuid.uuid4().hex[:8]}"


def test_what_a_job_has_trained_is_registered_approved_and_deployed(
    services: EmbeddedServices, job: Job, group: str
) -> None:
    session, sent, asked = boto3.Session(), dict[str, Any](), set[str]()

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        asked.add(f"sagemaker:{model.name}")
        sent[model.name] = json.loads(params["body"])

    session.events.register("before-call.sagemaker", note)
    package = Job(job.name, Clients(session)).register(group)
    for operation in ("CreateModelPackageGroup", "CreateModelPackage"):
        assert refusals(operation, sent[operation]) == []
    assert package.arn.endswith(f":model-package/{group}/1")
    assert package.approval == "PendingManualApproval"
    sagemaker = services.clients()("sagemaker")
    found = package.describe()
    assert found["SourceUri"] == job.describe()["TrainingJobArn"]
    assert found["CustomerMetadataProperties"]["instance_prompt"] == "photo of zwx toy"
    card = json.loads(found["ModelCard"]["ModelCardContent"])
    pictures = card["additional_information"]["custom_details"]
    assert pictures["picture 1, before training"] != pictures["picture 1, after training"]
    for name in ("picture 1, before training", "picture 1, after training", "subject", "report"):
        bucket, _, key = pictures[name].removeprefix("s3://").partition("/")
        assert services.clients()("s3").head_object(Bucket=bucket, Key=key)["ContentLength"] > 0
    arn = sagemaker.describe_model_package_group(ModelPackageGroupName=group)["ModelPackageGroupArn"]
    assert sagemaker.list_tags(ResourceArn=arn)["Tags"] == TAGS, "those of the job"

    with pytest.raises(UserError, match="is PendingManualApproval; approve it first"):
        launcher.deploy(package.arn, instance_type="ml.g5.xlarge", log=lambda line: None)
    package.approve("looks like zwx")
    assert package.describe()["ApprovalDescription"] == "looks like zwx"
    with launcher.deploy(
        package.arn, instance_type="ml.g5.xlarge", tags={"team": "toys"}, log=lambda line: None
    ) as endpoint:
        assert endpoint.draw("photo of zwx toy", steps=1, width=32, height=32)[0].size == (32, 32)
        configuration = endpoint.describe()["EndpointConfigName"]  # type: ignore[attr-defined]
        model = sagemaker.describe_model(ModelName=configuration)
        assert model["PrimaryContainer"]["Image"] == "dreambooth-sm:test"
        assert TAGS[0] in sagemaker.list_tags(ResourceArn=model["ModelArn"])["Tags"]
    statements = [*notebook_policy("models")["Statement"], *registry_policy()["Statement"]]
    assert asked <= {action for statement in statements for action in statement["Action"]}


def test_versions_follow_each_other_in_a_group_that_is_there(
    services: EmbeddedServices, job: Job, group: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sagemaker = services.clients()("sagemaker")
    sagemaker.create_model_package_group(ModelPackageGroupName=group)
    assert main(["register", job.name, group, "--approval", "Approved"]) == 0
    first = capsys.readouterr().out.split()[-1]
    second = job.register(group, approval="Rejected")
    assert [first[-2:], second.arn[-2:]] == ["/1", "/2"]
    listed = sagemaker.list_model_packages(ModelPackageGroupName=group)["ModelPackageSummaryList"]
    assert [(each["ModelPackageVersion"], each["ModelApprovalStatus"]) for each in listed] == [
        (2, "Rejected"),
        (1, "Approved"),
    ]
    arn = sagemaker.describe_model_package_group(ModelPackageGroupName=group)["ModelPackageGroupArn"]
    assert sagemaker.list_tags(ResourceArn=arn)["Tags"] == [], "it is not the launcher's"
    with pytest.raises(sagemaker.exceptions.ClientError, match="contains Model Packages"):
        sagemaker.delete_model_package_group(ModelPackageGroupName=group)
    for package in (first, second.arn):
        sagemaker.delete_model_package(ModelPackageName=package)
    sagemaker.delete_model_package_group(ModelPackageGroupName=group)
    with pytest.raises(launcher.ServiceError, match="does not exist"):
        second.describe()


def test_the_commands_are_those_of_the_document(job: Job, group: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = (Path(__file__).parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    for line in block.replace("zwx-20261130", job.name).replace(" toys ", f" {group} ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "dreambooth-launcher"
        if arguments[0] == "deploy":
            arguments[1] = capsys.readouterr().out.split()[-1]
            arguments += ["--name", group]
        assert main(arguments) == 0, line
    endpoint = launcher.attach_endpoint(group)
    assert endpoint.draw("photo of zwx toy", steps=1, width=32, height=32)[0].size == (32, 32)
    endpoint.delete()


def test_what_can_not_be_registered_is_refused(services: EmbeddedServices, job: Job, group: str) -> None:
    with pytest.raises(UserError, match="approval: 'maybe'"):
        job.register(group, approval="maybe")
    with pytest.raises(UserError, match="no-such-bucket-of-anybody/base: the bucket does not exist"):
        job.register(group, base_model="s3://no-such-bucket-of-anybody/base")
    sagemaker = services.clients()("sagemaker")
    for broken, said in (
        ({"Tags": TAGS, "ModelPackageGroupName": group}, "tag the group"),
        ({"ModelPackageGroupName": group}, "does not exist"),
        ({"ModelPackageGroupName": group, "ModelCard": {"ModelCardContent": '{"x": 1}'}}, "not of the schema"),
    ):
        with pytest.raises(sagemaker.exceptions.ClientError, match=said):
            sagemaker.create_model_package(**broken)
