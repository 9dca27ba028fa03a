"""Whole jobs on a small Z-Image base model: class images, captions, buckets and masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from safetensors.torch import load_file

from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK
from dreambooth_sm.methods.lora import FILE
from tests.helpers.jobs import Ended, JobTree

PROMPT = "photo of zwx toy"
FULL = {
    "method": "lora",
    "model_name": "zwx",
    "validation_prompt": f"{PROMPT} on the beach",
    "validation_steps": "1",
    "export_precision": "fp32",
    "use_ema": "true",
    "center_crop": "false",
    "background_weight": "0.1",
}
STEPS = 12


@pytest.fixture(scope="module")
def captioned(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures with a long caption, a short one, and a mask."""
    folder = tmp_path_factory.mktemp("captioned")
    first, second = (Path(shutil.copy(path, folder)) for path in sorted(pictures.iterdir())[:2])
    first.with_suffix(".txt").write_text(f"{PROMPT} " + "in the grass " * 8)
    second.with_suffix(".txt").write_text(PROMPT)
    with Image.open(first) as picture:
        mask = Image.new("L", picture.size)
        mask.paste(255, (20, 20, 60, 60))
    mask.save(folder / f"{first.stem}-mask.png")
    return folder


def lay_out(base: Path, pictures: Path, model: Path, **hyperparameters: str) -> JobTree:
    return JobTree.lay_out(base, hyperparameters, {"images": pictures, "model": model}, {})


@pytest.fixture(scope="module")
def done(tiny_z_image: Path, captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobTree, Ended]:
    job = lay_out(tmp_path_factory.mktemp("job") / "opt-ml", captioned, tiny_z_image, **FULL)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    return job, ended


def test_the_adapter_loads_in_diffusers(done: tuple[JobTree, Ended], tiny_z_image: Path) -> None:
    job, _ = done
    pictures = []
    for file in (None, FILE, "zwx.safetensors"):
        pipeline = ZImagePipeline.from_pretrained(tiny_z_image)
        pipeline.set_progress_bar_config(disable=True)
        if file:
            pipeline.load_lora_weights(str(job.model), weight_name=file)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
        pictures.append(pipeline(PROMPT, generator=generator, **options).images)
    before, one, other = pictures
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, before, atol=1e-5)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(job.model / FILE).values())


def test_class_images_and_validation_pictures_are_made(done: tuple[JobTree, Ended]) -> None:
    job, ended = done
    assert all("prior_loss" in step for step in ended.steps)
    names = sorted(path.name for path in (job.model / "samples").glob("*.png"))
    for step in (0, 1, 2):
        assert sum(name.startswith(f"step-{step:06}") for name in names) == 2  # the prompt's and the class'
    assert any(name.startswith("class-") for name in names)


def test_the_report_and_the_card_name_family_and_licence(done: tuple[JobTree, Ended]) -> None:
    job, _ = done
    facts = json.loads((job.model / "report.json").read_text())
    assert facts["base_architecture"] == "z_image"
    card = (job.model / "README.md").read_text()
    assert "ZImagePipeline.from_pretrained" in card
    assert "LoraLoaderModelOnly" in card
    assert "joint_attention_kwargs" in card


@pytest.mark.parametrize("prior", ["images", "output"])
def test_an_interrupted_job_ends_as_an_uninterrupted_one(
    tiny_z_image: Path, pictures: Path, tmp_path: Path, prior: str
) -> None:
    values = {"method": "lora", "prior": prior, "max_train_steps": str(STEPS), "export_precision": "fp32"}
    whole = lay_out(tmp_path / "whole", pictures, tiny_z_image, **values)
    reference = whole.run("train")
    assert reference.code == EXIT_OK, reference.log
    values["pretrained_model_name_or_path"] = str(whole.base / "input/data/model")
    job = lay_out(tmp_path / "stopped", pictures, tiny_z_image, **values)
    stopped = job.stop_after(3)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert stopped.losses | ended.losses == reference.losses
    assert len(stopped.losses) < STEPS
    ours, theirs = (load_file(each.model / FILE) for each in (job, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_file_of_the_transformer_alone_is_trained_as_its_directory(
    tiny_z_image: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "duck").mkdir()
    transformer = tiny_z_image / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(transformer, tmp_path / "duck" / "duck.safetensors")
    found = []
    for name, channels in (("whole", {"model": tiny_z_image}), ("alone", {"model": tmp_path / "duck"})):
        base = tmp_path / name / "opt-ml"
        parts = {} if name == "whole" else {"pretrained_parts_name_or_path": str(tiny_z_image)}
        values = {"method": "lora", "base_architecture": "z_image", **parts}
        job = JobTree.lay_out(base, values, {"images": pictures, **channels}, {})
        ended = job.run("train")
        assert ended.code == EXIT_OK, ended.log
        found.append((ended.losses, load_file(job.model / FILE)))
    (losses, whole), (again, file) = found
    assert losses == again
    assert whole.keys() == file.keys()
    assert all(torch.equal(value, file[name]) for name, value in whole.items())


def test_what_the_family_does_not_take_ends_the_job_before_it_begins(
    tiny_z_image: Path, pictures: Path, tmp_path: Path
) -> None:
    job = lay_out(tmp_path / "opt-ml", pictures, tiny_z_image)
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT
    assert job.failure is not None
    assert "method=full: the base model is a Z-Image model; set method to lora" in job.failure
