"""What a base model is, before it is loaded; and what follows from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_sm.convert import convert
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES, family_of
from dreambooth_sm.families.find import find_family
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import load_base
from dreambooth_sm.planning.cards import CARDS, CPU, find_card
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.stored.layout import PARTS
from tests.helpers.training import hyperparameters, same, weights

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
XL = "stabilityai/stable-diffusion-xl-base-1.0"


def test_the_parts_are_those_of_the_model_files() -> None:
    assert {family.facts.pipeline: family.facts.parts for family in FAMILIES.values()} == PARTS


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_model_knows_its_family(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue({"sd": "tiny_base", "sdxl": "tiny_xl_base"}.get(name, f"tiny_{name}"))
    method = next(iter(FAMILIES[name].facts.methods))
    model = load_base(hyperparameters(pretrained_model_name_or_path=str(path), base_architecture=name, method=method))
    assert model.family is FAMILIES[name] is family_of(model.pipeline())
    assert tuple(model.modules) == model.family.facts.parts
    assert model.denoiser is getattr(model, model.family.facts.parts[0])
    with pytest.raises(LookupError, match="no family draws with a PretrainedModel"):
        family_of(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (XL, "sdxl"),
        ("s3://models/sdxl/model.safetensors", "sdxl"),
        ("RunDiffusion/Juggernaut-XL-v9", "sdxl"),
        ("/models/ponyDiffusionV6.safetensors", "sdxl"),
        ("sd_xl_base_1.0.safetensors", "sdxl"),
        ("Tongyi-MAI/Z-Image", "z_image"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "flux2"),
        ("s3://models/flux2-klein-base/", "flux2"),
        ("black-forest-labs/FLUX.1-dev", "flux1"),
        ("/models/flux1-schnell.safetensors", "flux1"),
        ("Qwen/Qwen-Image-2512", "qwen_image"),
        ("lodestones/Chroma1-HD", "chroma"),
        ("krea/Krea-2-Raw", "krea2"),
        ("/models/krea2_raw_bf16.safetensors", "krea2"),
        ("black-forest-labs/FLUX.1-Krea-dev", "flux1"),
        ("stabilityai/stable-diffusion-3.5-medium", "sd3"),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "sd3"),
        ("/models/sd3.5_large.safetensors", "sd3"),
        ("s3://models/sd35-medium/", "sd3"),
        ("someone/sd30k-steps", "sd"),
        ("Tongyi-MAI/Z-Image-Turbo", "z_image"),
        ("s3://models/zimage/", "z_image"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd"),
        ("stabilityai/stable-diffusion-2-1", "sd"),
        ("s3://xl-bucket/models/anything/v5.safetensors", "sd"),
        ("someone/xlarge-v1", "sd"),
        ("toybox", "sd"),
        ("", "sd"),
        ("\0", "sd"),
        ("x" * 10_000, "sd"),
    ],
)
def test_by_name(name: str, expected: str) -> None:
    assert find_family(name) == expected


@pytest.mark.slow
def test_what_lies_at_a_path_counts_for_more_than_its_name(tiny_base: Path, tiny_xl_base: Path, tmp_path: Path) -> None:
    for source, name in ((tiny_base, "sdxl-model"), (tiny_xl_base, "model")):
        shutil.copytree(source, tmp_path / name)
        convert(str(source), tmp_path / f"{name}-file" / "model.safetensors")
    assert find_family(str(tmp_path / "model")) == "sdxl"
    assert find_family(str(tmp_path / "sdxl-model")) == "sd"
    for path in (tmp_path / "model-file", tmp_path / "model-file" / "model.safetensors"):
        assert find_family(str(path)) == "sdxl"
    for path in (tmp_path / "sdxl-model-file", tmp_path / "sdxl-model-file" / "model.safetensors"):
        assert find_family(str(path)) == "sd"


def test_what_is_wrong_with_a_damaged_file_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sdxl.safetensors"
    for content in (b"", b"\xff" * 8, b"text"):
        path.write_bytes(content)
        assert find_family(str(path)) == "sd"
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_base(hyperparameters(pretrained_model_name_or_path=str(path)))


@pytest.mark.slow
def test_another_vae_from_a_file_serves_sdxls_latents(tiny_xl_base: Path, tmp_path: Path) -> None:
    """The file says neither how the UNet's latents are scaled nor whether the VAE overflows."""
    convert(str(tiny_xl_base), tmp_path / "whole.safetensors")
    prefix = "first_stage_model."
    vae = {k.removeprefix(prefix): v + 1 for k, v in load_file(tmp_path / "whole.safetensors").items() if prefix in k}
    save_file(vae, tmp_path / "vae.safetensors")
    own = load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_xl_base)))
    paths = {"pretrained_model_name_or_path": tiny_xl_base, "pretrained_vae_name_or_path": tmp_path / "vae.safetensors"}
    base = load_base(hyperparameters(**{name: str(path) for name, path in paths.items()}))
    assert (base.vae.config.scaling_factor, base.vae_dtype) == (0.13025, torch.float32)
    assert same(weights(base.vae), {name: value + 1 for name, value in weights(own.vae).items()})


