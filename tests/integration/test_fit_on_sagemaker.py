"""``launcher.fit`` on SageMaker: its checks, its uploads and its requests, against the embedded services."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest

import launcher
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import S3Uri, list_objects, upload_directory
from launcher.aws.account import Account
from launcher.aws.clients import Clients
from launcher.aws.iam import notebook_policy
from launcher.aws.image_tags import code_digest, image_tag, is_of_code
from launcher.cli import main
from launcher.local.services import EmbeddedServices
from tests.helpers.api import refusals
from tests.helpers.jobs import SMALL

OPTIONS: dict[str, Any] = {
    name: SMALL[name] for name in ("resolution", "center_crop", "max_train_steps", "learning_rate", "seed")
}
PROMPT = "photo of zwx toy"
# For pictures that are too small for more.
SMALL_PROMPT: dict[str, Any] = {"instance_prompt": PROMPT, "resolution": 64}
SECRETS = {"HF_TOKEN": "hf_" + "aBcDeFgHiJ" * 3, "AWS_SESSION_TOKEN": "planted-session-token-of-aws"}
# The permission that an operation of S3 needs, where its name differs.
PERMISSIONS = {
    "HeadBucket": "ListBucket",
    "HeadObject": "GetObject",
    "ListObjectsV2": "ListBucket",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
}


@pytest.fixture
def bucket(services: EmbeddedServices) -> str:
    return Account(Clients()).find_bucket()


@pytest.fixture(scope="module")
def trained(
    services: EmbeddedServices, pictures: Path, tiny_base: Path
) -> tuple[launcher.Job, list[str], set[tuple[str, str]]]:
    """A job from pictures to model, what was said on the way, and what was asked of AWS."""
    said: list[str] = []
    asked: set[tuple[str, str]] = set()
    session = boto3.Session()
    session.events.register("before-call", lambda model, **_: asked.add((_service(model), model.name)))
    job = launcher.fit(
        pictures,
        instance_prompt=PROMPT,
        base_model=tiny_base,
        instance_type="ml.g5.xlarge",
        role=services.role,
        tags={"team": "toys"},
        log=said.append,
        session=session,
        **OPTIONS,
    )
    return job, said, set(asked)  # and not what is asked later


def _service(operation: Any) -> str:
    return operation.service_model.metadata.get("signingName") or operation.service_model.metadata["endpointPrefix"]


def request(images: object, services: EmbeddedServices, **options: Any) -> dict[str, Any]:
    return launcher.request(
        images,
        **{
            "instance_prompt": PROMPT,
            "resolution": 64,
            "instance_type": "ml.g5.xlarge",
            "role": services.role,
            **options,
        },
    )


def channel(request: dict[str, Any], name: str) -> S3Uri:
    (uri,) = [
        channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in request["InputDataConfig"]
        if channel["ChannelName"] == name
    ]
    return S3Uri.parse(uri)


def test_from_pictures_to_a_model(trained: Any, bucket: str) -> None:
    job, said, _ = trained
    assert job.status == "Completed"
    assert job.model_uri.startswith(f"s3://{bucket}/dreambooth-sm/jobs/{job.name}/")
    assert "model_index.json" in list_objects(S3Uri.parse(job.model_uri))
    text = "\n".join(said)
    assert "instance: ml.g5.xlarge (A10G)" in text
    assert is_of_code(said[1].removeprefix("image: "), code_digest())
    assert "estimate: about " in text
    assert "phase=train state=ended" in text
    assert job.describe()["TrainingJobName"] == job.name


def test_the_next_job_is_estimated_by_the_last_ones(
    trained: Any, services: EmbeddedServices, pictures: Path, tiny_base: Path
) -> None:
    job, before, _ = trained
    # Nothing had run that is like it, and ECR knows the image's size.
    assert any(
        re.fullmatch(r"  training image: .* minutes \(0\.1 GB, by ECR, at 60 MB/s, assumed\)", line) for line in before
    )
    said: list[str] = []
    place = {"base_model": tiny_base, "instance_type": "ml.g5.xlarge", "role": services.role}
    launcher.check(pictures, instance_prompt=PROMPT, log=said.append, **place, **OPTIONS)
    parts = {line.partition(":")[0].strip(): line for line in said if line.startswith("  ")}
    own = r" \((as your last job|median of your last \d jobs)\)"
    described = job.describe()
    waited = (described["TrainingStartTime"] - described["CreationTime"]).total_seconds()
    assert re.fullmatch(rf"  instance: {waited / 60:.1f} minutes, not billed{own}", parts["instance"])
    for name in ("training image", "base model", "saving and sending"):
        assert re.search(rf"minutes{own}$", parts[name]), parts[name]
    assert re.search(
        r" x what was expected, (as your last job|median of your last)",
        parts[f"{OPTIONS['max_train_steps']} steps"],
    )


def test_the_model_is_served_as_the_document_says(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job, _, _ = trained
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = [each for each in re.findall(r"^```python\n(.*?)^```$", document, re.S | re.M) if "job.deploy(" in each]
    found: dict[str, Any] = {"job": job, "launcher": launcher}
    exec(block, found)
    assert found["picture"].size == (int(OPTIONS["resolution"]),) * 2
    said = capsys.readouterr().out
    # The cheapest of all whose card has room for as many pictures as the server draws at a time; then for four.
    assert re.search(
        r"instance: 1 x ml\.g4dn\.xlarge \(T4\)\nplan: 8 pictures at a time, \d+\.\d of \d+\.\d GB\n", said
    )
    assert re.search(r"plan: 4 pictures at a time, \d+\.\d of \d+\.\d GB\ncost: about \$0\.74 an hour", said)
    with pytest.raises(UserError, match="was not found in"):
        found["endpoint"].draw("a toy")


def test_the_notebooks_policy_allows_all_that_was_asked(trained: Any, services: EmbeddedServices) -> None:
    _, _, asked = trained
    policy = notebook_policy("models", role="dreambooth-sm")
    allowed = {action.lower() for statement in policy["Statement"] for action in statement["Action"]}
    needed = {f"{service}:{PERMISSIONS.get(name, name)}".lower() for service, name in asked}
    assert "sagemaker:createtrainingjob" in needed
    assert needed - {"sts:getcalleridentity"} <= allowed  # which everyone may


def test_the_command_line_finds_the_job(trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job, _, _ = trained
    assert main(["list", "--name_contains", job.name]) == 0
    assert f"Completed   {job.name}" in capsys.readouterr().out
    assert main(["logs", job.name]) == 0
    assert "phase=train state=ended" in capsys.readouterr().out
    assert main(["attach", job.name]) == 0
    assert f"model: {job.model_uri}" in capsys.readouterr().out
    assert main(["stop", job.name]) == 0
    assert capsys.readouterr().out == f"{job.name} has ended before: Completed\n"
    assert main(["attach", "nobody"]) == 2
    assert "there is no training job 'nobody'" in capsys.readouterr().err


def test_pictures_go_up_once(services: EmbeddedServices, pictures: Path, tmp_path: Path) -> None:
    first = channel(request(pictures, services), "images")
    client = services.client()

    def written() -> dict[str, Any]:
        found = client.list_objects_v2(Bucket=first.bucket, Prefix=f"{first.prefix}/")["Contents"]
        return {entry["Key"]: entry["LastModified"] for entry in found}

    before = written()
    assert {Path(key).name for key in before} == {path.name for path in pictures.iterdir()} | {"manifest.json"}
    assert channel(request(sorted(pictures.iterdir()), services), "images") == first  # the same, as a list
    assert written() == before
    for path in pictures.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ".DS_Store").write_text("x")
    assert channel(request(tmp_path, services), "images") == first
    (tmp_path / "00.txt").write_text("photo of zwx toy, on a table")
    assert channel(request(tmp_path, services), "images") != first


def test_a_prompt_that_is_too_long_goes_along_as_a_file(services: EmbeddedServices, pictures: Path) -> None:
    prompt = "photo of zwx toy " + "very " * 60
    made = request(pictures, services, instance_prompt=prompt)
    assert refusals("CreateTrainingJob", made) == []
    place = channel(made, "config")
    body = services.client().get_object(Bucket=place.bucket, Key=f"{place.prefix}/concepts_list.json")["Body"].read()
    assert json.loads(body) == [{"instance_prompt": prompt.strip()}]
    assert made["HyperParameters"]["concepts_list"] == "/opt/ml/input/data/config/concepts_list.json"


def test_the_request_is_one_for_the_hyperparameters_that_were_given(services: EmbeddedServices, bucket: str) -> None:
    made = request(
        f"s3://{bucket}/pictures",
        services,
        output=f"s3://{bucket}/models/zwx",
        base_model=f"s3://{bucket}/base/model.safetensors",
        max_train_steps=400,
    )
    assert Hyperparameters.parse(made["HyperParameters"]) == Hyperparameters.parse(
        {
            "instance_prompt": PROMPT,
            "instance_data_dir": "/opt/ml/input/data/images",
            "pretrained_model_name_or_path": "/opt/ml/input/data/model/model.safetensors",
            "resolution": 64,
            "manual_upload_model_path": f"s3://{bucket}/models/zwx",
            "max_train_steps": 400,
        }
    )
    image = made["AlgorithmSpecification"]["TrainingImage"]
    assert ".dkr.ecr.us-east-1." in image
    assert "/dreambooth-sm@sha256:" in image


@pytest.mark.parametrize(
    ("options", "by_the_job"),
    [
        ({}, True),
        ({"kms": "1234abcd"}, True),
        ({"compression": True}, False),
        ({"output_mode": "uncompressed"}, False),
        ({"network_isolation": True, "base_model": "toybox"}, False),
    ],
)
def test_who_uploads_the_model(
    options: dict[str, Any], by_the_job: bool, services: EmbeddedServices, bucket: str
) -> None:
    output = f"s3://{bucket}/models/zwx"
    made = request(f"s3://{bucket}/pictures", services, output=output, **options)
    h = Hyperparameters.parse(made["HyperParameters"])
    assert (h.upload_target == output) == by_the_job
    assert (made["OutputDataConfig"]["S3OutputPath"] == output) != by_the_job
    assert h.s3_kms_key_id == options.get("kms")


def test_with_everything_given_no_account_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    made = launcher.request(
        "s3://models/pictures",
        instance_prompt=PROMPT,
        role="arn:aws:iam::123456789012:role/train",
        image_uri="image:1",
        bucket="models",
        max_minutes=60,
    )
    assert refusals("CreateTrainingJob", made) == []
    assert made["ResourceConfig"]["InstanceType"] == "ml.g4dn.xlarge"  # the cheapest


@pytest.fixture
def quotas(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Service Quotas in which training may use no instance at all."""
    answer = {"Quotas": [{"QuotaName": "ml.g5.xlarge for training job usage", "Value": 0.0}]}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps(answer).encode()
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_SERVICE_QUOTAS", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("quotas")
def test_everything_that_is_in_the_way_is_told_at_once(services: EmbeddedServices, pictures: Path) -> None:
    services.clients()("iam").create_role(
        RoleName="stranger",
        AssumeRolePolicyDocument=json.dumps({"Statement": [{"Principal": {"Service": "ec2.amazonaws.com"}}]}),
    )
    with pytest.raises(UserError) as caught:
        launcher.fit(
            pictures,
            instance_prompt=PROMPT,
            instance_type="ml.g5.xlarge",
            role=services.role.replace("dreambooth-sm", "stranger"),
            image_uri="123456789012.dkr.ecr.us-east-1.amazonaws.com/dreambooth-sm:0.0.0",
            output="s3://nobodys-bucket/zwx",
            resolution=510,
            keep_alive=60,
            spot=True,
        )
    for words in ("does not trust SageMaker", "is not in ECR", "nobodys-bucket", "resolution=510", "keep_alive"):
        assert any(words in problem for problem in caught.value.problems), words
    with pytest.raises(UserError, match=r"'ml.g5.xlarge for training job usage' is 0 in us-east-1") as caught:
        launcher.check(pictures, **SMALL_PROMPT, instance_type="ml.g5.xlarge", role=services.role)
    assert len(caught.value.problems) == 1


