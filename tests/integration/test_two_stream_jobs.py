"""Whole jobs on small FLUX.1, Chroma and Stable Diffusion 3.5 base models: class images, captions, buckets, masks, and
what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ChromaPipeline, FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file

from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.adapters.read import read_adapter
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
}


# Name, class of its pipeline, and what messages call it.
FAMILIES: list[tuple[str, Any, str]] = [
    ("flux1", FluxPipeline, "a FLUX.1"),
    ("chroma", ChromaPipeline, "a Chroma"),
    ("sd3", StableDiffusion3Pipeline, "an SD 3.5"),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family[0])
def family(request: pytest.FixtureRequest) -> tuple[str, Any, str, Path]:
    """And where its model is."""
    return *request.param, request.getfixturevalue(f"tiny_{request.param[0]}")


@pytest.fixture(scope="module")
def done(
    family: tuple[str, Any, str, Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobTree, Ended]:
    root = tmp_path_factory.mktemp("job") / "opt-ml"
    job = JobTree.lay_out(root, FULL, {"images": pictures, "model": family[-1]}, {})
    ended = job.run("train")
    assert ended.code == EXIT_OK, ended.log
    return job, ended


def test_the_adapter_loads_in_diffusers(done: tuple[JobTree, Ended], family: tuple[str, Any, str, Path]) -> None:
    job, _ = done
    _, kind, _, base = family
    pictures = []
    for file in (None, FILE):
        pipeline = kind.from_pretrained(base)
        pipeline.set_progress_bar_config(disable=True)
        if file:
            pipeline.load_lora_weights(str(job.model), weight_name=file)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
        pictures.append(pipeline(prompt=PROMPT, generator=generator, **options).images)
    before, one = pictures
    off = pipeline(
        prompt=PROMPT, generator=generator.manual_seed(0), joint_attention_kwargs={"scale": 0.0}, **options
    ).images
    assert torch.allclose(off, before, atol=1e-5)
    assert not torch.allclose(one, before, atol=1e-5)
    # diffusers' converter knows the makers' names of the true width alone.
    ours, theirs = (read_adapter(job.model / name) for name in (FILE, "zwx.safetensors"))
    assert not theirs.unknown
    for name, layer in ours.parts["transformer"].items():
        assert isinstance(layer, LowRank)
        weight = torch.zeros(layer.up.shape[0], layer.down.shape[1])
        torch.testing.assert_close(theirs.parts["transformer"][name].change(weight), layer.change(weight))
    assert all(tensor.dtype == torch.float32 for tensor in load_file(job.model / FILE).values())


def test_class_images_and_validation_pictures_are_made(
    done: tuple[JobTree, Ended], family: tuple[str, Any, str, Path]
) -> None:
    job, ended = done
    name, kind, *_ = family
    assert all("prior_loss" in step for step in ended.steps)
    drawn = sorted(path.name for path in (job.model / "samples").glob("*.png"))
    for step in (0, 1, 2):
        assert sum(each.startswith(f"step-{step:06}") for each in drawn) == 2  # the prompt's and the class'
    assert json.loads((job.model / "report.json").read_text())["base_architecture"] == name
    card = (job.model / "README.md").read_text()
    assert f"{kind.__name__}.from_pretrained" in card
    assert f"pipeline(prompt='{PROMPT}').images[0]  # joint_attention_kwargs={{'scale': 0.5}}" in card


def test_what_the_family_does_not_take_ends_the_job_before_it_begins(
    family: tuple[str, Any, str, Path], pictures: Path, tmp_path: Path
) -> None:
    *_, title, base = family
    job = JobTree.lay_out(tmp_path / "opt-ml", {}, {"images": pictures, "model": base}, {})
    ended = job.run("train")
    assert ended.code == EXIT_BAD_INPUT
    assert job.failure is not None
    assert f"method=full: the base model is {title} model; set method to lora" in job.failure