def test_the_resolution_is_the_base_models_unless_one_is_asked_for() -> None:
    def side(**values: object) -> int:
        return Hyperparameters.parse({**PROMPTS, **values}).resolution

    assert side() == 512
    assert side(pretrained_model_name_or_path=XL) == 1024
    assert side(base_architecture="sdxl") == 1024
    assert side(pretrained_model_name_or_path=XL, base_architecture="sd") == 512
    assert side(pretrained_model_name_or_path=XL, resolution="512") == 512
    assert "resolution" not in Hyperparameters.parse({**PROMPTS, "base_architecture": "sdxl"}).to_sagemaker()


def test_the_text_encoders_are_trained_where_that_is_asked_for() -> None:
    asked = Hyperparameters.parse({**PROMPTS, "base_architecture": "sdxl", "train_text_encoder": "true"})
    for card in (CARDS["H100"], CARDS["L4"], CPU):
        plan = make_plan(Hyperparameters.parse({**PROMPTS, "base_architecture": "sdxl"}), card)
        assert not plan.train_text_encoder
        with_them = make_plan(asked, card)
        assert with_them.train_text_encoder
        assert card is CPU or with_them.predicted_peak_gb > plan.predicted_peak_gb


def test_sdxl_needs_more_memory_and_is_told_so() -> None:
    h = Hyperparameters.parse({**PROMPTS, "pretrained_model_name_or_path": XL})
    small = Hyperparameters.parse(PROMPTS)
    for name in ("T4", "A10G", "L4", "L40S", "A100-40", "A100-80", "H100"):
        plan = make_plan(h, CARDS[name])
        assert make_plan(small, CARDS[name]).predicted_peak_gb < plan.predicted_peak_gb <= CARDS[name].budget_gb
    with pytest.raises(UserError, match="use a larger card"):
        make_plan(h, find_card("8GB"))


@pytest.mark.parametrize("wrong", ["sd", "sdxl"])
def test_a_model_that_is_not_what_the_job_was_planned_for(wrong: str, tiny_base: Path, tiny_xl_base: Path) -> None:
    path = tiny_base if wrong == "sdxl" else tiny_xl_base
    with pytest.raises(UserError) as caught:
        load_base(hyperparameters(pretrained_model_name_or_path=str(path), base_architecture=wrong))
    (line,) = caught.value.problems
    assert str(path) in line
    assert f"set base_architecture={'sd' if wrong == 'sdxl' else 'sdxl'}" in line


def test_a_model_is_seen_where_the_job_finds_it(tiny_xl_base: Path, tmp_path: Path) -> None:
    (tmp_path / "channel" / "deep").mkdir(parents=True)
    (tmp_path / "channel" / "deep" / "model").symlink_to(tiny_xl_base)
    assert find_family(str(tmp_path / "channel")) == "sdxl"
    assert find_family(str(tmp_path / "channel" / "deep" / "model" / "unet")) == "sd"
