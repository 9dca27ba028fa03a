"""Whole jobs on folders as people have them: photos of several shapes, captions, prompts beside the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK
from tests.helpers.jobs import JobTree, read_weights, same_weights

EXAMPLES = Path(__file__).parents[1] / "data" / "duck_toy"
SIZES = [(120, 80), (120, 90), (80, 120), (100, 100)]
STEPS = 12
MIXED = {
    "instance_prompt": "photo of zwx toy, [filewords]",
    "class_prompt": "None",
    "center_crop": "false",
    "hflip": "true",
    "bucket_step": "8",
    "shuffle_tags": "true",
    "caption_dropout": "0.3",
    "max_token_length": "150",
    "gradient_accumulation_steps": "2",
    "max_train_steps": str(STEPS),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real photos in three shapes and four formats; captions in all three ways, one of them long, one missing."""
    folder = tmp_path_factory.mktemp("mixed")
    photos = [Image.open(path) for path in sorted(EXAMPLES.glob("*.jpg"))]
    names = ["утка.jpg", "a.png", "b.webp", "IMG_3.heic"]
    for photo, size, name in zip(photos, SIZES, names, strict=True):
        ImageOps.fit(photo, size).save(folder / name)
    (folder / "a.txt").write_text("on a blue rug, indoors, " + "very " * 20 + "soft")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "b.webp", "text": "on the floor, from above"}))
    (folder / "metadata.csv").write_text("file_name,text\nутка.jpg,на дороге\n", encoding="utf-8")
    for name in (".DS_Store", "Thumbs.db", "._a.png", "__MACOSX/a.png", ".ipynb_checkpoints/a-checkpoint.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no picture")
    return folder


def lay_out(mixed: Path, base: Path, tiny_base: Path, **hyperparameters: str) -> JobTree:
    return JobTree.lay_out(base, {**MIXED, **hyperparameters}, {"images": mixed, "model": tiny_base}, {})


def assert_same_model(job: JobTree, other: JobTree) -> None:
    assert same_weights(read_weights(job.model, "unet"), read_weights(other.model, "unet"))


def test_mixed_shapes_captions_and_dropout_stopped_and_resumed(mixed: Path, tmp_path: Path, tiny_base: Path) -> None:
    whole = lay_out(mixed, tmp_path / "whole", tiny_base)
    reference = whole.run("train")
    assert reference.code == EXIT_OK, reference.log
    assert list(reference.losses) == list(range(1, STEPS + 1))
    assert "warning" not in reference.log

    job = lay_out(
        mixed, tmp_path / "stopped", tiny_base, pretrained_model_name_or_path=str(whole.base / "input/data/model")
    )
    stopped = job.stop_after(3)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    first = int(ended.steps[0]["step"])
    assert 3 < first <= STEPS
    assert stopped.losses | ended.losses == reference.losses
    assert_same_model(job, whole)


def test_class_pictures_join_the_shapes_of_the_photos(mixed: Path, tmp_path: Path, tiny_base: Path) -> None:
    """Also: prompts beside the pictures, and cached latents and those that are made at each step are the same."""
    info = {"instance_prompt": MIXED["instance_prompt"], "class_prompt": "photo of a toy"}
    jobs = []
    for cached in ("False", "True"):
        job = lay_out(mixed, tmp_path / cached, tiny_base, not_cache_latents=cached, max_train_steps="6")
        job.set(instance_prompt="None", class_prompt="None", num_class_images="2")
        (job.images / "dataset_info.json").write_text(json.dumps(info))
        ended = job.run("train")
        assert ended.code == EXIT_OK, ended.log
        assert all("prior_loss" in step for step in ended.steps)
        (job.images / "dataset_info.json").unlink()
        jobs.append(job)
    assert_same_model(*jobs)


def test_a_bad_picture_is_left_out_when_asked(mixed: Path, tmp_path: Path, tiny_base: Path) -> None:
    job = lay_out(mixed, tmp_path / "opt-ml", tiny_base, max_train_steps="1", on_bad_image="skip")
    job.write("input/data/images/bad.jpg", "text")
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    (line,) = [line for line in ended.log.splitlines() if line.startswith("warning: left out")]
    assert f"{job.images / 'bad.jpg'} is not a picture" in line


def test_a_caption_that_is_too_long_ends_the_job_before_training(mixed: Path, tmp_path: Path, tiny_base: Path) -> None:
    job = lay_out(mixed, tmp_path / "opt-ml", tiny_base, max_token_length="75")
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert job.failure is not None
    assert "on a blue rug" in job.failure
    assert "max_token_length to 150 or 225" in job.failure
    assert "phase=train" not in ended.log
