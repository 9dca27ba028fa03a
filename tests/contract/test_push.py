"""`build_and_push.sh` with real engines, `aws` and a real registry; only ECR's own API is a stand-in, on loopback.

Needs a Docker engine, the AWS CLI, and the registry of the package `docker-registry`; and Podman for its own case.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dreambooth_sm import __version__
from launcher.aws.image_tags import build_digest, code_digest, image_tag
from launcher.local.s3 import EmbeddedS3, embedded_s3
from launcher.local.signatures import Application
from tests.helpers.containers import BASE_IMAGE, DOCKER, ROOT, docker, needs_engine
from tests.helpers.patience import PATIENCE

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
# Answers as ECR's credential helper does: it keeps no logins, and knows this registry without one.
CREDENTIAL_HELPER = """#!/bin/sh
case $1 in get) echo '{"ServerURL": "", "Username": "AWS", "Secret": "x"}' ;; *) echo 'not implemented'; exit 1 ;; esac
"""
DOCKERFILE = """ARG BASE_IMAGE
FROM scratch
COPY dreambooth_sm/ /dreambooth_sm/
ARG VERSION
ARG BUILD
LABEL version="${VERSION}" build="${BUILD}"
"""

pytestmark = [
    needs_engine,
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("docker-registry"), reason="needs a registry: apt-get install docker-registry"),
    pytest.mark.skipif(not shutil.which("aws"), reason="needs the AWS CLI: pip install awscli"),
]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Address of an empty registry."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = tmp_path / "registry.yml"
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    config.write_text(json.dumps({"version": 0.1, "storage": storage, "http": {"addr": address}}))
    with (tmp_path / "registry.log").open("w") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(f"http://{address}/v2/").close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "registry.log").read_text()  # noqa: PT018
            time.sleep(0.1)
    yield address
    process.terminate()
    process.wait()


def ask(registry: str, repository: str, name: str, put: bytes | None = None) -> tuple[str, str, bytes]:
    """Digest, media type and manifest of what the registry holds under a tag or digest; ``put``: a manifest for it."""
    headers = {"Accept": MANIFEST} if put is None else {"Content-Type": MANIFEST}
    url = f"http://{registry}/v2/{repository}/manifests/{name}"
    request = urllib.request.Request(url, put, headers, method="PUT" if put else "GET")
    with urllib.request.urlopen(request) as answer:
        return answer.headers["Docker-Content-Digest"], answer.headers["Content-Type"] or "", answer.read()


def stored(registry: str, repository: str, tag: str) -> tuple[str, str]:
    """Digest and media type of what the registry holds under a tag."""
    return ask(registry, repository, tag)[:2]


def answer_images(registry: str, operation: str, request: dict[str, Any]) -> dict[str, Any]:
    """What ECR answers about images.

    Raises:
        urllib.error.HTTPError: the image is not there.
    """
    repository = request["repositoryName"]
    if operation == "PutImage":
        manifest = request["imageManifest"].encode()
        assert request["imageDigest"] == f"sha256:{hashlib.sha256(manifest).hexdigest()}", "to the byte, as ECR asks"
        ask(registry, repository, request["imageTag"], manifest)
        return {"image": {"repositoryName": repository}}
    (wanted,) = request["imageIds"]
    digest, media_type, found = ask(registry, repository, *wanted.values())
    if operation == "BatchGetImage":
        return {"images": [{"imageManifest": found.decode()}], "failures": []}
    return {"imageDetails": [{"imageDigest": digest, "imageManifestMediaType": media_type}]}


def ecr_in_front_of(registry: str) -> Callable[[Application], Application]:
    """moto's ECR, whose repositories lie in a registry of ours, and which knows what was pushed there."""

    def front(application: Application) -> Application:
        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            operation = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            if operation in ("DescribeImages", "BatchGetImage", "PutImage"):
                status = "200 OK"
                try:
                    said = answer_images(registry, operation, json.loads(body))
                except urllib.error.HTTPError:
                    status, said = "400 Bad Request", {"__type": "ImageNotFoundException", "message": "there is none"}
                start_response(status, [("Content-Type", "application/x-amz-json-1.1")])
                return [json.dumps(said).encode()]
            heads: list[Any] = []
            content = b"".join(
                application(environ | {"wsgi.input": io.BytesIO(body)}, lambda *head: heads.append(head))
            ).replace(b"123456789012.dkr.ecr.us-east-1.amazonaws.com", registry.encode())
            status, headers = heads[0][:2]
            kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
            start_response(status, [*kept, ("Content-Length", str(len(content)))])
            return [content]

        return answer

    return front


