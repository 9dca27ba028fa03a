"""What the client says of pictures before a job starts is what the container would say of what it is sent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreambooth_sm.data.concepts import find_subjects
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from launcher.prepare import prepare
from launcher.staging import lay_out_files, picture_files
from tests.unit.test_check import blocks, content

PROMPTS = {
    "instance_prompt": "photo of zwx toy, [filewords]",
    "with_prior_preservation": True,
    "class_prompt": "photo of a toy",
    "resolution": 64,
}
ON_SAGEMAKER = {"instance_type": "ml.g5.xlarge", "resolution": 64}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Pictures of a subject and of its class, with one of each fault."""
    images, classes = tmp_path / "images", tmp_path / "classes"
    for folder in (images, classes):
        folder.mkdir()
        for number in range(5):
            blocks(number).save(folder / f"{number}.png")
        (folder / "text.jpg").write_text("text")
        (folder / "no suffix").write_bytes(content(blocks(7), "JPEG"))
    (images / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (images / "0_mask.PNG").write_text("no mask")
    (images / "1.CAPTION").write_text("very " * 100)
    (images / "2.txt").write_bytes("schön".encode("cp1252"))
    (images / "3.txt").write_text("")
    Image.new("L", (1, 5000)).save(images / "strip.png")
    return images, classes


def on_client(images: Path, classes: Path, **options: Any) -> tuple[set[str], set[str]]:
    """The problems, and the warnings, of a job on SageMaker that is only described."""
    given = {"images": images, "class_images": classes, **ON_SAGEMAKER, **PROMPTS, **options}
    try:
        return set(), set(prepare(given, None).warnings)
    except UserError as error:
        return set(error.problems), set()


def in_container(images: Path, classes: Path, root: Path, **options: Any) -> tuple[set[str], set[str]]:
    places = {images: root / "sent" / "images", classes: root / "sent" / "classes"}
    for folder, place in places.items():
        place.mkdir(parents=True)
        lay_out_files(picture_files(folder), place)
    directories = {"instance_data_dir": str(places[images]), "class_data_dir": str(places[classes])}
    warnings: list[str] = []
    problems: list[str] = []
    try:
        find_subjects(Hyperparameters.parse({**PROMPTS, **directories, **options}), warnings.append)
    except UserError as error:
        problems = error.problems

    def as_on_client(lines: list[str]) -> set[str]:
        return {line.replace(str(root / "sent"), str(root)) for line in lines}

    return as_on_client(problems), as_on_client(warnings)


def test_the_same_problems(folders: tuple[Path, Path], tmp_path: Path) -> None:
    problems, _ = on_client(*folders)
    assert problems == in_container(*folders, tmp_path)[0]
    assert len(problems) == 6
    for name, said in {
        "images/text.jpg": "is not a picture",
        "images/eps.png": "is not a picture",
        "images/0_mask.PNG": "is not a picture",
        "images/2.txt": "can't be read as UTF-8",
        "images/strip.png": "would be enlarged",
        "classes/text.jpg": "is not a picture",
    }.items():
        assert any(line.startswith(f"{tmp_path / name} {said}") for line in problems) or any(
            line.startswith(f"{tmp_path / name} ") and said in line for line in problems
        ), name


def test_the_same_warnings(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("2.txt", "1.CAPTION"):
        (folders[0] / name).unlink()
    problems, warnings = on_client(*folders, on_bad_image="skip", num_class_images=3)
    assert problems == set()
    assert warnings == in_container(*folders, tmp_path, on_bad_image="skip", num_class_images=3)[1]
    assert any("set num_class_images=7 to use all of them" in line for line in warnings)


def test_a_prompt_that_is_too_long_ends_neither_later_than_the_other(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (folders[0] / "2.txt").unlink()
    problems, _ = on_client(*folders, on_bad_image="skip")
    assert problems == in_container(*folders, tmp_path, on_bad_image="skip")[0]
    (line,) = problems
    assert line.startswith(f"{folders[0] / '1.png'}: its prompt 'photo of zwx toy, very very")


def test_prompts_beside_the_pictures_serve_the_client_as_well(tmp_path: Path) -> None:
    for number in range(4):
        blocks(number).save(tmp_path / f"{number}.png")
    (tmp_path / "dataset_info.json").write_text('{"instance_prompt": "photo of zwx toy"}')
    request = prepare({"images": tmp_path, **ON_SAGEMAKER}, None).request
    assert request["HyperParameters"]["instance_prompt"] == "photo of zwx toy"


def test_names_that_s3_can_not_have_are_told_before_anything_is_sent(tmp_path: Path) -> None:
    for number in range(4):
        blocks(number).save(tmp_path / f"{number}.png")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(content(blocks(5), "PNG"))
    with pytest.raises(UserError) as caught:
        prepare({"images": tmp_path, "instance_prompt": "photo of zwx toy", **ON_SAGEMAKER}, None)
    assert caught.value.problems == [r"the name of \udcff.png is not UTF-8, as names in S3 are; rename it"]


@pytest.mark.slow
def test_a_base_model_of_this_machine_is_looked_into_before_it_is_sent(tmp_path: Path, tiny_base: Path) -> None:
    model = shutil.copytree(tiny_base, tmp_path / "model")
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(
        json.dumps(json.loads(scheduler.read_text()) | {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    )
    prompts = {name: text for name, text in PROMPTS.items() if name != "resolution"}
    pictures = tmp_path / "images"
    pictures.mkdir()
    for number in range(4):
        blocks(number).save(pictures / f"{number}.png")
    given = {"images": pictures, "base_model": model, **ON_SAGEMAKER, **prompts}
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler") as refused:
        prepare(given, None)
    assert [problem for problem in refused.value.problems if problem.startswith("base_model: ")]
    assert not prepare(given | {"base_model": tiny_base}, None).warnings
