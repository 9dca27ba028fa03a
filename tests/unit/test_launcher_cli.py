"""``dreambooth-launcher``, its policies and its documents."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm.storage import PROBE_NAME
from launcher.aws.clients import Clients
from launcher.aws.iam import execution_policy, notebook_policy, trust_policy
from launcher.cli import main
from launcher.estimates import documented_table
from tests.helpers.api import refusals

DOCS = Path(__file__).parents[2] / "docs"
# Everything that a request needs, so that no account is asked.
GIVEN = [
    "--role",
    "arn:aws:iam::123456789012:role/train",
    "--image_uri",
    "image:1",
    "--bucket",
    "models",
    "--name",
    "zwx",
]
PROMPT = ["--instance_prompt", "photo", "of", "zwx", "toy"]


def test_the_request_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--instance_type",
        "ml.g5.xlarge",
        "--max_train_steps",
        "400",
        "--spot",
        "--max_minutes",
        "60",
        "--tags",
        "team=toys",
        "a=b=c",
    ]
    vpc = ["--vpc", "subnet-0a,subnet-0b", "sg-0c"]
    assert main(["request", "s3://models/pictures", *PROMPT, *GIVEN, *flags, *vpc]) == 0
    request = json.loads(capsys.readouterr().out)
    assert refusals("CreateTrainingJob", request) == []
    assert request["HyperParameters"]["instance_prompt"] == "photo of zwx toy"
    assert request["HyperParameters"]["max_train_steps"] == "400"
    assert request["EnableManagedSpotTraining"] is True
    assert request["StoppingCondition"]["MaxRuntimeInSeconds"] == 3600
    assert request["Tags"] == [{"Key": "team", "Value": "toys"}, {"Key": "a", "Value": "b=c"}]
    assert request["VpcConfig"] == {"SecurityGroupIds": ["sg-0c"], "Subnets": ["subnet-0a", "subnet-0b"]}


def test_the_seeds_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    path = ["--manul_upload_model_path", "s3://models/zwx"]
    assert main(["request", "s3://models/pictures", *PROMPT, *GIVEN, *path]) == 0
    assert json.loads(capsys.readouterr().out)["HyperParameters"]["manual_upload_model_path"] == "s3://models/zwx"


def test_an_estimate_for_one_and_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *PROMPT, "--instance_type", "ml.g4dn.xlarge"]) == 0
    one = capsys.readouterr().out
    assert one.startswith("instance: ml.g4dn.xlarge (T4)\nplan: ")
    assert main(["estimate", *PROMPT]) == 0
    every = capsys.readouterr().out
    assert every.startswith(one)  # the cheapest
    assert "| ml.p5.48xlarge | 8 x H100 | 63.30 | " in every


def test_bad_input_is_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--instance_type",
        "ml.g5.xlarg",
        "--spot",
        "maybe",
        "--tags",
        "a",
        "--resolution",
        "510",
        "--keep_alive",
        "ten",
    ]
    assert main(["request", "/nowhere", *flags]) == 2
    shown = capsys.readouterr()
    words = ("ml.g5.xlarge", "spot: ", "tags: ", "resolution=510", "keep_alive: ", "/nowhere is not a folder")
    for each in (*words, "instance_prompt is missing"):
        assert each in shown.err, each
    assert all(line.startswith("error: ") for line in shown.err.splitlines())
    assert shown.out == ""


def test_unknown_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *PROMPT, "--learning_rat", "1"])
    assert caught.value.code == 2
    assert "--learning_rat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit"], "required: images"),
        (["check", *PROMPT], "required: images"),
        (["request", "--spot"], "required: images"),
        (["attach"], "required: name"),
        (["logs", "--follow"], "required: name"),
        (["stop"], "required: name"),
        (["list", "--limit", "0"], "'0' is not a whole number from 1"),
        (["list", "--limit", "ten"], "'ten' is not a whole number from 1"),
    ],
)
def test_what_is_missing_or_no_number(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_too_little_time_is_one_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *PROMPT, "--max_minutes", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: max_minutes=1: no instance type is expected to be done in time")


def test_a_bucket_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["iam", "s3://models"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.out == ""


@pytest.mark.parametrize(
    "arguments", [["list"], ["attach", "zwx"], ["logs", "zwx"], ["stop", "zwx"], ["download", "zwx", "model"]]
)
def test_what_aws_refuses_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert ": Unable to locate credentials; renew your credentials" in line


@pytest.mark.parametrize(
    "command",
    [
        "fit", "check", "estimate", "request", "iam", "attach", "logs", "stop", "list", "download",
        "deploy", "draw", "undeploy",
    ],
)  # fmt: skip
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: dreambooth-launcher {command}" in capsys.readouterr().out


def test_policies_give_no_more_than_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["iam", "models", "--account", "123456789012", "--region", "us-west-2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["notebook"] == notebook_policy("models", account="123456789012", region="us-west-2")
    assert printed["execution"] == execution_policy("models", account="123456789012", region="us-west-2")
    assert printed["execution role's trust"] == trust_policy()
    for policy in (printed["notebook"], printed["notebook, for endpoints"], printed["execution"]):
        for statement in policy["Statement"]:
            assert not any("*" in action for action in statement["Action"])
            if statement["Resource"] == "*":  # only those that AWS can't limit
                assert not any(action.startswith(("s3:", "iam:")) for action in statement["Action"])
    (giving,) = [each for each in printed["notebook"]["Statement"] if each["Action"] == ["iam:PassRole"]]
    assert giving["Resource"] == "arn:aws:iam::123456789012:role/dreambooth-sm"
    assert giving["Condition"]["StringEquals"] == {"iam:PassedToService": "sagemaker.amazonaws.com"}
    deleting = [each for each in printed["notebook"]["Statement"] if "s3:DeleteObject" in each["Action"]]
    # What tried the upload, what subjects of fleets have failed with, and nothing else.
    assert [each["Resource"].removeprefix("arn:aws:s3:::models/*") for each in deleting] == [
        PROBE_NAME,
        "/fleets/*/outcomes/*",
    ]
    assert "arn:aws-cn:s3:::models/*" in json.dumps(execution_policy("models", partition="aws-cn"))
    assert "secretsmanager" not in json.dumps(printed["execution"])
    server = "arn:aws:sagemaker:us-west-2:123456789012:mlflow-tracking-server/toys"
    assert main(["iam", "models", "--secret", "hub", "--secret", "wandb", "--mlflow", server]) == 0
    statements = json.loads(capsys.readouterr().out)["execution"]["Statement"]
    (reading,) = [each for each in statements if each["Action"] == ["secretsmanager:GetSecretValue"]]
    assert reading["Resource"] == [f"arn:aws:secretsmanager:*:*:secret:{name}-??????" for name in ("hub", "wandb")]
    (telling,) = [each for each in statements if each["Resource"] == server]
    assert "sagemaker-mlflow:CreateRun" in telling["Action"]
    assert not any("*" in action or "Delete" in action for action in telling["Action"])


def test_the_documented_table_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["instances"]) == 0
    assert capsys.readouterr().out.strip() == documented_table()
    page = (DOCS / "launcher.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- estimates -->\n")
    assert rest.partition("\n<!-- end of estimates -->")[0] == documented_table()


def test_profile_and_region_hold_for_all_that_a_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[toys]\naws_access_key_id = TOYS\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "OTHER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    seen: list[tuple[str, str]] = []

    class Seen(Exception):  # noqa: N818
        pass

    def look(clients: Clients, service: str) -> Any:
        client = make(clients, service)
        seen.append((client.meta.region_name, client._request_signer._credentials.access_key))
        raise Seen

    make = Clients._make
    monkeypatch.setattr(Clients, "_make", look)
    flags = ["--profile", "toys", "--region", "eu-west-1"]
    for arguments in (["list", *flags], ["attach", "zwx", *flags], ["stop", "zwx", *flags]):
        with pytest.raises(Seen):
            main(arguments)
    assert seen == [("eu-west-1", "TOYS")] * 3
    monkeypatch.undo()
    assert "AWS_PROFILE" not in os.environ
    assert main(["list", "--profile", "nobody", "--region", "eu-west-1"]) == 2
    assert "nobody" in capsys.readouterr().err