def test_a_prefix_without_pictures(services: EmbeddedServices, bucket: str) -> None:
    with pytest.raises(UserError, match=r"there is nothing below s3://.*/empty"):
        launcher.check(f"s3://{bucket}/empty", instance_prompt=PROMPT, instance_type="ml.g5.xlarge", role=services.role)


def test_what_can_not_be_looked_at_is_a_warning(services: EmbeddedServices, pictures: Path, bucket: str) -> None:
    upload_directory(pictures, S3Uri(bucket, "checked"))
    said: list[str] = []
    launcher.check(
        f"s3://{bucket}/checked",
        instance_prompt=PROMPT,
        instance_type="ml.g5.xlarge",
        role=services.role,
        image_uri="registry.example.com/dreambooth-sm:1",
        log=said.append,
    )
    assert "warning: image_uri: whether an image of another registry is there can't be checked" in said


def test_an_image_that_was_never_pushed(services: EmbeddedServices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.aws.images.code_digest", lambda: "0123456789ab")
    with pytest.raises(UserError, match=r"no build of this code .* run `./build_and_push.sh --region us-"):
        request("s3://models/pictures", services)


@pytest.fixture
def pushed(services: EmbeddedServices) -> Iterator[Callable[[str], str]]:
    """Pushes an image with this tag into a repository of another name; returns the digest. And the repository's URI."""
    ecr = boto3.client("ecr")
    ecr.create_repository(repositoryName="team/toys", imageTagMutability="IMMUTABLE")

    def push(tag: str) -> str:
        manifest = {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": {"digest": tag}}
        made = ecr.put_image(repositoryName="team/toys", imageTag=tag, imageManifest=json.dumps(manifest))
        return str(made["image"]["imageId"]["imageDigest"])

    yield push
    ecr.delete_repository(repositoryName="team/toys", force=True)


def test_a_repository_stands_for_the_build_of_this_code(
    services: EmbeddedServices, pushed: Callable[[str], str]
) -> None:
    repository, account = "123456789012.dkr.ecr.us-east-1.amazonaws.com/team/toys", Account(Clients())
    pushed("latest")
    with pytest.raises(UserError, match=r"team/toys holds no build of this code .*, but latest of 20"):
        account.complete_image(repository)
    tag = image_tag("0.1.0", "4b204ea1c2d3", code_digest(), "9a8b7c6d")
    digest = pushed(tag)
    pushed(tag.replace(code_digest(), "0123456789ab"))
    assert account.complete_image(repository) == f"{repository}@{digest}"
    made = request("s3://models/pictures", services, image_uri=repository)
    assert made["AlgorithmSpecification"]["TrainingImage"] == f"{repository}@{digest}"


def test_the_role_is_found(services: EmbeddedServices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "metadata.json"
    assert Account(Clients(), metadata).find_role() == services.role  # by its usual name
    metadata.write_text(json.dumps({"ResourceName": "default", "ExecutionRoleArn": services.role}))
    assert Account(Clients(), metadata).find_role() == services.role
    services.clients()("sagemaker").create_notebook_instance(
        NotebookInstanceName="notes", InstanceType="ml.t3.medium", RoleArn=services.role
    )
    metadata.write_text(json.dumps({"ResourceName": "notes"}))
    assert Account(Clients(), metadata).find_role() == services.role
    key = services.clients()("sts").assume_role(RoleArn=services.role, RoleSessionName="me")["Credentials"]
    session = boto3.Session(key["AccessKeyId"], key["SecretAccessKey"], key["SessionToken"])
    assert Account(Clients(session), tmp_path / "nothing").find_role() == services.role


def test_without_credentials_that_is_the_one_problem(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_") and "ENDPOINT" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(UserError, match="no valid AWS credentials") as caught:
        launcher.check(pictures, **SMALL_PROMPT, instance_type="ml.g5.xlarge")
    assert len(set(caught.value.problems)) <= 2


@pytest.mark.parametrize("place", [{}, {"model_name": SECRETS["HF_TOKEN"]}, {"environment": SECRETS}])
def test_secrets_stay_where_they_are(
    place: dict[str, Any],
    services: EmbeddedServices,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    ask: Callable[..., Any] = launcher.check
    text = ""
    try:
        ask(pictures, **SMALL_PROMPT, instance_type="ml.g5.xlarge", role=services.role, **place)
        text = json.dumps(request(pictures, services))
        assert not place
    except UserError as error:
        assert place
        text = str(error)
        assert "secret" in text
    shown = capsys.readouterr()
    for value in (*SECRETS.values(), os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert value not in text + shown.out + shown.err
