"""Base models from S3 and from the model hub: against an S3 server, a Secrets Manager, and a hub that speaks HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest

from dreambooth_sm import sources, storage
from dreambooth_sm.embedded import EmbeddedS3
from dreambooth_sm.errors import UserError
from dreambooth_sm.models import load_base
from dreambooth_sm.sources import needed_files
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.stored.checkpoint import write_checkpoint
from dreambooth_sm.stored.directory import read_directory
from tests.helpers.training import hyperparameters, same, weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def aws(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", str(tmp_path / "warm"))


@pytest.mark.usefixtures("aws")
def test_a_prefix_and_an_object_in_s3(target: S3Uri, tiny_base: Path, tmp_path: Path) -> None:
    storage.upload_directory(tiny_base, target / "tiny")
    write_checkpoint(read_directory(tiny_base), tmp_path / "tiny.safetensors", dtype=None)
    storage.s3_client().upload_file(str(tmp_path / "tiny.safetensors"), target.bucket, "models/tiny.safetensors")
    expected = load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_base)))
    for name in (str(target / "tiny"), f"s3://{target.bucket}/models/tiny.safetensors"):
        base = load_base(hyperparameters(pretrained_model_name_or_path=name))
        for part in WEIGHTS:
            assert same(weights(getattr(base, part)), weights(getattr(expected, part)))


@pytest.mark.usefixtures("aws")
def test_a_warm_pool_keeps_what_was_downloaded_until_it_changes(target: S3Uri, tmp_path: Path) -> None:
    client = storage.s3_client()
    uri = target / "model.safetensors"
    client.put_object(Bucket=uri.bucket, Key=uri.prefix, Body=b"one")
    first = sources.fetch(str(uri))
    assert first.is_relative_to(tmp_path / "warm")
    stamp = first.stat().st_mtime_ns
    assert sources.fetch(str(uri)) == first
    assert first.stat().st_mtime_ns == stamp
    client.put_object(Bucket=uri.bucket, Key=uri.prefix, Body=b"two")  # of the same size
    assert sources.fetch(str(uri)).read_bytes() == b"two"


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize("key", ["no/such/prefix", "no/such/model.safetensors"])
def test_nothing_there(target: S3Uri, key: str) -> None:
    storage.s3_client().put_object(Bucket=target.bucket, Key="no/such/other.txt", Body=b"x")
    with pytest.raises(UserError, match=f"s3://{target.bucket}/{key}: there is no"):
        sources.fetch(f"s3://{target.bucket}/{key}")


@pytest.mark.usefixtures("aws")
def test_a_token_from_secrets_manager() -> None:
    client = boto3.client("secretsmanager")
    for name, content in (("plain", "hf_plain\n"), ("json", '{"HF_TOKEN": "hf_json"}'), ("other", '{"a": "hf_x"}')):
        client.create_secret(Name=name, SecretString=content)
    assert sources.read_token(None) is None
    assert sources.read_token("plain") == "hf_plain"
    assert sources.read_token("json") == "hf_json"
    with pytest.raises(UserError, match="HF_TOKEN") as caught:
        sources.read_token("other")
    assert "hf_x" not in str(caught.value)
    with pytest.raises(UserError, match="GetSecretValue"):
        sources.read_token("none")


class Hub:
    """One repository, served as the model hub serves it.

    Attributes:
        fetched: files that were asked for.
        tokens: what requests for them were authorised with.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.fetched: set[str] = set()
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                if path.startswith("/api/models/owner/model/tree"):
                    body = json.dumps(
                        [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
                    ).encode()
                    return self.answer(body)
                if path.startswith("/api/models/owner/model"):
                    siblings = [{"rfilename": name} for name in files]
                    return self.answer(json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode())
                prefix = f"/owner/model/resolve/{COMMIT}/"
                name = path.removeprefix(prefix)
                if not path.startswith(prefix) or name not in files:
                    return self.answer(b"", 404)
                hub.fetched.add(name)
                hub.tokens.add(self.headers["Authorization"])
                return self.answer(files[name])

            do_HEAD = do_GET  # noqa: N815

            def answer(self, body: bytes, status: int = 200) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:x}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fetch(self, home: Path, **options: str) -> subprocess.CompletedProcess[str]:
        """In a process of its own: the hub's client reads its environment when it is imported."""
        code = (
            "import sys; from dreambooth_sm import sources; from dreambooth_sm.errors import UserError\n"
            f"try: print(sources.fetch('owner/model', **{options!r}))\n"
            "except UserError as error: sys.exit(str(error))"
        )
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
        }
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def hub(tiny_base: Path) -> Iterator[Hub]:
    """A repository as SD 1.5's: several formats and variants, a single file, a safety checker, a licence."""
    files = {str(path.relative_to(tiny_base)): path.read_bytes() for path in tiny_base.rglob("*") if path.is_file()}
    for part, stem in WEIGHTS.items():
        whole = files[f"{part}/{stem}.safetensors"]
        files[f"{part}/{stem}.fp16.safetensors"] = whole
        files[f"{part}/{stem}.fp16.bin"] = b"pickle"
        files[f"{part}/{stem}.non_ema.safetensors"] = b"other"
    files |= {"v1-5-pruned.ckpt": b"pickle", "safety_checker/model.safetensors": b"x", "README.md": b"x"}
    served = Hub(files)
    yield served
    served.server.shutdown()


def test_only_the_files_that_are_needed_come_from_the_hub(hub: Hub, tmp_path: Path, tiny_base: Path) -> None:
    ended = hub.fetch(tmp_path / "hub", revision="main")
    assert ended.returncode == 0, ended.stderr
    assert {name for name in hub.fetched if name.endswith((".safetensors", ".bin", ".ckpt"))} == {
        f"{part}/{stem}.fp16.safetensors" for part, stem in WEIGHTS.items()
    }
    assert "README.md" not in hub.fetched
    assert hub.tokens == {"Bearer hf_test"}
    base = load_base(hyperparameters(pretrained_model_name_or_path=ended.stdout.strip()))
    expected = load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_base)))
    assert same(weights(base.unet), weights(expected.unet))
    hub.server.shutdown()
    hub.server.server_close()
    again = hub.fetch(tmp_path / "hub", revision="main")  # the network is gone, the cache is not
    assert again.stdout == ended.stdout, again.stderr


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    assert "variant=ema" in hub.fetch(tmp_path / "hub", variant="ema").stderr
    hub.server.shutdown()
    hub.server.server_close()
    assert "network" in hub.fetch(tmp_path / "empty").stderr


def test_a_format_and_a_variant_are_chosen() -> None:
    names = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin", "tokenizer/vocab.json"]
    assert needed_files(names, None) == [names[0], names[1], names[3], names[2]]
    sharded = [f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert needed_files([*names, *sharded], None)[3:] == sharded
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert needed_files([*names, *sharded, half], None)[3:] == [half]
    assert needed_files(["config.json", "diffusion_pytorch_model.safetensors"], None) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    averaged = "unet/diffusion_pytorch_model.non_ema.safetensors"  # a variant that not every part has
    encoder = "text_encoder/model.safetensors"
    assert needed_files([*names, half, averaged, encoder], "non_ema")[3:] == [averaged, encoder]
    assert needed_files(["README.md"], None) == []
