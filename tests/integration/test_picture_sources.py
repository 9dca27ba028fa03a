"""Pictures in S3, as people name them: what goes to SageMaker, and what a job finds of it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launcher
from dreambooth_sm.errors import UserError
from dreambooth_sm.storage import S3Uri
from launcher.channels import read_manifest, write_manifest
from launcher.local.s3 import EmbeddedS3
from launcher.local.services import EmbeddedServices
from launcher.local.tree import fetch_channel
from launcher.prepare import prepare_local
from tests.helpers.api import refusals

PROMPT = "photo of zwx toy"


@pytest.fixture(scope="module")
def bucket(services: EmbeddedServices) -> str:
    """Pictures and what lies beside them."""
    name, s3 = "many-pictures", services.client()
    s3.create_bucket(Bucket=name)
    keys = ["toys/00.jpg", "toys/01.jpg", "toys/more/02.PNG", "toys/00.txt", "toys-2/03.jpg", "pic-1.jpg", "pic-2.jpg"]
    for key in [*keys, "notes.txt", "text/a.txt", "cats/04.jpg", "plain-name"]:
        s3.put_object(Bucket=name, Key=key, Body=key.encode())
    manifest = [{"prefix": f"s3://{name}/"}, "toys/00.jpg", "cats/04.jpg"]
    augmented = "".join(json.dumps({"source-ref": f"s3://{name}/{key}", "label": 1}) + "\n" for key in keys[:2])
    for key, body in {
        "m/list.manifest": json.dumps(manifest),
        "m/no-suffix": json.dumps(manifest, indent=1),
        "m/bom.json": "\ufeff" + json.dumps(manifest),
        "m/augmented": augmented,
        "m/gone.manifest": json.dumps([*manifest, "toys/99.jpg"]),
        "m/dictionary.json": json.dumps([{"start": "x"}, "toys/00.jpg"]),
        "m/numbers.json": json.dumps([{"prefix": f"s3://{name}/"}, 1]),
        "m/bare.json": json.dumps(["toys/00.jpg"]),
        "m/deep.json": "[" * 100_000,
        "m/lines": '{"picture": "x"}\n',
    }.items():
        s3.put_object(Bucket=name, Key=key, Body=body.encode())
    return name


def request(images: Any, services: EmbeddedServices, **options: Any) -> dict[str, Any]:
    given = {"instance_type": "ml.g5.xlarge", "role": services.role, "instance_prompt": PROMPT, **options}
    made = launcher.request(images, **given)
    assert refusals("CreateTrainingJob", made) == []
    return made


def source(made: dict[str, Any], name: str = "images") -> dict[str, str]:
    (found,) = [each["DataSource"]["S3DataSource"] for each in made["InputDataConfig"] if each["ChannelName"] == name]
    return found


FOUND = [
    ("toys", "S3Prefix", "toys/", {"00.jpg", "01.jpg", "more/02.PNG", "00.txt"}),
    ("toys/", "S3Prefix", "toys/", {"00.jpg", "01.jpg", "more/02.PNG", "00.txt"}),
    ("toys/more", "S3Prefix", "toys/more/", {"02.PNG"}),
    ("toys/00.jpg", "S3Prefix", "toys/00.jpg", {"00.jpg"}),
    ("pic", "S3Prefix", "pic", {"pic-1.jpg", "pic-2.jpg"}),
    ("toys/0", "S3Prefix", "toys/0", {"00.jpg", "01.jpg", "00.txt"}),
    ("m/list.manifest", "ManifestFile", "m/list.manifest", {"toys/00.jpg", "cats/04.jpg"}),
    ("m/no-suffix", "ManifestFile", "m/no-suffix", {"toys/00.jpg", "cats/04.jpg"}),
    ("m/bom.json", "ManifestFile", "m/bom.json", {"toys/00.jpg", "cats/04.jpg"}),
]


@pytest.mark.parametrize(("place", "kind", "location", "files"), FOUND)
def test_what_lies_there_decides_what_sagemaker_gets(
    place: str, kind: str, location: str, files: set[str], services: EmbeddedServices, bucket: str, tmp_path: Path
) -> None:
    made = source(request(f"s3://{bucket}/{place}", services))
    assert (made["S3DataType"], made["S3Uri"]) == (kind, f"s3://{bucket}/{location}")
    fetch_channel(made, tmp_path / "images", services.client())
    found = {path.relative_to(tmp_path / "images").as_posix(): path for path in (tmp_path / "images").rglob("*.*")}
    assert set(found) == files
    for name, path in found.items():
        assert path.read_text().endswith(name.rpartition("/")[2])


@pytest.mark.parametrize(
    ("images", "files"),
    [
        (["toys/00.jpg", "toys/more/02.PNG"], {"00.jpg", "more/02.PNG"}),
        (["toys/00.jpg", "cats/04.jpg"], {"toys/00.jpg", "cats/04.jpg"}),
        (["toys/01.jpg", "toys/01.jpg", "pic"], {"toys/01.jpg", "pic-1.jpg", "pic-2.jpg"}),
        (["cats/", "m/list.manifest"], {"cats/04.jpg", "toys/00.jpg"}),
        ("m/augmented", {"00.jpg", "01.jpg"}),
    ],
)
def test_a_list_becomes_a_manifest(
    images: Any, files: set[str], services: EmbeddedServices, bucket: str, tmp_path: Path
) -> None:
    named = [f"s3://{bucket}/{each}" for each in images] if isinstance(images, list) else f"s3://{bucket}/{images}"
    made = source(request(named, services))
    assert made["S3DataType"] == "ManifestFile"
    assert made["S3Uri"].endswith("/objects.manifest")
    fetch_channel(made, tmp_path, services.client())
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == files


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ("nothing", "there is nothing below s3://many-pictures/nothing"),
        ("toy/", "there is nothing below s3://many-pictures/toy"),
        ("text/", "there are 1 objects, and no pictures"),
        ("notes.txt", "there are 1 objects, and no pictures"),
        ("plain-name", "there are 1 objects, and no pictures"),
        ("m/gone.manifest", "there is no s3://many-pictures/toys/99.jpg"),
        ("m/dictionary.json", "is not a manifest"),
        ("m/numbers.json", "is not a manifest: '1' in it"),
        ("m/bare.json", "is not a manifest"),
        ("m/deep.json", "is not a manifest"),
        ("m/lines", "line 1, is not a line of a manifest"),
        (["toys/00.jpg", "toys/98.jpg"], "there is nothing below s3://many-pictures/toys/98.jpg"),
    ],
)
def test_what_can_not_be_used_is_told_before_a_job_starts(
    images: Any, words: str, services: EmbeddedServices, bucket: str
) -> None:
    named = [f"s3://{bucket}/{each}" for each in images] if isinstance(images, list) else f"s3://{bucket}/{images}"
    with pytest.raises(UserError) as caught:
        launcher.check(named, instance_prompt=PROMPT, instance_type="ml.g5.xlarge", role=services.role)
    (problem,) = caught.value.problems
    assert problem.startswith("images: ")
    assert words in problem


def test_objects_of_two_places_are_no_list(services: EmbeddedServices, bucket: str, pictures: Path) -> None:
    for images, words in (
        ([f"s3://{bucket}/toys/00.jpg", "s3://other-bucket/00.jpg"], "one bucket"),
        ([f"s3://{bucket}/toys/00.jpg", pictures / "00.jpg"], "some are in S3 and some on this machine"),
    ):
        with pytest.raises(UserError, match=f"images: .*{words}"):
            launcher.check(images, instance_prompt=PROMPT, instance_type="ml.g5.xlarge", role=services.role)


def test_pictures_in_s3_are_counted(services: EmbeddedServices, bucket: str) -> None:
    s3 = services.client()
    jpeg = (Path(__file__).parents[1] / "data" / "duck_toy" / "00.jpg").read_bytes()
    s3.put_object(Bucket=bucket, Key="unnamed/IMG_0001", Body=jpeg)
    s3.put_object(Bucket=bucket, Key="masked/a.jpg", Body=jpeg)
    s3.put_object(Bucket=bucket, Key="masked/a-mask.png", Body=b"mask")
    assert prepare_local({"images": f"s3://{bucket}/unnamed", "instance_prompt": PROMPT}).sources  # by its content
    for images, count in (("masked", 1), ("toys/", 3), ("pic", 2), ("toys/01.jpg", 1), ("m/list.manifest", 2)):
        assert prepare_local({"images": f"s3://{bucket}/{images}", "instance_prompt": PROMPT}).pictures == count


def test_a_base_model_is_a_file_or_a_folder_by_what_is_there(services: EmbeddedServices, bucket: str) -> None:
    s3 = services.client()
    for key in ("base/v1.safetensors/unet/config.json", "base/whole", "base/V2.SAFETENSORS"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"x" * 80)
    for name, location, inside in (
        ("base/v1.safetensors", "base/v1.safetensors/", ""),
        ("base/whole", "base/whole", "/whole"),
        ("base/V2.SAFETENSORS", "base/V2.SAFETENSORS", "/V2.SAFETENSORS"),
    ):
        made = request(f"s3://{bucket}/toys", services, base_model=f"s3://{bucket}/{name}")
        assert source(made, "model")["S3Uri"] == f"s3://{bucket}/{location}"
        assert made["HyperParameters"]["pretrained_model_name_or_path"] == f"/opt/ml/input/data/model{inside}"


@pytest.fixture
def real_pictures(services: EmbeddedServices, pictures: Path) -> list[str]:
    s3 = services.client()
    s3.create_bucket(Bucket="real-pictures")
    for path in pictures.iterdir():
        s3.upload_file(str(path), "real-pictures", f"duck/{path.name}")
    s3.put_object(Bucket="real-pictures", Key="duck/broken.jpg", Body=b"not a picture")
    return [f"s3://real-pictures/duck/{path.name}" for path in sorted(pictures.iterdir())]


def test_a_job_trains_on_a_list_of_objects(
    real_pictures: list[str], services: EmbeddedServices, tiny_base: Path, tmp_path: Path
) -> None:
    """The folder holds a picture that no job could read: it is not in the list."""
    options: dict[str, Any] = {
        "instance_prompt": PROMPT,
        "base_model": tiny_base,
        "resolution": 64,
        "max_train_steps": 1,
        "log": lambda line: None,
    }
    far = launcher.fit(real_pictures, instance_type="ml.g5.xlarge", **options)
    near = launcher.fit(real_pictures, directory=tmp_path, **options)
    for job in (far, near):
        assert [entry["step"] for entry in job.history()] == [1]


KEYS = st.lists(st.lists(st.sampled_from(["a", "b", "ü", "a b"]), min_size=1, max_size=4), min_size=1, max_size=5)


@given(KEYS)
def test_a_manifest_names_what_it_was_made_of(keys: list[list[str]]) -> None:
    objects = list(dict.fromkeys(S3Uri("models", "/".join(parts)) for parts in keys))
    read = read_manifest(write_manifest(objects), "m")
    assert [uri for uri, _ in read] == objects
    assert len({name for _, name in read}) == len(objects)


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.recursive(st.none() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_no_manifest_breaks_the_reader(body: bytes) -> None:
    with suppress(UserError):
        assert read_manifest(body, "m")


def test_a_manifest_can_not_lead_out_of_its_channel(s3: EmbeddedS3, target: S3Uri, tmp_path: Path) -> None:
    client = s3.client()
    body = json.dumps([{"prefix": f"s3://{target.bucket}/"}, "../../outside"]).encode()
    client.put_object(Bucket=target.bucket, Key="m", Body=body)
    with pytest.raises(UserError):
        fetch_channel({"S3DataType": "ManifestFile", "S3Uri": f"s3://{target.bucket}/m"}, tmp_path / "in" / "x", client)
    assert not (tmp_path / "outside").exists()
