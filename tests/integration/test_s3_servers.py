"""Servers that are not AWS's, and ways to them that are not straight: what the user has set is what counts."""

from __future__ import annotations

import io
import socket
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3.session
import pytest

from dreambooth_sm import s3 as requests
from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import (
    MANIFEST_NAME,
    S3Options,
    S3Uri,
    TransferError,
    UploadError,
    check_writable,
    download_directory,
    list_objects,
    s3_client,
    upload_directory,
    verify,
)
from launcher.jobs.archive import unpack
from launcher.local.s3 import EmbeddedS3
from launcher.prepare import prepare
from launcher.staging import stage
from tests.helpers.s3_proxy import Answer, Request, s3_proxy

PART = 5 * 2**20


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "model/unet").mkdir(parents=True)
    (tmp_path / "model/unet/weights").write_bytes(bytes(range(256)) * (2 * PART // 256) + b"end")
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/empty").write_bytes(b"")
    return tmp_path / "model"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def there_and_back(tree: Path, target: S3Uri, client: requests.S3Client, options: S3Options = S3Options()) -> None:  # noqa: B008
    check_writable(target, options, client=client)
    assert list_objects(target, options, client=client) == {}
    upload_directory(tree, target, options, part_size=PART, client=client)
    assert verify(target, options, client=client).whole
    copy = tree.with_name(f"copy-{len(list(tree.parent.iterdir()))}")
    download_directory(target, copy, options, part_size=PART, client=client)
    assert contents(copy) == contents(tree)


@pytest.fixture(autouse=True)
def _plain_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    requests._without_checksums.clear()
    yield
    requests._without_checksums.clear()


# --- Servers that do not know checksums -------------------------------------------------------------------------------


def has_checksums(request: Request) -> bool:
    names = any("checksum" in name for name in request.headers)
    return names or b"Checksum" in request.body or "checksum" in request.headers.get("x-amz-trailer", "")


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "InvalidArgument"), (501, "NotImplemented"), (400, "InvalidRequest"), (400, "Whatever"), (405, "No")],
)
@pytest.mark.parametrize("tells", ["md5", "nothing"])
def test_a_server_that_refuses_checksums(
    s3: EmbeddedS3, target: S3Uri, tree: Path, status: int, code: str, tells: str
) -> None:
    refused: Counter[str] = Counter()
    md5s: Counter[str] = Counter()
    read: set[str] = set()

    def refuse(request: Request) -> Answer | None:
        if has_checksums(request):
            refused[request.operation] += 1
            return Answer(status, {}) if request.method == "HEAD" else Answer.error(status, code)
        if request.operation in ("PutObject", "UploadPart"):
            md5s[request.operation] += "content-md5" in request.headers
        if request.operation == "GetObject":
            read.add(request.key)
        return None

    def tell(request: Request, answer: Answer) -> None:
        for name in [name for name in answer.headers if "checksum" in name]:
            del answer.headers[name]
        if tells == "nothing" and request.operation in ("PutObject", "UploadPart", "CompleteMultipartUpload"):
            answer.headers["etag"] = answer.headers.get("etag", '"x"') if "Upload" in request.operation else '"0-1"'
            answer.body = answer.body.replace(b"&quot;", b"")

    with s3_proxy(s3, refuse, tell) as address:
        client = s3_client(s3.session(), endpoint_url=address)
        check_writable(target, client=client)
        assert sum(refused.values()) <= 2, "the check finds out"
        there_and_back(tree, target, client)
        assert sum(refused.values()) <= 2, "it is remembered"
        assert md5s["PutObject"] >= 4
        assert md5s["UploadPart"] >= 3
    if tells == "nothing":
        assert (target / "config.json").prefix in read


def test_damage_is_noticed_without_checksums_as_well(s3: EmbeddedS3, target: S3Uri, tree: Path) -> None:
    def damage(request: Request) -> Answer | None:
        if has_checksums(request):
            return Answer.error(501, "NotImplemented")
        if request.operation == "UploadPart" and request.query["partNumber"] == ["2"]:
            request.body = b"!" + request.body[1:]
            request.headers.pop("content-md5", None)  # a server that does not look
        return None

    with s3_proxy(s3, damage) as address:
        client = s3_client(s3.session(), endpoint_url=address)
        with pytest.raises(TransferError, match="unet/weights"):
            upload_directory(tree, target, part_size=PART, client=client)
    assert MANIFEST_NAME not in list_objects(target, client=s3.client())


# --- Addresses and ways -----------------------------------------------------------------------------------------------


