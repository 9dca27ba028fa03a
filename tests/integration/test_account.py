"""The account that a job runs in: its role, its default bucket, and what becomes of a request that is not taken."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ReadTimeoutError
from botocore.stub import Stubber
from hypothesis import given
from hypothesis import strategies as st

import launcher
from dreambooth_sm.errors import UserError
from launcher import submit
from launcher.aws.account import Account
from launcher.aws.advice import advice_for
from launcher.aws.clients import Clients
from launcher.aws.roles import trusts_sagemaker
from launcher.aws.service_errors import Kind
from launcher.local.services import EmbeddedServices
from launcher.resources import Resources

ACCOUNT = "123456789012"
PROMPT = {"instance_prompt": "photo of zwx toy", "resolution": 64}


class Stubbed(Clients):
    """Clients of an account of which nothing is known but what a test says."""

    def __init__(self, region: str = "us-east-1") -> None:
        super().__init__(boto3.Session("key", "secret", region_name=region))
        self.stubs: dict[str, Stubber] = {}

    def stub(self, service: str) -> Stubber:
        if service not in self.stubs:
            self.stubs[service] = Stubber(self(service))
            self.stubs[service].activate()
        return self.stubs[service]

    def am(self, arn: str) -> Stubbed:
        answer = {"Account": ACCOUNT, "Arn": arn, "UserId": "me"}
        self.stub("sts").add_response("get_caller_identity", answer)
        return self

    def role(self, arn: str, trust: Any = None) -> Stubbed:
        name = arn.rpartition("/")[2]
        role = {"Arn": arn, "RoleName": name, "Path": "/", "RoleId": "x" * 16, "CreateDate": 0}
        role["AssumeRolePolicyDocument"] = json.dumps(trust or {"Statement": allow()})
        self.stub("iam").add_response("get_role", {"Role": role}, {"RoleName": name})
        return self

    def refuse(self, service: str, operation: str, code: str, status: int = 400) -> Stubbed:
        self.stub(service).add_client_error(operation, code, f"{code} it is", status)
        return self


def allow(**more: Any) -> dict[str, Any]:
    return {
        "Effect": "Allow",
        "Principal": {"Service": "sagemaker.amazonaws.com"},
        "Action": "sts:AssumeRole",
        **more,
    }


def deny(**more: Any) -> dict[str, Any]:
    return {**allow(), "Effect": "Deny", **more}


ME = f"arn:aws:iam::{ACCOUNT}:user/me"
SSO = f"arn:aws:sts::{ACCOUNT}:assumed-role/AWSReservedSSO_Power_0123456789abcdef/me"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/teams/toys/train"


# --- Where the role is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "answers", "role"),
    [
        ({"ExecutionRoleArn": ROLE, "DomainId": "d-1"}, {}, ROLE),
        ({"ResourceName": "notes"}, {"describe_notebook_instance": {"RoleArn": ROLE}}, ROLE),
        (
            {"ResourceName": "default", "DomainId": "d-1", "UserProfileName": "me"},
            {"describe_user_profile": {"UserSettings": {"ExecutionRole": ROLE}}},
            ROLE,
        ),
        (
            {"ResourceName": "default", "DomainId": "d-1", "UserProfileName": "me"},
            {
                "describe_user_profile": {"UserSettings": {}},
                "describe_domain": {"DefaultUserSettings": {"ExecutionRole": ROLE}},
            },
            ROLE,
        ),
        (
            {"DomainId": "d-1", "SpaceName": "ours", "ResourceName": "default"},
            {
                "describe_space": {"SpaceSharingSettings": {"SharingType": "Shared"}},
                "describe_domain": {
                    "DefaultUserSettings": {"ExecutionRole": f"{ROLE}-not"},
                    "DefaultSpaceSettings": {"ExecutionRole": ROLE},
                },
            },
            ROLE,
        ),
        (
            {"DomainId": "d-1", "SpaceName": "mine", "ResourceName": "default"},
            {
                "describe_space": {
                    "SpaceSharingSettings": {"SharingType": "Private"},
                    "OwnershipSettings": {"OwnerUserProfileName": "me"},
                },
                "describe_user_profile": {"UserSettings": {"ExecutionRole": ROLE}},
            },
            ROLE,
        ),
    ],
)
def test_a_notebooks_role_is_asked_for(
    metadata: dict[str, Any], answers: dict[str, Any], role: str, tmp_path: Path
) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    clients = Stubbed()
    for operation, answer in answers.items():
        clients.stub("sagemaker").add_response(operation, answer)
    assert Account(clients, tmp_path / "metadata.json").find_role() == role
    for stub in clients.stubs.values():
        stub.assert_no_pending_responses()


def test_where_the_profile_may_not_be_asked_for_it_is_the_assumed_role(tmp_path: Path) -> None:
    metadata = {"ResourceName": "default", "DomainId": "d-1", "UserProfileName": "me"}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    clients = Stubbed().refuse("sagemaker", "describe_user_profile", "AccessDeniedException")
    clients.am(f"arn:aws:sts::{ACCOUNT}:assumed-role/train/SageMaker").role(ROLE)
    assert Account(clients, tmp_path / "metadata.json").find_role() == ROLE


@pytest.mark.parametrize(
    ("name", "arn"),
    [
        ("train", f"arn:aws-cn:iam::{ACCOUNT}:role/train"),
        ("AmazonSageMaker-ExecutionRole-20261122", f"arn:aws-cn:iam::{ACCOUNT}:role/service-role/"
         "AmazonSageMaker-ExecutionRole-20261122"),
    ],
)  # fmt: skip
def test_a_path_that_may_not_be_asked_for_is_guessed_with_a_warning(name: str, arn: str, tmp_path: Path) -> None:
    clients = (
        Stubbed().am(f"arn:aws-cn:sts::{ACCOUNT}:assumed-role/{name}/me").refuse("iam", "get_role", "AccessDenied")
    )
    account = Account(clients, tmp_path / "nothing")
    assert account.find_role() == arn
    (warning,) = account.warnings
    assert "its path can't be asked for" in warning
    assert arn in warning


@pytest.mark.parametrize("who", [ME, SSO])
def test_a_person_gets_the_role_that_the_policies_speak_of(who: str, tmp_path: Path) -> None:
    arn = f"arn:aws:iam::{ACCOUNT}:role/dreambooth-sm"
    assert Account(Stubbed().am(who).role(arn), tmp_path / "nothing").find_role() == arn
    with pytest.raises(UserError, match=r"role is missing, .* set role='NAME'"):
        Account(Stubbed().am(who).refuse("iam", "get_role", "NoSuchEntity", 404), tmp_path / "nothing").find_role()


def test_a_role_by_its_name() -> None:
    assert Account(Stubbed().role(ROLE)).complete_role("train") == ROLE
    assert Account(Stubbed()).complete_role(ROLE) == ROLE
    assert Account(Stubbed().am(ME)).complete_role("teams/toys/train") == ROLE
    with pytest.raises(UserError, match="there is no role 'trian' in this account"):
        Account(Stubbed().refuse("iam", "get_role", "NoSuchEntity", 404)).complete_role("trian")


# --- Which role may be used ------------------------------------------------------------------------------------------


def check_role(clients: Stubbed, arn: str) -> Account:
    account = Account(clients.am(ME))
    account._check_role(arn)
    return account


def test_a_role_that_passes() -> None:
    assert check_role(Stubbed().role(ROLE), ROLE).warnings == []
    assert (
        "can't be checked: AccessDenied"
        in check_role(Stubbed().refuse("iam", "get_role", "AccessDenied"), ROLE).warnings[0]
    )


@pytest.mark.parametrize(
    ("arn", "clients", "words"),
    [
        (f"arn:aws:iam::{ACCOUNT}:role/train", Stubbed().role(ROLE), f"the role of this name is {ROLE}"),
        (ROLE.replace("toys", "cars"), Stubbed().role(ROLE), f"the role of this name is {ROLE}"),
        (ROLE.replace(ACCOUNT, "210987654321"), Stubbed(), "belongs to another account"),
        (
            f"arn:aws:iam::{ACCOUNT}:role/aws-reserved/sso.amazonaws.com/eu-west-1/AWSReservedSSO_Power_01",
            Stubbed(),
            r"Identity Center \(SSO\)",
        ),
        (f"arn:aws:iam::{ACCOUNT}:role/AWSReservedSSO_Power_01", Stubbed(), r"Identity Center \(SSO\)"),
        (f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/sagemaker.amazonaws.com/x", Stubbed(), "one of its services"),
        (ROLE, Stubbed().role(ROLE, {"Statement": [allow(), deny()]}), "does not trust SageMaker"),
        (ROLE, Stubbed().refuse("iam", "get_role", "NoSuchEntity", 404), "correct its name"),
    ],
)
def test_a_role_that_does_not_pass(arn: str, clients: Stubbed, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_role(clients, arn)


HERE = {"StringEquals": {"aws:SourceAccount": ACCOUNT}}
ELSEWHERE = {"StringEquals": {"AWS:SourceAccount": ["210987654321"]}}
ODD = {"ArnLike": {"aws:SourceArn": f"arn:aws:sagemaker:*:{ACCOUNT}:*"}}


@pytest.mark.parametrize(
    ("statements", "verdict"),
    [
        ([allow()], True),
        (allow(), True),
        ([allow(Action=["sts:AssumeRole", "sts:TagSession"])], True),
        ([allow(Action="sts:*")], True),
        ([allow(Action="sts:TagSession")], False),
        ([allow(Principal={"Service": ["ec2.amazonaws.com", "sagemaker.amazonaws.com"]})], True),
        ([allow(Principal={"Service": "ec2.amazonaws.com"})], False),
        ([allow(Principal={"AWS": f"arn:aws:iam::{ACCOUNT}:root"})], False),
        # A name in a place that gives no right.
        ([allow(Principal={"Service": "ec2.amazonaws.com"}, Sid="sagemaker.amazonaws.com")], False),
        ([allow(Principal="*")], True),
        ([allow(), deny()], False),
        ([deny(Action="*", Principal="*"), allow()], False),
        ([allow(), deny(Principal={"AWS": "*"})], False),
        ([allow(), deny(Principal={"Service": "ec2.amazonaws.com"})], True),
        ([allow(), deny(Action="sts:TagSession")], True),
        ([allow(), {"Effect": "Deny", "NotPrincipal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:*"}], False),
        ([allow(), {"Effect": "Deny", "Principal": "*", "NotAction": "sts:TagSession"}], False),
        ([allow(Condition=HERE)], True),
        ([allow(Condition=ELSEWHERE)], False),
        ([allow(Condition=ODD)], None),
        ([allow(), deny(Condition=ODD)], None),
        ([allow(), deny(Condition=ELSEWHERE)], True),
        ([allow(), allow(Condition=ODD)], True),
        ([], False),
    ],
)
def test_whom_a_trust_policy_trusts(statements: Any, verdict: bool | None) -> None:
    assert trusts_sagemaker({"Statement": statements}, ACCOUNT) is verdict


@given(st.permutations([allow(), allow(Condition=ODD), deny(Condition=ELSEWHERE), deny()]))
def test_a_deny_counts_wherever_it_stands(statements: list[Any]) -> None:
    assert trusts_sagemaker({"Statement": statements}, ACCOUNT) is False


# --- The default bucket ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", ["us-east-1", "eu-west-1"])
def test_the_default_bucket_is_made_where_it_is_missing(region: str) -> None:
    clients = Stubbed(region).am(ME)
    name = f"sagemaker-{region}-{ACCOUNT}"
    s3 = clients.stub("s3")
    s3.add_client_error(
        "head_bucket", "404", "Not Found", 404, expected_params={"Bucket": name, "ExpectedBucketOwner": ACCOUNT}
    )
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    s3.add_response("create_bucket", {}, {"Bucket": name, **place})
    account = Account(clients)
    assert account.find_bucket() == account.missing_bucket == name
    assert account.make_bucket() == name
    assert account.make_bucket() is None
    s3.assert_no_pending_responses()


def test_a_default_bucket_that_others_have_taken_is_not_used() -> None:
    clients = Stubbed().am(ME).refuse("s3", "head_bucket", "403", 403)
    clients.stub("s3").add_response("head_bucket", {})
    with pytest.raises(UserError, match=f"sagemaker-us-east-1-{ACCOUNT} belongs to another account"):
        Account(clients).find_bucket()


def test_a_default_bucket_that_may_not_be_looked_at_is_taken_with_a_warning() -> None:
    clients = Stubbed().am(ME).refuse("s3", "head_bucket", "403", 403).refuse("s3", "head_bucket", "403", 403)
    account = Account(clients)
    assert account.find_bucket() == f"sagemaker-us-east-1-{ACCOUNT}"
    assert "can't be checked" in account.warnings[0]
    assert account.make_bucket() is None


def test_a_bucket_that_may_not_be_made_comes_with_the_command() -> None:
    clients = Stubbed("eu-west-1").am(ME).refuse("s3", "head_bucket", "404", 404)
    clients.refuse("s3", "create_bucket", "AccessDenied", 403)
    account = Account(clients)
    account.find_bucket()
    command = f"`aws s3 mb s3://sagemaker-eu-west-1-{ACCOUNT} --region eu-west-1`"
    with pytest.raises(UserError, match=command):
        account.make_bucket()


def test_on_services_without_a_bucket_the_job_gets_one(
    services: EmbeddedServices, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, s3 = f"sagemaker-us-east-1-{ACCOUNT}", services.client()
    for item in s3.list_objects_v2(Bucket=bucket).get("Contents", []):
        s3.delete_object(Bucket=bucket, Key=item["Key"])
    s3.delete_bucket(Bucket=bucket)
    launcher.check(pictures, **PROMPT, instance_type="ml.g5.xlarge", role="dreambooth-sm")
    assert f"bucket: {bucket} is missing; a job that starts makes it" in capsys.readouterr().out
    assert bucket not in [each["Name"] for each in s3.list_buckets()["Buckets"]]
    made = launcher.request(pictures, **PROMPT, instance_type="ml.g5.xlarge")
    assert made["RoleArn"] == services.role
    assert made["CheckpointConfig"]["S3Uri"].startswith(f"s3://{bucket}/")
    assert bucket in [each["Name"] for each in s3.list_buckets()["Buckets"]]


# --- A request that is not taken -------------------------------------------------------------------------------------


def answered(clients: Clients, answers: list[Any]) -> None:
    """Gives a client of SageMaker answers in turn: an error's code, a dictionary, or an exception."""

    def answer(request: Any, **_: Any) -> Any:
        given = answers.pop(0)
        if isinstance(given, Exception):
            raise given
        failed = isinstance(given, str)
        body = {"__type": given, "message": f"{given} says why"} if failed else given
        headers = {"Content-Type": "application/x-amz-json-1.1"}
        response = AWSResponse(request.url, 400 if failed else 200, headers, io.BytesIO())
        response._content = json.dumps(body).encode()
        return response

    clients("sagemaker").meta.events.register("before-send", answer)


