"""Base models as people have them: other schedulers, scales, archives, wrong names, and knobs that would do nothing."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth_sm.cli import main
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.models import check_base, load_base, read_stored
from dreambooth_sm.stored.directory import read_directory
from dreambooth_sm.stored.layout import to_original
from dreambooth_sm.stored.single_file import write_single_file
from tests.helpers.marks import slow_except
from tests.helpers.training import hyperparameters, same, weights

UNET = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


def of(path: Path | str, **values: object) -> Hyperparameters:
    return hyperparameters(pretrained_model_name_or_path=str(path), **values)


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture(scope="module")
def single(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    write_single_file(read_directory(tiny_base), path, dtype=None)
    return path


@pytest.fixture(scope="module")
def expected(tiny_base: Path) -> dict[str, dict[str, torch.Tensor]]:
    base = load_base(of(tiny_base))
    return {part: weights(getattr(base, part)) for part in ("unet", "vae", "text_encoder")}


def is_the_model(path: Path, expected: dict[str, dict[str, torch.Tensor]], **values: object) -> None:
    check_base(of(path, **values))
    base = load_base(of(path, **values))
    assert all(same(weights(getattr(base, part)), tensors) for part, tensors in expected.items())


def refusal(path: Path | str, **values: object) -> str:
    with pytest.raises(UserError) as caught:
        check_base(of(path, **values))
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- Schedulers -------------------------------------------------------------------------------------------------------

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}, "EDMDPMSolver"),
        ({"_class_name": "SchedulerOfTomorrow", **BETAS}, "SchedulerOfTomorrow"),
        ({"_class_name": "UNet2DModel", **BETAS}, "UNet2DModel"),
        ({"_class_name": "CogVideoXDDIMScheduler", **BETAS}, "CogVideoXDDIMScheduler"),
        ({"_class_name": "DPMSolverSDEScheduler"}, "DPMSolverSDEScheduler needs"),
        ({"_class_name": "DDPMScheduler", **BETAS, "prediction_type": "sample"}, 'prediction_type is "sample"'),
        ({"_class_name": "DPMSolverMultistepScheduler", **BETAS, "use_flow_sigmas": True}, "continuous"),
        ({"_class_name": "EulerDiscreteScheduler", **BETAS, "timestep_type": "continuous"}, "continuous"),
        ({"_class_name": "DDPMScheduler", **BETAS, "beta_schedule": "cosine of mine"}, "cosine of mine"),
        ({"_class_name": "DDPMScheduler", **BETAS, "beta_end": -1}, "beta_end is -1"),
        ({"_class_name": "DDPMScheduler", **BETAS, "beta_start": "a lot"}, 'beta_start is "a lot"'),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1, 0.2]}, "schedule is not what DDPM makes"),
        ({"_class_name": "DDPMScheduler", **BETAS, "num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
        ({}, "is not a scheduler of diffusers"),
    ],
    ids=lambda value: str(value.get("_class_name", "none")) if isinstance(value, dict) else "",
)
def test_schedulers_of_another_kind_are_refused_by_name(config: dict[str, Any], said: str, copied: Path) -> None:
    (copied / SCHEDULER).write_text(json.dumps(config))
    assert said in refusal(copied)
    with pytest.raises(UserError):
        load_base(of(copied))


SCHEDULERS = """
DDPMScheduler DDIMScheduler PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler EulerAncestralDiscreteScheduler
HeunDiscreteScheduler DPMSolverMultistepScheduler LCMScheduler UniPCMultistepScheduler DEISMultistepScheduler
KDPM2DiscreteScheduler TCDScheduler
"""


@pytest.mark.parametrize(
    "name", slow_except(["DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"], SCHEDULERS.split())
)
@pytest.mark.parametrize("betas", [BETAS, {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.02}])
def test_a_schedule_is_trained_whatever_draws_with_it(name: str, betas: dict[str, Any], copied: Path) -> None:
    (copied / SCHEDULER).write_text(json.dumps({"_class_name": name, **betas, "prediction_type": "v_prediction"}))
    scheduler = read_stored(copied).pipeline.scheduler
    root = 0.5 if betas is BETAS else 1.0
    steps = torch.linspace(betas["beta_start"] ** root, betas["beta_end"] ** root, 1000) ** (1 / root)
    from dreambooth_sm.stored.noise_schedule import drawing_scheduler, training_scheduler

    for made in (training_scheduler(scheduler), drawing_scheduler(scheduler)):
        assert torch.allclose(made.alphas_cumprod, torch.cumprod(1 - steps, 0), rtol=1e-4)
        assert made.config.prediction_type == "v_prediction"


def test_betas_of_a_schedulers_own_defaults_are_kept_and_told(copied: Path) -> None:
    """LCM's are those of Stable Diffusion, and DDPM's are not."""
    from dreambooth_sm.stored.noise_schedule import drawing_scheduler, training_scheduler

    (copied / SCHEDULER).write_text(json.dumps({"_class_name": "LCMScheduler"}))
    stored = read_stored(copied)
    steps = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for made in (training_scheduler(stored.pipeline.scheduler), drawing_scheduler(stored.pipeline.scheduler)):
        assert torch.allclose(made.alphas_cumprod, torch.cumprod(1 - steps, 0), rtol=1e-4)
    (remark,) = stored.remarks
    assert "does not say beta_start=0.00085, beta_end=0.012, beta_schedule=scaled_linear" in remark


def test_what_the_user_says_instead_is_not_asked_for(copied: Path) -> None:
    change(copied / SCHEDULER, prediction_type="sample")
    assert load_base(of(copied, prediction_type="epsilon")).scheduler.config.prediction_type == "epsilon"


def test_layers_that_a_configuration_leaves_out_are_told(copied: Path) -> None:
    """As people have them who skip CLIP's last layer this way."""
    config = copied / "text_encoder" / "config.json"
    layers = json.loads(config.read_text())["num_hidden_layers"]
    change(config, num_hidden_layers=layers - 1)
    (remark,) = read_stored(copied).remarks
    assert f"{copied / 'text_encoder'}: 16 tensors are of no layer that its configuration names" in remark
    assert f"encoder.layers.{layers - 1}.layer_norm1.bias" in remark


