"""S3 URIs, manifests and settings: what needs no server."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm import storage
from dreambooth_sm.errors import UserError
from dreambooth_sm.manifest import unfit_names
from dreambooth_sm.storage import Manifest, ManifestEntry, S3Options, S3Uri
from dreambooth_sm.transfers import files_below
from launcher.local.s3 import embedded_s3

text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
segments = text.map(lambda s: s.replace("/", "").strip()).filter(lambda s: s not in ("", ".", ".."))
keys = st.lists(segments, min_size=1, max_size=4).map("/".join)
buckets = st.from_regex(r"[a-z0-9][a-z0-9.-]{1,20}[a-z0-9]", fullmatch=True)


@given(buckets, keys | st.just(""), st.sampled_from(["", "/"]))
def test_uri_survives_a_round_trip_and_a_trailing_slash(bucket: str, prefix: str, slash: str) -> None:
    uri = S3Uri.parse(f"s3://{bucket}/{prefix}{slash if prefix else ''}")
    assert (uri.bucket, uri.prefix) == (bucket, prefix)
    assert S3Uri.parse(str(uri)) == uri


@given(buckets, keys | st.just(""), keys)
def test_joined_uri_keeps_its_bucket(bucket: str, prefix: str, name: str) -> None:
    joined = S3Uri(bucket, prefix) / name
    assert joined.bucket == bucket
    assert joined.prefix == (f"{prefix}/{name}" if prefix else name)


POINT = "arn:aws:s3:us-west-2:123456789012:accesspoint/models"


@pytest.mark.parametrize("prefix", ["", "toys/zwx"])
def test_uri_of_an_access_point(prefix: str) -> None:
    uri = S3Uri.parse(f"s3://{POINT}/{prefix}")
    assert (uri.bucket, uri.prefix) == (POINT, prefix)
    assert S3Uri.parse(str(uri)) == uri


def test_requests_go_to_the_access_point(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "us-west-2",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    uri = S3Uri.parse(f"s3://{POINT}/toys/x")
    url = storage.s3_client().generate_presigned_url("get_object", {"Bucket": uri.bucket, "Key": uri.prefix})
    assert url.startswith("https://models-123456789012.s3-accesspoint.us-west-2.amazonaws.com/toys/x?")


def test_options_become_boto3s_arguments() -> None:
    assert S3Options().writing() == S3Options().reading() == {}
    assert S3Options(encryption="AES256").writing() == {"ServerSideEncryption": "AES256"}
    assert S3Options("k", encryption="aws:kms:dsse").writing() == {
        "ServerSideEncryption": "aws:kms:dsse",
        "SSEKMSKeyId": "k",
    }
    options = S3Options("key-1", "bucket-owner-full-control", {"team": "a&b", "für": "x y"}, "GLACIER_IR", True)
    assert options.reading() == {"RequestPayer": "requester"}
    assert options.writing() == {
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": "key-1",
        "ACL": "bucket-owner-full-control",
        "Tagging": "team=a%26b&f%C3%BCr=x+y",
        "StorageClass": "GLACIER_IR",
        "RequestPayer": "requester",
    }


def test_uri_of_a_whole_bucket() -> None:
    assert S3Uri.parse("s3://models") == S3Uri.parse("s3://models/") == S3Uri("models")


@pytest.mark.parametrize(
    ("bad", "hint"),
    [
        ("models/toy", "s3://bucket/prefix"),
        ("https://models/toy", "s3://bucket/prefix"),
        ("s3:/models/toy", "s3://bucket/prefix"),
        ("", "s3://bucket/prefix"),
        ("s3://", "bucket name"),
        ("s3:///toy", "bucket name"),
        ("s3://<bucket>/toy", "'<bucket>'"),
        ("s3://Models/toy", "lower-case"),
        ("s3://ab/toy", "3 to 63"),
        ("s3://models//toy", "empty"),
        ("s3://models/toy//", "empty"),
        ("s3://models/../toy", "'..'"),
        ("s3://models/toy\n", "blank"),
        (" s3://models/toy", "s3://bucket/prefix"),
        ("s3://models--usw2-az1--x-s3/toy", "directory bucket"),
    ],
)
def test_malformed_uri_is_explained(bad: str, hint: str) -> None:
    with pytest.raises(UserError, match="(?s)" + hint) as caught:
        S3Uri.parse(bad)
    assert len(caught.value.problems) == 1


def base64(content: bytes) -> str:
    return b64encode(content).decode()


entries = st.builds(
    ManifestEntry, path=keys, size=st.integers(0, 2**40), crc64nvme=st.binary(min_size=8, max_size=8).map(base64)
)


def fitting(entries: list[ManifestEntry]) -> bool:
    return not unfit_names(entry.path for entry in entries)


file_lists = st.lists(entries, max_size=4, unique_by=lambda entry: entry.path).filter(fitting).map(tuple)


@given(st.builds(Manifest, files=file_lists, created=st.text(), job=st.text()))
def test_manifest_survives_a_round_trip(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


def forged(**fields: object) -> str:
    """A manifest with a right SHA-256, whatever it holds."""
    whole = {"files": [], "created": "", "job": "", "step": None} | fields
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    return json.dumps(whole | {"sha256": digest})


@pytest.mark.parametrize("size", ["1", 1.5, None, True, -1, 10**15, 10**400, float("nan"), [1], {}])
def test_sizes_that_no_file_has_are_refused(size: object) -> None:
    with pytest.raises(ValueError, match="not a manifest: size can't be") as caught:
        Manifest.from_json(forged(files=[{"path": "x", "size": size}]))
    assert len(str(caught.value)) < 200


BAD_NAMES = [
    ["a", "a/b"], ["a", "a/b/c"], ["n" * 256], ["ä" * 128], ["/".join(["n" * 200] * 6)], ["a\0b"], ["/etc/passwd"],
    [".."], ["../a"], ["a/../b"], ["a/./b"], ["a//b"], ["a/"], [""], ["\ud800"],
]  # fmt: skip


@pytest.mark.parametrize("names", BAD_NAMES)
def test_names_that_cannot_be_files_are_refused(names: list[str]) -> None:
    assert len(unfit_names(names)) == 1
    with pytest.raises(ValueError, match="not a manifest") as caught:
        Manifest.from_json(forged(files=[{"path": name, "size": 1} for name in names]))
    assert "\n" not in str(caught.value)


def test_unusual_names_that_can_be_files_are_taken() -> None:
    assert not unfit_names(["a", "A", "a.b", "a b", "ab/c", "...", "n" * 255, "back\\slash", "new\nline", "-", "子"])


@given(st.lists(st.text(st.sampled_from("ab./\0ä\ud800"), max_size=6), max_size=4, unique=True))
def test_what_is_not_refused_can_be_written(names: list[str]) -> None:
    if unfit_names(names):
        return
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            path = Path(scratch, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        assert {p.relative_to(scratch).as_posix() for p in Path(scratch).rglob("*") if p.is_file()} == set(names)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["files", "created", "job", "step", "other"]), values, max_size=5))
def test_forged_fields_are_refused_or_of_their_types(fields: dict[str, object]) -> None:
    try:
        found = Manifest.from_json(forged(**fields))
    except ValueError as error:
        assert str(error).startswith("not a manifest")  # noqa: PT017
        return
    assert isinstance(found.size, int)
    assert isinstance(found.created + found.job, str)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"files":' * 10**5, '{"files": ' + "[" * 10**5 + "]" * 10**5 + "}"])
def test_deep_json_is_not_a_manifest(text: str) -> None:
    with pytest.raises(ValueError, match="not a manifest"):
        Manifest.from_json(text)


@pytest.mark.parametrize("other", ["", "[]", "{}", '{"files": 1}', '{"files": [{"name": "x"}]}', '{"files": []}'])
def test_what_is_not_a_manifest_is_refused(other: str) -> None:
    with pytest.raises(ValueError, match="not a manifest"):
        Manifest.from_json(other)


@given(st.data())
def test_a_manifest_with_a_flipped_bit_is_refused(data: st.DataObject) -> None:
    manifest = Manifest((ManifestEntry("unet/config.json", 10, "eSw4K0qz2wM="),), "2026-11-22T00:00:00+00:00", "toy", 8)
    changed = bytearray(manifest.to_json().encode())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = Manifest.from_json(bytes(changed))
    except ValueError:
        return
    assert found == manifest  # a blank between two entries became a line feed, for example


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/weights").write_text("w")
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet/weights").symlink_to(tmp_path / "elsewhere/weights")
    (model / "unet/up").symlink_to(model)
    (model / "vae").symlink_to(tmp_path / "elsewhere")
    assert list(files_below(model)) == ["unet/weights", "vae/weights"]


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"weights: .*broken link"):
        files_below(tmp_path)


def test_settings_that_do_not_work_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(UserError, match="no-such-profile"):
        storage.s3_client()


def test_a_missing_moto_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moto.server", None)
    with pytest.raises(UserError, match=r"dreambooth-sm\[demo\]"), embedded_s3():
        pass


def test_import_is_light() -> None:
    heavy = "{'awscrt', 'boto3', 'botocore', 'moto', 'torch'}"
    code = f"import sys, dreambooth_sm.storage, launcher.local.s3; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
