"""Endpoints on the embedded SageMaker: made, asked, changed and removed as on the real one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import threading
import types
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from PIL import Image

import launcher
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.storage import MANIFEST_NAME, S3Uri, list_objects, put_object, upload_directory, verify
from launcher.aws.iam import endpoint_policy, notebook_policy
from launcher.cli import main
from launcher.endpoints.scaling import Scaling, scale
from launcher.local.server_process import ServerProcess
from launcher.local.services import EmbeddedServices
from tests.helpers.serving import Client

PROMPT = "photo of zwx toy"
SMALL: dict[str, Any] = {"steps": 1, "width": 32, "height": 32, "seed": 3}


@pytest.fixture(scope="module")
def bucket(services: EmbeddedServices, tiny_base: Path) -> S3Uri:
    """Holds a model below ``model``, with the report of a job, and what is not a model below ``broken``."""
    bucket = S3Uri(f"endpoints-{uuid.uuid4().hex}")
    services.clients()("s3").create_bucket(Bucket=bucket.bucket)
    upload_directory(tiny_base, bucket / "model", client=services.clients()("s3"))
    put_object(bucket / "broken/model_index.json", b"{}", client=services.clients()("s3"))
    return bucket


@pytest.fixture
def name() -> str:
    return f"zwx-{uuid.uuid4().hex[:8]}"


@pytest.fixture(autouse=True)
def nothing_is_left(services: EmbeddedServices, name: str) -> Iterator[None]:
    yield
    assert made(services) == []


def made(services: EmbeddedServices) -> list[str]:
    """Models, configurations and endpoints that are there."""
    sagemaker = services.clients()("sagemaker")
    listed = (
        [each["ModelName"] for each in sagemaker.list_models()["Models"]],
        [each["EndpointConfigName"] for each in sagemaker.list_endpoint_configs()["EndpointConfigs"]],
        [each["EndpointName"] for each in sagemaker.list_endpoints()["Endpoints"]],
    )
    return [name for names in listed for name in names]


def test_it_draws_is_changed_while_it_draws_and_leaves_nothing_but_what_others_made(
    services: EmbeddedServices, bucket: S3Uri, name: str
) -> None:
    said: list[str] = []
    model, sagemaker = str(bucket / "model"), services.clients()("sagemaker")
    endpoint = launcher.deploy(model, instance_type="ml.g5.xlarge", name=name, log=said.append, batch=1)
    assert f"endpoint: {name}" in said
    assert [line for line in said if line.startswith("cost: about $1.41 an hour")]
    assert [line for line in said if line.startswith("warning: model: report.json is missing")]
    pictures = endpoint.draw(PROMPT, number=2, **SMALL)
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert pictures[0].tobytes() == endpoint.draw(PROMPT, **SMALL)[0].tobytes() != pictures[1].tobytes()
    with pytest.raises(UserError, match="steps: 0 is not valid") as caught:
        endpoint.draw(PROMPT, steps=0, width=7)
    assert len(caught.value.problems) == 2
    shown = list(endpoint.stream(PROMPT, previews=2, **{**SMALL, "steps": 3}))
    assert [(each.step, each.picture.size) for each in shown] == [(step, (32, 32)) for step in (1, 2, None)]
    assert shown[-1].picture.tobytes() == endpoint.draw(PROMPT, **{**SMALL, "steps": 3})[0].tobytes()
    with pytest.raises(UserError, match="steps: 0 is not valid"):
        next(endpoint.stream(PROMPT, steps=0))

    done = threading.Event()

    def draw_on() -> int:
        drawn = 0
        while not done.is_set():
            drawn += len(endpoint.draw(PROMPT, **SMALL))
        return drawn

    with ThreadPoolExecutor(1) as threads:
        drawing = threads.submit(draw_on)
        launcher.attach_endpoint(name).update(batch=2, instance_count=2)
        done.set()
        assert drawing.result() > 0
    assert len(made(services)) == 3
    (configuration,) = sagemaker.list_endpoint_configs()["EndpointConfigs"]
    variant = sagemaker.describe_endpoint_config(EndpointConfigName=configuration["EndpointConfigName"])
    assert variant["ProductionVariants"][0]["InitialInstanceCount"] == 2
    assert variant["ProductionVariants"][0]["InstanceType"] == "ml.g5.xlarge"
    container = sagemaker.describe_model(ModelName=configuration["EndpointConfigName"])["PrimaryContainer"]
    assert container["Environment"] == {"SERVE_BATCH": "2"}
    assert container["ModelDataSource"]["S3DataSource"]["S3Uri"] == f"{model}/"

    with pytest.raises(launcher.EndpointFailed, match=r"ping health check(.|\n)*error: (.|\n)*still is"):
        endpoint.update(str(bucket / "broken"))
    assert len(made(services)) == 3
    assert endpoint.draw(PROMPT, **SMALL)[0].tobytes() == pictures[0].tobytes()

    with pytest.raises(UserError, match=f"there is an endpoint '{name}'"):
        launcher.deploy(model, instance_type="ml.g5.xlarge", name=name, log=said.append)
    foreign = {"ModelName": f"{name}-another", "ExecutionRoleArn": services.role, "PrimaryContainer": {"Image": "x"}}
    sagemaker.create_model(**foreign)
    before = len(said)
    endpoint.delete()
    assert said[before:] == []
    assert made(services) == [foreign["ModelName"]]
    sagemaker.delete_model(ModelName=foreign["ModelName"])
    with pytest.raises(UserError, match="was not found in"):
        launcher.attach_endpoint(name)


def test_by_way_of_s3_it_is_asked_and_scaled_to_zero(services: EmbeddedServices, bucket: S3Uri, name: str) -> None:
    clients, answers = services.clients(), str(bucket / "answers")
    session, asked = boto3.Session(), set[str]()
    session.events.register("before-call", lambda model, **_: asked.add(permission(model)))
    with launcher.deploy(
        str(bucket / "model"),
        instance_type="ml.g5.xlarge",
        name=name,
        asynchronous=answers,
        min_instances=0,
        max_instances=3,
        tags={"team": "toys"},
        log=lambda line: None,
        session=session,
    ) as endpoint:
        assert endpoint.draw(PROMPT, **SMALL)[0].size == (32, 32)
        with pytest.raises(UserError, match="steps: 0 is not valid"):
            endpoint.draw(PROMPT, steps=0)
        with pytest.raises(UserError, match="asked by way of S3, where nothing comes bit by bit"):
            next(endpoint.stream(PROMPT))
        where = {"ServiceNamespace": "sagemaker", "ResourceIds": [f"endpoint/{name}/variant/AllTraffic"]}
        (target,) = clients("application-autoscaling").describe_scalable_targets(**where)["ScalableTargets"]
        assert (target["MinCapacity"], target["MaxCapacity"]) == (0, 3)
        (alarm,) = clients("cloudwatch").describe_alarms()["MetricAlarms"]
        assert "from-zero" in alarm["AlarmActions"][0]
        tags = clients("cloudwatch").list_tags_for_resource(ResourceARN=alarm["AlarmArn"])["Tags"]
        assert {"Key": "team", "Value": "toys"} in tags
        endpoint.update(max_instances=2, min_instances=0)
        (target,) = clients("application-autoscaling").describe_scalable_targets(**where)["ScalableTargets"]
        assert (target["MinCapacity"], target["MaxCapacity"]) == (0, 2)
    assert clients("application-autoscaling").describe_scalable_targets(**where)["ScalableTargets"] == []
    assert clients("cloudwatch").describe_alarms()["MetricAlarms"] == []
    statements = [*notebook_policy("models")["Statement"], *endpoint_policy()["Statement"]]
    allowed = {action.lower() for statement in statements for action in statement["Action"]}
    needed = {each for each in asked if not each.startswith(("s3:", "sts:"))}
    assert {"sagemaker:createendpoint", "sagemaker:invokeendpointasync"} <= needed <= allowed


def test_one_whose_variant_has_another_name_is_scaled_and_its_log_read(
    services: EmbeddedServices, bucket: S3Uri, name: str
) -> None:
    """As those that were made before it was called as SageMaker's SDKs call it."""
    clients = services.clients()
    autoscaling = clients("application-autoscaling")

    def scaled() -> list[tuple[str, int]]:
        found = autoscaling.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
        return [(each["ResourceId"], each["MaxCapacity"]) for each in found]

    requests = launcher.endpoint_requests(
        name, str(bucket / "model"), image_uri="image:1", role=services.role, instance_type="ml.g5.xlarge"
    )
    requests["create_endpoint_config"]["ProductionVariants"][0]["VariantName"] = "all"
    for operation, request in requests.items():
        getattr(clients("sagemaker"), operation)(**request)
    endpoint = launcher.attach_endpoint(name).wait()
    assert any(line.startswith("ready: ") for line in endpoint.lines())
    scale(name, Scaling(1, 3, 20), clients)
    assert scaled() == [(f"endpoint/{name}/variant/all", 3)]
    with pytest.raises(launcher.EndpointFailed, match=r"production variant AllTraffic(.|\n)*error: (.|\n)*still is"):
        endpoint.update(str(bucket / "broken"))
    assert scaled() == [(f"endpoint/{name}/variant/all", 3)]
    endpoint.update(image_uri="image:2")  # which names the variant as all are named now
    assert scaled() == [(f"endpoint/{name}/variant/AllTraffic", 3)]
    assert any(line.startswith("ready: ") for line in endpoint.lines())
    endpoint.delete()
    assert scaled() == []


