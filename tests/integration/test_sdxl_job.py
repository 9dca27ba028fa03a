"""Whole jobs on a small SDXL base model: as a directory, and as a single file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from dreambooth_sm.convert import convert
from dreambooth_sm.errors import EXIT_BAD_INPUT, EXIT_OK
from tests.helpers.jobs import Ended, JobTree, read_weights, same_weights

FULL = {
    "validation_prompt": "photo of zwx toy on the beach",
    "validation_steps": "1",
    "export": "both",
    "export_precision": "fp32",
    "use_ema": "true",
    "center_crop": "false",
    "bucket_step": "8",
    "model_name": "zwx",
}
STEPS = 12


@pytest.fixture(scope="module")
def xl_file(tiny_xl_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny SDXL model as one file."""
    folder = tmp_path_factory.mktemp("file")
    convert(str(tiny_xl_base), folder / "model.safetensors")
    return folder


def lay_out(base: Path, pictures: Path, model: Path, **hyperparameters: str) -> JobTree:
    return JobTree.lay_out(base, hyperparameters, {"images": pictures, "model": model}, {})


@pytest.fixture(scope="module")
def done(tiny_xl_base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobTree, Ended]:
    job = lay_out(tmp_path_factory.mktemp("job") / "opt-ml", pictures, tiny_xl_base, **FULL)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    return job, ended


def test_the_trained_model_loads_in_diffusers(done: tuple[JobTree, Ended], tiny_xl_base: Path) -> None:
    job, _ = done
    pipeline = StableDiffusionXLPipeline.from_pretrained(job.model, dtype=torch.float32)
    before = StableDiffusionXLPipeline.from_pretrained(tiny_xl_base, dtype=torch.float32)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert same_weights(getattr(pipeline, part).state_dict(), getattr(before, part).state_dict())
    assert not same_weights(pipeline.unet.state_dict(), before.unet.state_dict())
    assert pipeline.vae.config.force_upcast
    assert pipeline.tokenizer_2.pad_token == "!"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("photo of zwx toy", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    file = StableDiffusionXLPipeline.from_single_file(
        str(job.model / "zwx.safetensors"), config=str(tiny_xl_base), dtype=torch.float32
    )
    assert same_weights(file.unet.state_dict(), pipeline.unet.state_dict())


def test_class_images_and_validation_pictures_are_made(done: tuple[JobTree, Ended]) -> None:
    job, ended = done
    assert all("prior_loss" in step for step in ended.steps)
    assert len(ended.steps) == 2
    names = sorted(path.name for path in (job.model / "samples").glob("*.png"))
    for step in (0, 1, 2):
        assert sum(name.startswith(f"step-{step:06}") for name in names) == 2  # the prompt's and the class'
    assert any(name.startswith("class-") for name in names)
    for name in names:
        with Image.open(job.model / "samples" / name) as picture:
            if name.startswith("step-"):
                assert picture.size == (64, 64)
            else:  # in one of the shapes that the pictures have
                assert picture.width * picture.height <= 64 * 64
    report = json.loads((job.model / "report.json").read_text())
    assert report["plan"]["train_text_encoder"] is False
    assert report["base_architecture"] == "sdxl"
    assert "tags: [stable-diffusion-xl," in (job.model / "README.md").read_text()


def test_a_single_file_trains_the_same_model(
    done: tuple[JobTree, Ended], xl_file: Path, pictures: Path, tmp_path: Path
) -> None:
    job = lay_out(tmp_path / "opt-ml", pictures, xl_file, **FULL)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert same_weights(read_weights(job.model, "unet"), read_weights(done[0].model, "unet"))
    second = "text_encoder_2/model.safetensors"
    assert same_weights(load_file(job.model / second), load_file(done[0].model / second))


def test_a_stopped_job_is_resumed_and_ends_with_the_same_weights(
    tiny_xl_base: Path, pictures: Path, tmp_path: Path
) -> None:
    values = {"max_train_steps": str(STEPS), "prior": "output", "caption_dropout": "0.2", "hflip": "true"}
    whole = lay_out(tmp_path / "whole", pictures, tiny_xl_base, **values)
    reference = whole.run("train")
    assert reference.code == EXIT_OK, reference.log
    values["pretrained_model_name_or_path"] = str(whole.base / "input/data/model")
    job = lay_out(tmp_path / "stopped", pictures, tiny_xl_base, **values)
    stopped = job.stop_after(3)
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    assert stopped.losses | ended.losses == reference.losses
    assert len(stopped.losses) < STEPS
    assert same_weights(read_weights(job.model, "unet"), read_weights(whole.model, "unet"))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base_architecture": "sd"}, "set base_architecture=sdxl"),
        ({"use_ema_weights": "true"}, "leave it out"),
    ],
)
def test_bad_input_ends_the_job_with_one_line(
    values: dict[str, str], said: str, tiny_xl_base: Path, pictures: Path, tmp_path: Path
) -> None:
    job = lay_out(tmp_path / "opt-ml", pictures, tiny_xl_base, **values)
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT, ended.log
    assert job.failure is not None
    assert said in job.failure
    assert len(job.failure.strip().splitlines()) == 1
    assert "Traceback" not in ended.log
    assert "step=1" not in ended.log
