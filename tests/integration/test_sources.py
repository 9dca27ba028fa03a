"""Base models from S3 and from the model hub: against an S3 server, a Secrets Manager, and a hub that speaks HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import boto3
import pytest

from dreambooth_sm import sources, storage
from dreambooth_sm.errors import UserError
from dreambooth_sm.models import check_base, load_base
from dreambooth_sm.sources import needed_files
from dreambooth_sm.storage import S3Uri
from dreambooth_sm.stored.directory import read_directory
from dreambooth_sm.stored.single_file import write_single_file
from launcher.local.s3 import EmbeddedS3
from tests.helpers.hub import STEMS, Hub
from tests.helpers.training import hyperparameters, same, weights


@pytest.fixture
def aws(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", str(tmp_path / "warm"))


def test_a_folder_of_a_shipped_models_name_is_not_that_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("toybox", "mine"):
        Path(name).mkdir()
    told = [name for name in ("toybox", "mine", "owner/mine", "/mine", "s3://mine/toybox") if sources.is_local(name)]
    assert told == ["mine", "/mine"]


@pytest.mark.usefixtures("aws")
def test_a_prefix_and_an_object_in_s3(target: S3Uri, tiny_base: Path, tmp_path: Path) -> None:
    storage.upload_directory(tiny_base, target / "tiny")
    write_single_file(read_directory(tiny_base), tmp_path / "tiny.safetensors", dtype=None)
    storage.s3_client().upload_file(str(tmp_path / "tiny.safetensors"), target.bucket, "models/tiny.safetensors")
    expected = load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_base)))
    for name in (str(target / "tiny"), f"s3://{target.bucket}/models/tiny.safetensors"):
        base = load_base(hyperparameters(pretrained_model_name_or_path=name))
        for part in STEMS:
            assert same(weights(getattr(base, part)), weights(getattr(expected, part)))


@pytest.mark.usefixtures("aws")
def test_a_prefix_one_level_too_high_an_archive_and_names_that_say_nothing(
    target: S3Uri, tiny_base: Path, tmp_path: Path
) -> None:
    storage.upload_directory(tiny_base, target / "deep" / "er" / "tiny")
    write_single_file(read_directory(tiny_base), tmp_path / "tiny.safetensors", dtype=None)
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(tiny_base, ".")
    client = storage.s3_client()
    for name, key in (
        ("tiny.safetensors", "file/TINY.SAFETENSORS"),
        ("tiny.safetensors", "file/tiny"),
        ("model.tar.gz", "job/output/model.tar.gz"),
    ):
        client.upload_file(str(tmp_path / name), target.bucket, key)
    client.put_object(Bucket=target.bucket, Key="file/tiny-and-more", Body=b"x")
    unet = load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_base))).unet
    for place in (
        str(target / "deep"),
        str(target),
        *(f"s3://{target.bucket}/{key}" for key in ("file/TINY.SAFETENSORS", "file/tiny", "job/output/model.tar.gz")),
        f"s3://{target.bucket}/job/output",
    ):
        h = hyperparameters(pretrained_model_name_or_path=place)
        check_base(h)
        assert same(weights(load_base(h).unet), weights(unet))
    storage.upload_directory(tiny_base, target / "deep" / "er" / "other")
    with pytest.raises(UserError, match=r"several models .* name one of them, such as .*/deep/er/other"):
        check_base(hyperparameters(pretrained_model_name_or_path=str(target / "deep")))


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


def test_models_are_kept_where_nobody_else_can_put_any(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = sources.cache_directory()
    assert directory == sources.cache_directory()
    assert (directory.parent, directory.stat().st_mode & 0o777) == (tmp_path, 0o700)
    directory.chmod(0o777)
    with pytest.raises(UserError, match=f"{directory}.* is not a directory that this user alone can write to"):
        sources.cache_directory()
    directory.rmdir()
    (tmp_path / "others").mkdir()
    directory.symlink_to(tmp_path / "others")
    with pytest.raises(UserError, match="TMPDIR"):
        sources.cache_directory()
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "dreambooth-sm-models-12345").mkdir(mode=0o700)  # by another user
    with pytest.raises(UserError, match="this user alone"):
        sources.cache_directory()


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


def test_only_the_files_that_are_needed_come_from_the_hub(hub: Hub, tmp_path: Path, tiny_base: Path) -> None:
    ended = hub.fetch(tmp_path / "hub", revision="main")
    assert ended.returncode == 0, ended.stderr
    assert {name for name in hub.fetched if name.endswith((".safetensors", ".bin", ".ckpt"))} == {
        f"{part}/{stem}.fp16.safetensors" for part, stem in STEMS.items()
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


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_large_files_come_from_a_mirror_in_ranges(
    hub: Hub, tmp_path: Path, tiny_base: Path, knows_ranges: bool
) -> None:
    hub.knows_ranges = knows_ranges
    code = (
        "from dreambooth_sm import hub_ranges, sources; hub_ranges._RANGE = 9000; print(sources.fetch('owner/model'))"
    )
    environment = {**os.environ, **hub.environment(tmp_path / "hub")}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for part, stem in STEMS.items():
        name = f"{part}/{stem}.fp16.safetensors"
        whole = (tiny_base / part / f"{stem}.safetensors").read_bytes()
        assert (Path(ended.stdout.strip()) / name).read_bytes() == whole
        ranges = {f"bytes={first}-{min(first + 9000, len(whole)) - 1}" for first in range(0, len(whole), 9000)}
        assert len(ranges) > 1
        assert {*hub.ranges.get(name, [])} == (ranges if knows_ranges else set())
        assert not knows_ranges or hub.sent.count(name) == len(ranges)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".incomplete"]


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
    second = ["text_encoder_2/config.json", "tokenizer_2/merges.txt", "text_encoder_2/model.fp16.safetensors"]  # SDXL's
    others = ["text_encoder_2/model.onnx", "vae_decoder/model.onnx", "sd_xl_base_1.0.safetensors"]
    assert needed_files([*others, *names, *second], None) == [
        *(names[0], names[1], names[3], second[0], second[1]),
        *(names[2], second[2]),
    ]
    assert needed_files(["README.md"], None) == []