def test_text_encoders_are_tried_before_anything_is_drawn(copied: Path) -> None:
    change(copied / "text_encoder" / "config.json", layer_norm_eps=None)
    with pytest.raises(UserError, match=r"its text encoder can't be run .*eps"):
        read_stored(copied)


@pytest.mark.slow
def test_notes_of_versions_and_types_decide_nothing(copied: Path) -> None:
    change(copied / "text_encoder" / "config.json", dtype=2.5, torch_dtype="nonsense", transformers_version=[])
    change(copied / "unet" / "config.json", _diffusers_version="seven")
    load_base(of(copied)).save(copied / "again")
    assert load_base(of(copied / "again")).unet.config._diffusers_version


# --- Scales -----------------------------------------------------------------------------------------------------------


def quantised(tensors: dict[str, torch.Tensor], scale: str, by_row: bool) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Matrices as fp8 with scales, and what else such files hold."""
    found: dict[str, torch.Tensor] = {}
    changed = set()
    for name, value in tensors.items():
        found[name] = value
        if name.endswith(".weight") and value.ndim == 2:
            largest = value.abs().amax(1, keepdim=True) if by_row else value.abs().amax()
            factor = (largest / 400).float().clamp(min=1e-12)
            found[name] = (value / factor).to(torch.float8_e4m3fn)
            stem = name.removesuffix(".weight")
            found[f"{stem}.{scale}"] = factor
            found[f"{stem}.{'scale_input' if scale == 'scale_weight' else 'input_scale'}"] = torch.ones(1)
            changed.add(name)
    return found, changed


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("by_row", [False, True])
def test_weights_with_scales(scale: str, by_row: bool, copied: Path, single: Path, tmp_path: Path) -> None:
    tensors = load_file(copied / UNET)
    scaled, changed = quantised(tensors, scale, by_row)
    assert len(changed) > 10
    save_file({**scaled, "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, copied / UNET)
    assert not read_stored(copied).remarks
    found = weights(load_base(of(copied)).unet)
    for name, value in tensors.items():
        if name in changed:
            stem = name.removesuffix(".weight")
            assert torch.equal(found[name], scaled[name].float() * scaled[f"{stem}.{scale}"])
            assert torch.allclose(found[name], value, atol=value.abs().max().item() / 8)
        else:
            assert torch.equal(found[name], value)
    # The same in a single file.
    from safetensors import safe_open

    with safe_open(single, "pt") as file:
        notes = file.metadata()
    whole, _ = quantised(load_file(single), scale, by_row)
    save_file({**whole, "model.diffusion_model.scaled_fp8": torch.empty(0)}, tmp_path / "m.safetensors", notes)
    model = read_stored(tmp_path / "m.safetensors")
    assert not model.remarks
    assert same({name: value.read() for name, value in model.tensors["unet"].items()}, found)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"weight.absmax": torch.ones(4), "weight.quant_map": torch.ones(16)}, "absmax"),
        ({"weight.quant_state.bitsandbytes__nf4": torch.ones(4, dtype=torch.uint8)}, "quant_state"),
        ({"SCB": torch.ones(4)}, "SCB"),
        ({"weight_scale_inv": torch.ones(2, 2)}, "weight_scale_inv"),
        ({"weight_scale": torch.ones(3, 5)}, "weight_scale"),
        ({"lora_A.default.weight": torch.ones(4, 4)}, "lora_A"),
    ],
)
def test_what_belongs_to_a_weight_is_never_left_out(others: dict[str, Any], said: str, copied: Path) -> None:
    stem = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({**load_file(copied / UNET), **{f"{stem}.{key}": value for key, value in others.items()}}, copied / UNET)
    line = refusal(copied)
    assert f"{stem}.weight of unet comes with {stem}." in line
    assert said in line
    assert "fp16" in line


def test_whole_numbers_are_no_weights(copied: Path) -> None:
    save_file({name: (value * 100).to(torch.int8) for name, value in load_file(copied / UNET).items()}, copied / UNET)
    assert "torch.int8" in refusal(copied)


# --- Where the model is -----------------------------------------------------------------------------------------------


def packed(source: Path, target: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            archive.add(path, path.relative_to(source.parent if source.is_file() else source), recursive=False)
    return target


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where archives are unpacked."""
    directory = tmp_path_factory.mktemp("kept")
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