@pytest.fixture
def ecr(registry: str) -> Iterator[EmbeddedS3]:
    with embedded_s3(ecr_in_front_of(registry)) as services:
        yield services


@pytest.mark.parametrize(
    "engine",
    [
        "docker",
        "docker with ECR's credential helper",
        pytest.param("podman", marks=pytest.mark.skipif(not shutil.which("podman"), reason="needs Podman")),
    ],
)
def test_what_is_pushed_can_be_pulled_by_the_uri_that_is_printed(
    engine: str, ecr: EmbeddedS3, registry: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkout = tmp_path / "checkout"
    for name in ("build_and_push.sh", "dreambooth_sm/__init__.py", "launcher/aws/image_tags.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").symlink_to(shutil.which(DOCKER) or DOCKER)

    def add(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(script)
        path.chmod(0o755)

    # Before 2.13 the AWS CLI does not read AWS_ENDPOINT_URL.
    add("aws", f'#!/bin/sh\nexec {shutil.which("aws")} --endpoint-url "$AWS_ENDPOINT_URL" "$@"\n')
    options = []
    if engine == "podman":
        options = ["--engine", "podman"]
        runroot = tmp_path_factory.mktemp("run")  # its path has to be short
        storage = f"--root={tmp_path}/storage --runroot={runroot} --storage-driver=vfs"
        add("podman", f'#!/bin/sh\nexec {shutil.which("podman")} {storage} "$@"\n')
        (tmp_path / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')
    elif engine != "docker":
        add("docker-credential-ecr-login", CREDENTIAL_HELPER)
        (tmp_path / "docker").mkdir()
        (tmp_path / "docker" / "config.json").write_text(json.dumps({"credHelpers": {registry: "ecr-login"}}))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        **ecr.environment(),
        "DOCKER_CONFIG": str(tmp_path / "docker"),
        "CONTAINERS_REGISTRIES_CONF": str(tmp_path / "registries.conf"),
        "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    repository = f"push-{os.urandom(4).hex()}"
    uris = []
    tag = image_tag(
        __version__,
        "",
        code_digest(checkout / "dreambooth_sm"),
        build_digest([f"BASE_IMAGE={BASE_IMAGE}"], checkout),
    )
    command = ["./build_and_push.sh", *options, "--repository", repository, "--base-image", BASE_IMAGE]
    helps_itself = "credential helper" in engine
    for _ in range(1 if helps_itself else 2):  # the second finds the build, and makes nothing
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        uris += done.stdout.splitlines()
        first = len(uris) == 1
        assert ("creating the ECR repository" in done.stderr) == first
        assert (f"{tag} is there already" in done.stderr) == (not first)
        assert ("logs in by itself" in done.stderr) == (first and helps_itself)
    digest, media_type = stored(registry, repository, "latest")
    assert {*uris} == {f"{registry}/{repository}@{digest}"}
    assert media_type == MANIFEST
    assert stored(registry, repository, __version__) == stored(registry, repository, tag) == (digest, media_type)

    docker("rmi", f"{registry}/{repository}:{tag}")
    pulled = docker("pull", uris[0])
    assert pulled.returncode == 0, pulled.stderr
    labels = docker("image", "inspect", "--format", "{{.Config.Labels.version}} {{.Config.Labels.build}}", uris[0])
    assert labels.stdout.split() == [__version__, tag]
    docker("rmi", uris[0])
    if helps_itself:
        return  # all else is as without it

    (checkout / "dreambooth_sm" / "new.py").write_text("")
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    (other,) = done.stdout.splitlines()
    assert other != uris[0], "another build"
    assert stored(registry, repository, "latest")[0] == other.rpartition("@")[2] != digest
    assert stored(registry, repository, tag)[0] == digest, "the tag of the first build stays"
    docker("rmi", *docker("images", "--quiet", f"{registry}/{repository}").stdout.split())