def request_of_a_job() -> dict[str, Any]:
    from dreambooth_sm.hyperparameters import Hyperparameters
    from dreambooth_sm.storage import S3Uri
    from launcher.training_request import training_request

    resources = Resources(
        instance_type="ml.g5.xlarge", name="zwx", bucket="models", image_uri="image:1", role=ROLE, max_retry_attempts=3
    )
    return training_request(
        Hyperparameters.parse({"instance_prompt": "photo of zwx toy"}), resources, {"images": S3Uri("models", "p")}
    )


def test_sagemaker_is_asked_to_start_the_job_again() -> None:
    assert request_of_a_job()["RetryStrategy"] == {"MaximumRetryAttempts": 3}
    for wrong in (0, 31, True, "3"):
        with pytest.raises(UserError, match="max_retry_attempts"):
            Resources.parse({"max_retry_attempts": wrong})


@pytest.mark.parametrize(
    ("code", "kind", "advice"),
    [
        ("ThrottlingException", Kind.BUSY, "try again in a few minutes"),
        ("InternalFailure", Kind.BUSY, "try again in a few minutes"),
        ("ExpiredTokenException", Kind.CREDENTIALS, "renew your credentials"),
        ("RequestExpired", Kind.CLOCK, "clock"),
    ],
)
def test_what_is_not_the_requests_fault_is_no_refusal(
    code: str, kind: Kind, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.aws.clients._ATTEMPTS", 1)
    clients = Stubbed()
    answered(clients, [code])
    with pytest.raises(launcher.ServiceError, match="zwx was not started") as caught:
        submit.submit(request_of_a_job(), clients)
    assert caught.value.kind is kind
    assert advice in str(caught.value)
    assert "refuses" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("ResourceLimitExceeded", "Service Quotas"),
        ("AccessDeniedException", "your own credentials"),
        ("ResourceInUse", "set another name"),
        ("ValidationException", "ValidationException says why"),
    ],
)
def test_a_refusal_says_what_to_do(code: str, advice: str) -> None:
    clients = Stubbed()
    answered(clients, [code])
    with pytest.raises(UserError, match=rf"SageMaker refuses the job: {code}") as caught:
        submit.submit(request_of_a_job(), clients)
    assert advice in str(caught.value)


