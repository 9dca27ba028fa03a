"""Base models in, trained pipelines out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import PretrainedModel, check_base, load_base
from dreambooth_sm.sources import RENAMED
from tests.helpers.training import hyperparameters, same, weights

UNET = "unet/diffusion_pytorch_model.safetensors"


def of(path: Path | str, **values: object) -> Hyperparameters:
    return hyperparameters(pretrained_model_name_or_path=str(path), **values)


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    """A base model's directory that may be damaged."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def test_modules_are_loaded_in_fp32_frozen_and_in_eval_mode(tiny_base: Path) -> None:
    base = load_base(of(tiny_base))
    assert base.latent_scale == 4
    for module in (base.unet, base.vae, base.text_encoder):
        assert not module.training
        assert {(p.dtype, p.requires_grad, p.device.type) for p in module.parameters()} == {
            (torch.float32, False, "cpu")
        }
    assert same(weights(base.unet), load_file(tiny_base / UNET))


def test_a_saved_model_is_a_pipeline_of_half_precision_that_loads_everywhere(
    base: PretrainedModel, tmp_path: Path
) -> None:
    expected = {name: {k: v.half() for k, v in weights(getattr(base, name)).items()} for name in ("unet", "vae")}
    base.save(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.stat().st_size > 100_000} == {".safetensors"}
    assert {tensor.dtype for tensor in load_file(tmp_path / UNET).values()} == {torch.float16}
    with_diffusers = StableDiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    ours = load_base(of(tmp_path))
    for name, values in expected.items():
        assert same(weights(getattr(with_diffusers, name)), values)
        assert same(weights(getattr(ours, name)), {k: v.float() for k, v in values.items()})
    assert with_diffusers.tokenizer("photo of zwx toy").input_ids == base.tokenizer("photo of zwx toy").input_ids
    assert ours.scheduler.config.beta_schedule == base.scheduler.config.beta_schedule


def test_a_pipeline_shares_the_parts_weights(base: PretrainedModel) -> None:
    pipeline = base.pipeline()
    assert pipeline.unet is base.unet
    assert pipeline.safety_checker is None


@pytest.mark.slow
@pytest.mark.parametrize("half", [("unet", "vae", "text_encoder"), ("unet",)])
def test_directories_with_fp16_files_alone(copied: Path, half: tuple[str, ...]) -> None:
    expected = weights(load_base(of(copied)).unet)
    for part in half:
        for path in (copied / part).glob("*.safetensors"):
            path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    base = load_base(of(copied))
    assert same(weights(base.unet), expected)
    assert {p.dtype for p in base.unet.parameters()} == {torch.float32}


@pytest.mark.slow
def test_half_precision_stays_where_it_is_asked_to(copied: Path) -> None:
    for name, dtype in (("unet", torch.float16), ("text_encoder", torch.bfloat16), ("vae", torch.float64)):
        (path,) = (copied / name).glob("*.safetensors")
        save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
    base, full = load_base(of(copied), None), load_base(of(copied))
    for name, dtype in (("unet", torch.float16), ("text_encoder", torch.bfloat16), ("vae", torch.float32)):
        found = weights(getattr(base, name))
        assert {value.dtype for value in found.values()} == {dtype}
        assert same({key: value.float() for key, value in found.items()}, weights(getattr(full, name)))


@pytest.mark.slow
def test_full_precision_files_are_preferred(copied: Path) -> None:
    (copied / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert load_base(of(copied)).unet is not None


def test_a_replacement_vae(tiny_base: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.5)
    vae.save_pretrained(tmp_path / "vae")
    base = load_base(of(tiny_base, pretrained_vae_name_or_path=str(tmp_path / "vae")))
    assert same(weights(base.vae), weights(vae))
    assert base.pipeline().vae is base.vae


def damaged(path: str, content: bytes | None) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        target = directory / path
        if content is not None:
            target.write_bytes(content)
        elif target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink()

    return damage


def index(**values: object) -> bytes:
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged("model_index.json", None), "holds no model_index.json"),
        (damaged("model_index.json", b"{"), "can't be read"),
        (damaged("model_index.json", b"[]"), "can't be read"),
        (damaged("model_index.json", index(a=1)), "can't be read"),
        (damaged("model_index.json", index(_class_name="PixArtSigmaPipeline")), "holds a PixArtSigmaPipeline"),
        (
            damaged("model_index.json", index(_class_name="StableDiffusionXLImg2ImgPipeline")),
            "holds a StableDiffusionXLI",
        ),
        (damaged("vae", None), "vae is missing; copy the whole pipeline directory"),
        (damaged("tokenizer", None), "tokenizer is missing; copy the whole pipeline directory"),
    ],
)
def test_what_can_be_said_before_loading(copied: Path, damage: Callable[[Path], None], said: str) -> None:
    check_base(of(copied))
    damage(copied)
    with pytest.raises(UserError) as caught:
        check_base(of(copied))
    assert said in str(caught.value)
    assert str(copied) in str(caught.value)


def test_all_missing_parts_and_the_vae_are_told_at_once(copied: Path, tmp_path: Path) -> None:
    for part in ("unet", "scheduler"):
        shutil.rmtree(copied / part)
    with pytest.raises(UserError) as caught:
        check_base(of(copied, pretrained_vae_name_or_path=str(tmp_path / "no")))
    assert [part in line for part, line in zip(("unet", "scheduler", "vae"), caught.value.problems, strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize("path", ["/opt/ml/input/data/model", "./model", "~/model"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(path: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_base(of(path))


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        check_base(of(path))


@pytest.mark.parametrize(
    "damage",
    [
        damaged(UNET, b"\0" * 100),
        damaged(UNET, None),
        damaged("unet/config.json", b"{"),
        damaged("text_encoder/model.safetensors", b""),
        damaged("tokenizer/tokenizer.json", b"{"),
    ],
    ids=["damaged weights", "no weights", "damaged config", "empty weights", "damaged tokenizer"],
)
def test_a_damaged_directory_is_the_users_to_copy_again(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied)
    with pytest.raises(UserError) as caught:
        load_base(of(copied))
    (line,) = caught.value.problems
    assert str(copied) in line
    assert "again" in line
    assert "\n" not in line


def test_a_hub_id_that_can_not_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_base(of("someone/no-such-model"))
    assert "someone/no-such-model" in str(caught.value)
    assert "channel" in str(caught.value)


def test_the_seeds_model_id_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (old, new) = next(iter(RENAMED.items()))
    with pytest.raises(UserError, match=new):
        load_base(of(old))