@pytest.fixture
def virtual_only(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that wants the bucket's name in the host's, as Alibaba's and Tencent's do."""
    domain = "oss.example:9000"

    def serve(request: Request) -> Answer | None:
        host = request.headers["host"]
        if host == domain:
            return Answer.error(403, "SecondLevelDomainForbidden")
        assert host.endswith(f".{domain}")
        request.target = f"/{host.removesuffix(f'.{domain}')}{request.target}"
        request.headers["host"] = urlsplit(s3.endpoint_url).netloc
        return None

    with s3_proxy(s3, serve) as address:
        monkeypatch.setenv("HTTP_PROXY", address)
        yield f"http://{domain}"


def test_a_virtual_hosted_store(s3: EmbeddedS3, target: S3Uri, tree: Path, tmp_path: Path, virtual_only: str) -> None:
    with pytest.raises(UserError, match="s3_addressing_style=virtual"):
        check_writable(target, client=s3_client(s3.session(), endpoint_url=virtual_only))
    client = s3_client(s3.session(), endpoint_url=virtual_only, addressing_style="virtual")
    there_and_back(tree, target, client)
    (tmp_path / "config").write_text("[profile oss]\nregion = us-east-1\ns3 =\n  addressing_style = virtual\n")
    keys = s3.session().get_credentials().get_frozen_credentials()
    session = boto3.session.Session(keys.access_key, keys.secret_key, profile_name="oss")
    there_and_back(tree, target / "profile", s3_client(session, endpoint_url=virtual_only))


class Address(Exception):  # noqa: N818
    """Where a request would have gone."""


def address_of(client: requests.S3Client) -> str:
    def stop(request: Any, **_: object) -> None:
        raise Address(request.url)

    client.meta.events.register("before-send.s3", stop)
    with pytest.raises(Address) as caught:
        client.get_object(Bucket="models", Key="x")
    return str(caught.value)


def test_buckets_are_in_the_path_of_other_endpoints_and_in_the_host_of_aws(s3: EmbeddedS3) -> None:
    def address(**options: str) -> str:
        client = s3_client(boto3.session.Session("k", "s", region_name="eu-west-1"), **options)  # type: ignore[arg-type]
        return address_of(client)

    assert address() == "https://models.s3.eu-west-1.amazonaws.com/x"
    assert address(endpoint_url="https://minio.example:9000") == "https://minio.example:9000/models/x"
    assert address(endpoint_url="http://[::1]:9000") == "http://[::1]:9000/models/x"


@pytest.mark.parametrize(
    ("setting", "host"),
    [
        ("use_fips_endpoint = true", "models.s3-fips.us-east-2.amazonaws.com"),
        ("use_dualstack_endpoint = true", "models.s3.dualstack.us-east-2.amazonaws.com"),
        ("s3 =\n  addressing_style = path", "s3.us-east-2.amazonaws.com/models"),
        ("endpoint_url = https://ceph.example", "ceph.example/models"),
    ],
)
def test_a_profiles_settings_count(tmp_path: Path, setting: str, host: str) -> None:
    (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-2\n{setting}\n")
    client = s3_client(boto3.session.Session("k", "s", profile_name="mine"))
    assert address_of(client) == f"https://{host}/x"


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_by_ipv6(s3: EmbeddedS3, target: S3Uri, tree: Path) -> None:
    try:
        with s3_proxy(s3, host="::1") as address:
            there_and_back(tree, target, s3_client(s3.session(), endpoint_url=address))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")


def test_a_proxy_without_a_port_is_a_proxy(
    s3: EmbeddedS3, target: S3Uri, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.77")
    client = s3_client(s3.session(), endpoint_url="http://s3.example:9000", attempts=1)
    with pytest.raises(UploadError, match=r"proxy.*127\.0\.0\.77.*check the network"):
        upload_directory(tree, target, client=client)


# --- The check before the job, and options ----------------------------------------------------------------------------


def test_the_check_sends_the_kinds_of_requests_that_the_upload_sends(s3: EmbeddedS3, target: S3Uri, tree: Path) -> None:
    kinds: dict[str, set[tuple[str, ...]]] = {}

    def note(request: Request) -> None:
        headers = {n: v for n, v in request.headers.items() if n.startswith(("x-amz-", "content-type", "content-md5"))}
        for name in [n for n in headers if n in ("x-amz-date", "x-amz-content-sha256") or "crc64nvme" in n]:
            headers[name] = "any"
        kinds.setdefault(request.operation, set()).add(tuple(sorted(map(str, headers.items()))))

    options = S3Options("key-1", "bucket-owner-full-control", {"team": "toys"}, "ONEZONE_IA", True)
    with s3_proxy(s3, note) as address:
        client = s3_client(s3.session(), endpoint_url=address)
        check_writable(target, options, client=client)
        tried = dict(kinds)
        kinds.clear()
        upload_directory(tree, target, options, part_size=PART, client=client)
    assert kinds.keys() >= {"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}
    for operation, sent in kinds.items():
        assert tried[operation] == sent, operation
    assert "DeleteObject" in tried
    assert ".upload-check" not in list_objects(target, client=s3.client())


@pytest.mark.parametrize("operation", ["PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
def test_what_the_upload_may_not_do_the_check_finds(s3: EmbeddedS3, target: S3Uri, operation: str) -> None:
    def deny(request: Request) -> Answer | None:
        return Answer.error(403, "AccessDenied") if request.operation == operation else None

    with s3_proxy(s3, deny) as address, pytest.raises(UserError, match="access denied"):
        check_writable(target, client=s3_client(s3.session(), endpoint_url=address))


def test_a_bucket_that_lets_nobody_delete_takes_models(s3: EmbeddedS3, target: S3Uri, tree: Path) -> None:
    def deny(request: Request) -> Answer | None:
        return Answer.error(403, "AccessDenied") if request.operation == "DeleteObject" else None

    with s3_proxy(s3, deny) as address:
        client = s3_client(s3.session(), endpoint_url=address)
        check_writable(target, client=client)
        upload_directory(tree, target, part_size=PART, client=client)
    assert verify(target, client=s3.client()).whole


@pytest.mark.parametrize(
    ("options", "algorithm"),
    [(S3Options("key-1"), "aws:kms"), (S3Options(encryption="AES256"), "AES256"), (S3Options(), None)],
)
def test_pictures_are_staged_as_a_buckets_policy_demands(
    s3: EmbeddedS3, target: S3Uri, tree: Path, options: S3Options, algorithm: str | None
) -> None:
    def demand(request: Request) -> Answer | None:
        makes = request.operation in ("PutObject", "CreateMultipartUpload")
        right = request.headers.get("x-amz-server-side-encryption") == (algorithm or "aws:kms")
        return Answer.error(403, "AccessDenied") if makes and not right else None

    files = {name: tree / name for name in contents(tree)}
    with s3_proxy(s3, demand) as address:
        client = s3_client(s3.session(), endpoint_url=address)
        if algorithm is None:
            with pytest.raises(UserError, match="s3_encryption"):
                stage(files, target, client, options)
            return
        assert stage(files, target, client, options)
    head = s3.client().head_object(Bucket=target.bucket, Key=(target / "config.json").prefix)
    assert head["ServerSideEncryption"] == algorithm


@pytest.mark.parametrize(
    ("options", "writing"),
    [
        ({}, S3Options()),
        ({"kms": "key-1"}, S3Options("key-1")),
        ({"kms": "key-1", "s3_kms_key_id": "key-2"}, S3Options("key-2")),
        ({"s3_encryption": "AES256", "s3_requester_pays": True}, S3Options(encryption="AES256", requester_pays=True)),
        ({"s3_acl": "bucket-owner-full-control"}, S3Options(acl="bucket-owner-full-control")),
    ],
)
def test_an_order_sends_its_files_as_the_job_writes(
    pictures: Path, options: dict[str, Any], writing: S3Options
) -> None:
    common = {
        "images": pictures,
        "instance_prompt": "photo of zwx toy",
        "instance_type": "ml.g5.xlarge",
        "resolution": 64,
    }
    assert prepare({**common, **options}, None).options == writing


# --- A model.tar.gz ---------------------------------------------------------------------------------------------------


def packed(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


MODEL = {"unet/weights": bytes(range(256)) * 4000, "model_index.json": b"{}"}


def put(s3: EmbeddedS3, uri: S3Uri, body: bytes) -> str:
    s3.client().put_object(Bucket=uri.bucket, Key=uri.prefix, Body=body)
    return str(uri)


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_an_archive_comes_through_a_bad_network(s3: EmbeddedS3, target: S3Uri, tmp_path: Path, mode: str) -> None:
    source = put(s3, target / "model.tar.gz", packed(MODEL, mode))
    reads: Counter[str] = Counter()

    def cut(request: Request, answer: Answer) -> None:
        reads[request.operation] += 1
        if request.operation == "GetObject" and reads["GetObject"] < 3:
            answer.cut = len(answer.body) // 2

    with s3_proxy(s3, after=cut) as address:
        client = s3_client(s3.session(), endpoint_url=address)
        unpack(source, tmp_path / "new" / "model", client, S3Options())
    assert reads["GetObject"] == 3
    assert contents(tmp_path / "new") == {f"model/{name}": content for name, content in MODEL.items()}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (packed(MODEL)[:-200], "can't be unpacked"),
        (packed(MODEL)[:40], "can't be unpacked"),
        (packed(MODEL, "w")[:-600_000], "can't be unpacked"),
        (b"<html>not an archive</html>" * 100, "can't be unpacked"),
        (b"", "can't be unpacked"),
        (packed({}), "holds no files"),
        (packed({"../../evil": b"1"}), "holds no files"),
        (None, "there is no such object"),
    ],
    ids=[
        "cut",
        "cut at its start",
        "cut without gzip",
        "something else",
        "empty",
        "no files",
        "only astray",
        "missing",
    ],
)
@pytest.mark.parametrize("place", ["s3", "here"])
def test_an_archive_that_is_not_whole_is_one_clear_line(
    s3: EmbeddedS3, target: S3Uri, tmp_path: Path, body: bytes | None, told: str, place: str
) -> None:
    source = str(target / "model.tar.gz") if place == "s3" else str(tmp_path / "model.tar.gz")
    if body is not None:
        put(s3, target / "model.tar.gz", body)
        (tmp_path / "model.tar.gz").write_bytes(body)
    elif place == "here":
        told = "can't be unpacked"
    with pytest.raises(UserError, match=told) as caught:
        unpack(source, tmp_path / "out" / "model", s3.client(), S3Options())
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    assert source in str(caught.value)
    assert contents(tmp_path / "out") == {}, "nothing is left half-way"