def test_an_answer_that_was_lost_is_no_second_job(monkeypatch: pytest.MonkeyPatch) -> None:
    request, lost = request_of_a_job(), ReadTimeoutError(endpoint_url="https://sagemaker")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    found = {"TrainingJobName": "zwx", "HyperParameters": request["HyperParameters"], "CreationTime": _now()}
    clients = Stubbed()
    answered(clients, [lost, "ResourceInUse", found])
    assert submit.submit(request, clients).name == "zwx"
    for other in ({**found, "CreationTime": 0}, {**found, "HyperParameters": {}}):
        clients = Stubbed()
        answered(clients, [lost, "ResourceInUse", other])
        with pytest.raises(UserError, match="set another name"):
            submit.submit(request, clients)
    monkeypatch.setattr("launcher.aws.clients._ATTEMPTS", 1)
    clients = Stubbed()
    answered(clients, [lost])
    with pytest.raises(launcher.ServiceError, match=r'whether zwx was started is not known.*launcher.attach\("zwx"\)'):
        submit.submit(request, clients)


def _now() -> float:
    import time

    return time.time()


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("AlgorithmError: , exit code: 139", "a library crashed"),
        ("AlgorithmError: , exit code: 137", "more memory"),
        ("InternalServerError: We encountered an internal error. Please try again.", "max_retry_attempts"),
        ("OSError: [Errno 28] No space left on device: '/opt/ml/model'", "volume_gb"),
        ("An error occurred (404) when calling the HeadObject operation: Not Found (404)", "s3:// location"),
        ("NoSuchKey: The specified key does not exist.", "s3:// location"),
        ("ClientError: Data download failed: No S3 objects found under S3 URL s3://b/x", "s3:// location"),
        ("ExpiredTokenException: The security token included in the request is expired", "renew your credentials"),
        ("InvalidSignatureException: Signature expired: 20261129T000000Z is now earlier than", "clock"),
        ("User: me is not authorized to perform: iam:PassRole on resource: x", "iam:PassRole"),
        ("ValidationException: Could not assume role arn:x. Please ensure that the role exists", "trust policy"),
        ("ThrottlingException: Rate exceeded", "try again"),
        ("CapacityError: Unable to provision requested ML compute capacity", "no such instance"),
        ("ImageNotFoundException: the image with imageId does not exist", "build_and_push.sh"),
        ("AccessDenied: not authorized to perform: kms:GenerateDataKey on this resource", "kms:Decrypt"),
    ],
)
def test_what_is_known_of_failures(said: str, advice: str) -> None:
    assert advice in (advice_for(said) or "")