@pytest.mark.slow
def test_models_a_level_too_high_in_archives_and_under_other_names(
    tiny_base: Path, single: Path, expected: dict[str, Any], tmp_path: Path, kept: Path
) -> None:
    channel = tmp_path / "channel"
    channel.mkdir()
    shutil.copytree(tiny_base, channel / "models" / "tiny")
    (channel / ".cache").mkdir()
    is_the_model(channel, expected)
    is_the_model(channel / "models", expected)
    archives = tmp_path / "output"
    archives.mkdir()
    packed(tiny_base, archives / "model.tar.gz")
    packed(single, archives / "output.tar.gz")
    is_the_model(archives, expected)  # as SageMaker leaves it
    is_the_model(archives / "model.tar.gz", expected)
    assert len(list(kept.glob("*/*/model_index.json"))) == 1  # unpacked once
    is_the_model(packed(single, tmp_path / "file.tar", "w"), expected)
    for name in ("M.SAFETENSORS", "model", "model.ckpt"):
        (tmp_path / name).mkdir()
        shutil.copy(single, tmp_path / name / name)
        is_the_model(tmp_path / name / name, expected)
        is_the_model(tmp_path / name, expected)
    assert main(["convert", str(archives / "model.tar.gz"), str(tmp_path / "converted")]) == 0
    is_the_model(tmp_path / "converted", expected)