def permission(operation: Any) -> str:
    signed = operation.service_model.metadata.get("signingName") or operation.service_model.metadata["endpointPrefix"]
    return f"{'cloudwatch' if signed == 'monitoring' else signed}:{operation.name}".lower()


def test_the_command_line_makes_asks_and_removes_one(
    bucket: S3Uri, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the document says it, but for the model and the pictures' size."""
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = [each for each in re.findall(r"^```bash\n(.*?)^```$", document, re.S | re.M) if " undeploy " in each]
    monkeypatch.chdir(tmp_path)
    text = block.replace("s3://bucket/models/zwx", str(bucket / "model")).replace(" zwx\n", f" {name}\n")
    text = text.replace(" draw zwx ", f" draw {name} ").replace("auto", "ml.g5.xlarge")
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "dreambooth-launcher"
        small = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
        assert main([*arguments, *(small if arguments[0] == "draw" else ())]) == 0
    with Image.open(tmp_path / "beach.png") as picture:
        assert picture.size == (32, 32)
    assert f"{name} is deleted" in capsys.readouterr().out
    assert main(["undeploy", name]) == 2
    assert f"endpoint '{name}' was not found" in capsys.readouterr().err


def test_what_lies_on_this_machine_is_sent_once_verified_and_drawn_with(
    services: EmbeddedServices,
    tiny_base: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the document says it; then the same content from another directory."""
    for directory in ("zwx-job/model", "copy"):
        shutil.copytree(tiny_base, tmp_path / directory)
        (tmp_path / directory / ".hidden").write_text("1")
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^dreambooth-launcher deploy zwx-job/model .*$", document, re.M)
    monkeypatch.chdir(tmp_path)
    line = line.replace("auto", "ml.g5.xlarge").replace("--name zwx", f"--name {name}")
    assert main(shlex.split(line)[1:]) == 0
    printed = capsys.readouterr().out
    whole = {path.relative_to(tiny_base).as_posix(): path for path in tiny_base.rglob("*") if path.is_file()}
    size = sum(path.stat().st_size for path in whole.values())
    (told,) = re.findall(rf"^files: {len(whole)} of zwx-job/model, {size:,} bytes, for (\S+)$", printed, re.M)
    place = S3Uri.parse(told)
    assert f"files: {len(whole)} sent to {place}\n" in printed
    s3 = services.clients()("s3")
    assert list_objects(place, client=s3).keys() == {*whole, MANIFEST_NAME}
    found = verify(place, client=s3)
    assert (found.missing, found.different, found.unknown) == ((), (), ())
    endpoint = launcher.attach_endpoint(name)
    picture = endpoint.draw(PROMPT, **SMALL)[0]
    with launcher.deploy(tmp_path / "copy") as here:
        assert here.draw(PROMPT, **SMALL)[0].tobytes() == picture.tobytes()
    capsys.readouterr()
    endpoint.update(tmp_path / "copy")
    assert f"files: {len(whole)} already in {place}\n" in capsys.readouterr().out
    assert endpoint.draw(PROMPT, **SMALL)[0].tobytes() == picture.tobytes()
    endpoint.delete()


def test_directories_without_a_model_are_not_sent(services: EmbeddedServices, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("1")
    with pytest.raises(UserError) as caught:
        launcher.deploy(
            tmp_path / "notes",
            base_model=tmp_path / "notes",
            adapters=tiny_base / "unet",
            instance_type="ml.g5.xlarge",
            bucket="no-such-bucket",
        )
    starts = [line.partition(":")[0] for line in caught.value.problems]
    assert starts == ["model", "base_model", "adapters", "s3"]  # each once, and the bucket
    assert "holds no model" in caught.value.problems[0]
    with pytest.raises(UserError, match=r"no-such-bucket/\S*: .*bucket does not exist"):
        launcher.deploy(tiny_base, instance_type="ml.g5.xlarge", bucket="no-such-bucket")


@pytest.mark.parametrize("instance_type", ["local", "ml.g5.xlarge", "auto"])
@pytest.mark.parametrize("kind", ["not a model", "missing"])
def test_one_line_says_that_there_is_no_model(
    kind: str, instance_type: str, services: EmbeddedServices, tmp_path: Path
) -> None:
    directory = tmp_path / kind
    if kind == "not a model":
        directory.mkdir()
        (directory / "todo.txt").write_text("1")
    with pytest.raises(UserError) as caught:
        launcher.deploy(directory, instance_type=instance_type)
    (line,) = caught.value.problems
    assert str(directory) in line
    assert "dreambooth-sm-endpoint-" not in line  # where the server of this machine has mounted it
    if instance_type != "local":
        with pytest.raises(UserError) as caught:
            launcher.deploy(f"s3://no-such-bucket/{kind}", instance_type=instance_type)
        (line,) = caught.value.problems
        assert line.startswith("s3://no-such-bucket/")


def test_on_this_machine_the_command_serves_until_ctrl_c(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ports: list[int] = []

    class Interrupted:
        def wait(self) -> None:
            ports.append(int(re.findall(r"listening: port=(\d+)", capsys.readouterr().out)[0]))
            assert Client(ports[0]).draw({"prompt": PROMPT, **SMALL}).status == 200
            raise KeyboardInterrupt

    monkeypatch.setattr("launcher.endpoint_commands.threading", types.SimpleNamespace(Event=Interrupted))
    assert main(["deploy", str(tiny_base), "--max_steps", "2"]) == 130
    with pytest.raises(ConnectionError):
        Client(ports[0]).send("GET", "/ping")


def test_the_documents_requests_make_one(services: EmbeddedServices, bucket: S3Uri) -> None:
    document = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = [each for each in re.findall(r"^```python\n(.*?)^```$", document, re.S | re.M) if "_requests(" in each]
    block = block.replace("s3://bucket/models/zwx", str(bucket / "model"))
    exec(block, {"launcher": launcher, "boto3": boto3, "image": "image:1", "role": services.role})
    with launcher.attach_endpoint("zwx") as endpoint:
        assert endpoint.wait().draw(PROMPT, **SMALL)[0].size == (32, 32)


def test_one_that_never_draws_is_removed_with_its_reason(bucket: S3Uri, name: str) -> None:
    with pytest.raises(launcher.EndpointFailed, match=rf"{name}: (.|\n)*error: \S*model"):
        launcher.deploy(str(bucket / "broken"), instance_type="ml.g5.xlarge", name=name, log=lambda line: None)


@pytest.mark.parametrize("removable", [True, False])
def test_what_was_made_before_an_interruption_is_removed_or_named(
    removable: bool, services: EmbeddedServices, bucket: S3Uri, name: str
) -> None:
    session, said = boto3.Session(), list[str]()

    def interrupt(**_: Any) -> None:
        raise KeyboardInterrupt

    def refuse(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "AccessDeniedException", "Message": "no"}}, "DeleteModel")

    session.events.register("before-call.sagemaker.CreateEndpoint", interrupt)
    if not removable:
        session.events.register("before-call.sagemaker.DeleteModel", refuse)
    with pytest.raises(KeyboardInterrupt):
        launcher.deploy(
            str(bucket / "model"), instance_type="ml.g5.xlarge", name=name, log=said.append, session=session
        )
    left = made(services)
    assert len(left) == (0 if removable else 1)
    for model in left:
        assert said[-1].endswith(f": aws sagemaker delete-model --model-name {model}")
        launcher.HostedEndpoint(name).delete()


def test_what_is_on_its_way_when_it_is_interrupted_is_named(
    services: EmbeddedServices, bucket: S3Uri, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, go_on, wait = list[str](), threading.Event(), ServerProcess.wait

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ServerProcess, "wait", lambda server: go_on.wait() and wait(server))
    with monkeypatch.context() as interrupted:
        interrupted.setattr("launcher.endpoints.hosted.time", types.SimpleNamespace(sleep=interrupt))
        with pytest.raises(KeyboardInterrupt):
            launcher.deploy(str(bucket / "model"), instance_type="ml.g5.xlarge", name=name, log=said.append)
    left = [line for line in said if line.startswith("left: ")]
    assert left[0].startswith(f"left: endpoint {name}, which costs money by the hour")
    assert left[0].endswith(f"aws sagemaker delete-endpoint --endpoint-name {name}")
    assert len(left) == len(made(services)) + 1
    assert f"`dreambooth-launcher undeploy {name}`" in left[-1]
    go_on.set()
    launcher.attach_endpoint(name).wait().delete()


def test_all_that_is_in_the_way_is_told_before_anything_is_made(
    services: EmbeddedServices, bucket: S3Uri, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = Hyperparameters.parse({"instance_prompt": PROMPT, "base_architecture": "flux1", "method": "lora"})
    report = json.dumps({"hyperparameters": h.model_dump(mode="json")}).encode()
    put_object(bucket / "large/report.json", report, client=services.clients()("s3"))
    quotas = {"ml.g5.xlarge for endpoint usage": 0.0}
    monkeypatch.setattr("launcher.aws.account.Account._quotas", lambda account: quotas)
    with pytest.raises(UserError) as caught:
        launcher.deploy(
            str(bucket / "nothing"),
            instance_type="ml.g5.xlarge",
            name="a_b",
            role="nobody",
            base_model="/models/base",
            max_instances=0,
            batches=3,
        )
    starts = [line.partition(":")[0] for line in caught.value.problems]
    assert starts == ["model", "base_model", "max_instances", "role", "name", "SERVE_BATCHES"]
    with pytest.raises(UserError) as caught:
        launcher.deploy("trained", instance_type="ml.g5.xlarge", role=services.role, adapters="more")
    places = [line.partition(" is not in S3")[0] for line in caught.value.problems if "S3" in line]
    assert places == ["model: trained", "adapters: more"]  # each once
    with pytest.raises(UserError, match=r"instance_type='ml.g4dn.xlarge': T4 has no bf16.*; .*'auto' takes ml"):
        launcher.deploy(str(bucket / "large"), instance_type="ml.g4dn.xlarge")
    with pytest.raises(UserError, match=r"'ml.g5.xlarge': a picture takes \d+\.\d GB, and A10G has 2.*'auto' takes ml"):
        launcher.deploy(str(bucket / "large"), instance_type="ml.g5.xlarge")
    with pytest.raises(UserError, match=r"'ml.g5.xlarge for endpoint usage' is 0 .*, and the endpoint needs 2"):
        launcher.deploy(str(bucket / "model"), instance_type="ml.g5.xlarge", instance_count=2)
