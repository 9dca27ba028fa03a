"""The way to S3: TLS, proxies, connections that were closed meanwhile, refusals."""

from __future__ import annotations

import ipaddress
import ssl
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3.session
import pytest

from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import (
    S3Uri,
    UploadError,
    download_directory,
    s3_client,
    upload_directory,
    verify,
)
from launcher.local.s3 import EmbeddedS3
from tests.helpers.s3_proxy import Answer, Request, s3_proxy

PART = 5 * 2**20


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "model/unet").mkdir(parents=True)
    (tmp_path / "model/unet/weights").write_bytes(bytes(range(256)) * (2 * PART // 256) + b"end")
    for number in range(5):
        (tmp_path / f"model/{number} #ä+?.json").write_text(str(number))
    return tmp_path / "model"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def there_and_back(tree: Path, target: S3Uri, copy: Path, client: Any) -> None:
    upload_directory(tree, target, part_size=PART, client=client)
    assert verify(target, client=client).whole
    download_directory(target, copy, part_size=PART, client=client)
    assert contents(copy) == contents(tree)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 with its key, signed by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (tmp_path / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return tmp_path / "certificate.pem"


def test_by_https(
    s3: EmbeddedS3, target: S3Uri, tree: Path, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with s3_proxy(s3, tls=context) as address:
        with pytest.raises(UploadError, match="check the network"):
            upload_directory(tree, target, client=s3_client(s3.session(), endpoint_url=address, attempts=1))
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        there_and_back(tree, target, tmp_path / "copy", s3_client(s3.session(), endpoint_url=address))


def test_by_https_with_the_certificates_of_a_profile(
    s3: EmbeddedS3, target: S3Uri, tree: Path, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    keys = s3.session().get_credentials().get_frozen_credentials()
    (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\nca_bundle = {certificate}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)  # which comes before
    session = boto3.session.Session(keys.access_key, keys.secret_key, profile_name="mine")
    with s3_proxy(s3, tls=context) as address:
        there_and_back(tree, target, tmp_path / "copy", s3_client(session, endpoint_url=address))


def test_through_a_proxy_that_is_reached_by_https(
    s3: EmbeddedS3, target: S3Uri, tree: Path, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    seen: Counter[str] = Counter()

    def note(request: Request) -> None:
        request.headers["host"] = urlsplit(s3.endpoint_url).netloc
        seen[request.operation] += 1

    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with s3_proxy(s3, note, tls=context) as address:
        monkeypatch.setenv("HTTP_PROXY", address)
        there_and_back(tree, target, tmp_path / "copy", s3_client(s3.session(), endpoint_url="http://s3.example:9000"))
    assert seen["PutObject"] == 5 + 1


def test_through_a_proxy(
    s3: EmbeddedS3, target: S3Uri, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()

    def note(request: Request) -> None:
        assert request.headers["host"] == "s3.example:9000"
        request.headers["host"] = urlsplit(s3.endpoint_url).netloc  # moto would take "s3" for the bucket's name
        seen[request.operation] += 1

    with s3_proxy(s3, note) as address:
        monkeypatch.setenv("HTTP_PROXY", address)
        there_and_back(tree, target, tmp_path / "copy", s3_client(s3.session(), endpoint_url="http://s3.example:9000"))
    assert seen["PutObject"] == 5 + 1
    assert seen["UploadPart"] == 3


def test_connections_that_were_closed_meanwhile_cost_no_try(
    s3: EmbeddedS3, target: S3Uri, tree: Path, tmp_path: Path
) -> None:
    def hang_up(request: Request, answer: Answer) -> None:
        answer.hang_up = True

    with s3_proxy(s3, after=hang_up) as address:
        there_and_back(tree, target, tmp_path / "copy", s3_client(s3.session(), endpoint_url=address, attempts=2))


def test_a_refusal_is_not_tried_again(s3: EmbeddedS3, target: S3Uri, tree: Path) -> None:
    tries: Counter[str] = Counter()

    def refuse(request: Request) -> Answer | None:
        tries[request.operation] += 1
        return Answer.error(403, "AccessDenied") if request.operation == "PutObject" else None

    with (
        s3_proxy(s3, refuse) as address,
        pytest.raises(UserError, match=r"#ä\+\?.json: access denied: allow s3:PutObject"),
    ):
        upload_directory(tree, target, client=s3_client(s3.session(), endpoint_url=address), workers=1)
    assert tries["PutObject"] == 1


def test_a_bucket_in_another_region_is_found(s3: EmbeddedS3, target: S3Uri, tree: Path, tmp_path: Path) -> None:
    def elsewhere(request: Request) -> Answer | None:
        if "/eu-central-1/s3/" in request.headers["authorization"]:
            return None
        answer = Answer.error(301, "PermanentRedirect")
        answer.headers["x-amz-bucket-region"] = "eu-central-1"
        return answer

    with s3_proxy(s3, elsewhere) as address:
        there_and_back(tree, target, tmp_path / "copy", s3_client(s3.session(), endpoint_url=address))
        # The first request to the bucket is one of ours.
        download_directory(target, tmp_path / "again", client=s3_client(s3.session(), endpoint_url=address))
    assert contents(tmp_path / "again") == contents(tree)