def test_several_models_are_named(single: Path, tiny_base: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.ckpt"):
        shutil.copy(single, tmp_path / name)
    line = refusal(tmp_path)
    assert "holds 2 models (a.safetensors, b.ckpt)" in line
    assert f"such as {tmp_path / 'a.safetensors'}" in line
    for name in ("one", "two"):
        shutil.copytree(tiny_base, tmp_path / "deep" / name)
    assert "holds 2 models (one, two)" in refusal(tmp_path / "deep")


def test_archives_that_can_not_be_unpacked(tiny_base: Path, tmp_path: Path, kept: Path) -> None:
    whole = packed(tiny_base, tmp_path / "whole.tar.gz")
    cut, evil, nested = tmp_path / "cut.tar.gz", tmp_path / "evil.tar.gz", tmp_path / "nested.tar.gz"
    cut.write_bytes(whole.read_bytes()[:-2000])
    with tarfile.open(evil, "w:gz") as archive:
        archive.add(tiny_base / "model_index.json", "../../model_index.json")
    packed(whole, nested)
    huge = tmp_path / "huge.tar"
    huge.write_bytes(b"".join([tarfile.TarInfo("a").tobuf()[:124], b"77777777777", b"\0"]) + b"\0" * 2000)
    for path, said in ((cut, "can't be unpacked"), (evil, "is refused"), (nested, "is a file, but not of a model")):
        assert said in refusal(path)
    refusal(huge)
    assert not list(kept.rglob("*.partial"))
    assert not list(tmp_path.parent.glob("model_index.json"))


# --- Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_without_a_vae_where_one_is_named(
    copied: Path, single: Path, tiny_base: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    shutil.rmtree(copied / "vae")
    from safetensors import safe_open

    with safe_open(single, "pt") as file:
        notes = file.metadata()
    rest = {name: value for name, value in load_file(single).items() if not name.startswith("first_stage_model")}
    save_file(rest, tmp_path / "rest.safetensors", notes)
    original = to_original("vae", read_directory(tiny_base).tensors["vae"], read_directory(tiny_base).configs)
    inner = {name.removeprefix("first_stage_model."): value.read() for name, value in original.items()}
    save_file(inner, tmp_path / "original.safetensors")
    (tmp_path / "alone").mkdir()
    shutil.copy(tiny_base / "vae/diffusion_pytorch_model.safetensors", tmp_path / "alone" / "VAE.SafeTensors")
    vaes = [tiny_base / "vae", tiny_base, single, tmp_path / "original.safetensors", tmp_path / "alone"]
    vaes += [tmp_path / "alone" / "VAE.SafeTensors", tiny_base / "vae/diffusion_pytorch_model.safetensors"]
    for vae in vaes:
        is_the_model(copied, expected, pretrained_vae_name_or_path=str(vae))
    is_the_model(tmp_path / "rest.safetensors", expected, pretrained_vae_name_or_path=str(tmp_path / "alone"))
    for base in (copied, tmp_path / "rest.safetensors"):
        assert "vae" in refusal(base)


@pytest.mark.slow
def test_configurations_as_people_have_them(copied: Path, expected: dict[str, Any]) -> None:
    change(copied / "model_index.json", _class_name=["diffusers", "StableDiffusionPipeline"])
    change(copied / SCHEDULER, _class_name=["diffusers", "DDPMScheduler"])
    change(copied / "unet/config.json", sample_size=None, _class_name=["diffusers", "UNet2DConditionModel"])
    config = json.loads((copied / "tokenizer/tokenizer_config.json").read_text())
    del config["model_max_length"]
    (copied / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    for path in copied.rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    is_the_model(copied, expected)
    base = load_base(of(copied))
    assert base.tokenizer.model_max_length == 77
    base.save_single_file(copied / "again.safetensors")


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("unet/config.json", {"_class_name": "UNetMotionModel"}, "UNetMotionModel"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ("unet/config.json", {"auto_map": {"AutoModel": "own.Own"}}, "auto_map"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
        ("vae/config.json", {"scaling_factor": "0.18"}, "scaling_factor"),
        ("text_encoder/config.json", {"model_type": "bert"}, "bert model"),
        ("text_encoder/config.json", {"hidden_act": "none of all"}, "makes no CLIPTextModel"),
        ("model_index.json", {"text_encoder": ["transformers", "BertModel"]}, "its text_encoder is a BertModel"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "long"}, 'model_max_length is "long"'),
    ],
)
def test_parts_of_another_kind(file: str, values: dict[str, Any], said: str, copied: Path) -> None:
    change(copied / file, **values)
    line = refusal(copied)
    assert said in line
    assert str(copied / file) in line


@pytest.mark.slow
def test_stray_tensors_are_named(single: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(single, "pt") as file:
        notes = file.metadata()
    stray = {
        "lora_unet_a.lora_down.weight": torch.ones(2),
        "emb_params": torch.ones(1),
        "model_ema.decay": torch.ones(1),
    }
    save_file({**load_file(single), **stray}, tmp_path / "m.safetensors", notes)
    is_the_model(tmp_path / "m.safetensors", expected)
    (remark,) = read_stored(tmp_path / "m.safetensors").remarks
    assert "2 tensors are of no part of the model and are left out, such as emb_params" in remark


# --- Knobs that would do nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"variant": "nonsense"}, "variant=nonsense"),
        ({"revision": "main"}, "revision=main"),
        ({"hf_token_secret": "mine"}, "hf_token_secret"),
        ({"use_ema_weights": True}, "use_ema_weights=true"),
    ],
)
@pytest.mark.parametrize("which", ["directory", "file"])
def test_knobs_that_would_do_nothing_are_named(
    values: dict[str, Any], said: str, which: str, tiny_base: Path, single: Path
) -> None:
    if which == "file" and "use_ema_weights" in values:
        said = "no EMA weights"
    assert said in refusal(tiny_base if which == "directory" else single, **values)


@pytest.mark.slow
def test_a_directorys_variants_can_be_chosen(copied: Path) -> None:
    other = {name: value + 1 for name, value in load_file(copied / UNET).items()}
    save_file(other, copied / UNET.replace(".safetensors", ".non_ema.safetensors"))
    assert not same(weights(load_base(of(copied)).unet), other)
    assert same(weights(load_base(of(copied, variant="non_ema")).unet), other)
