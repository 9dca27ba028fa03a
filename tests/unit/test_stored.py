"""Single-file checkpoints and directories: read, written, converted; checked against diffusers' own converters."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils as independent
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth_sm import toybox
from dreambooth_sm.cli import main
from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.models import load_base, read_stored
from dreambooth_sm.stored.directory import read_directory, write_directory
from dreambooth_sm.stored.files import HASH_FIELD, Stored, TensorFile, write_safetensors
from dreambooth_sm.stored.layout import parts_in, to_original
from dreambooth_sm.stored.model import StoredModel, clip_tokenizer, empty_module, tokenizers_of
from dreambooth_sm.stored.opening import open_tensors
from dreambooth_sm.stored.recognise import read_configs
from dreambooth_sm.stored.single_file import read_single_file, read_tokenizer, write_single_file
from tests.helpers.tiny import save_tiny_pipeline
from tests.helpers.training import hyperparameters, same, weights

Tensors = dict[str, torch.Tensor]


def read(model: StoredModel) -> dict[str, Tensors]:
    return {part: {name: tensor.read() for name, tensor in stored.items()} for part, stored in model.tensors.items()}


def alike(one: StoredModel, other: StoredModel) -> bool:
    left, right = read(one), read(other)
    return left.keys() == right.keys() and all(
        same(left[part], right[part]) and all(left[part][k].dtype == right[part][k].dtype for k in left[part])
        for part in left
    )


@pytest.fixture(scope="module")
def toy() -> StoredModel:
    return read_directory(toybox.BASE)


@pytest.fixture(scope="module")
def single(toy: StoredModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toybox model as one file; not to be written to."""
    path = tmp_path_factory.mktemp("single") / "toy.safetensors"
    write_single_file(toy, path, dtype=None, resolution=128, trigger="photo of zwx toy")
    return path


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> StoredModel:
    """A tiny pipeline whose text encoder has SD 2's width."""
    folder = tmp_path_factory.mktemp("second")
    base = load_base(hyperparameters(pretrained_model_name_or_path=str(save_tiny_pipeline(folder / "tiny", width=64))))
    configs = {"unet": dict(base.unet.config), "text_encoder": base.text_encoder.config.to_dict()}
    configs["unet"] |= {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": [1, 2]}
    configs["text_encoder"] |= {"hidden_size": 1024, "num_attention_heads": 16, "hidden_act": "gelu"}
    torch.manual_seed(0)
    for part, config in configs.items():
        module: Any = empty_module(part, config).to_empty(device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        setattr(base, part, module)
    base.scheduler.register_to_config(prediction_type="v_prediction")
    return StoredModel.of("second", base.pipeline())


@pytest.fixture(scope="module")
def xl(tiny_xl_base: Path) -> StoredModel:
    return read_directory(tiny_xl_base)


@pytest.fixture(scope="module")
def xl_single(xl: StoredModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL model as one file; not to be written to."""
    path = tmp_path_factory.mktemp("single") / "xl.safetensors"
    write_single_file(xl, path, dtype=torch.float16)
    return path


# --- The layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["toy", "second", "xl"])
def test_diffusers_own_converters_make_the_same_modules(which: str, request: pytest.FixtureRequest) -> None:
    model: StoredModel = request.getfixturevalue(which)
    checkpoint = {
        key: tensor.read()
        for part, stored in model.tensors.items()
        for key, tensor in to_original(part, stored, model.configs).items()
    }
    expected = read(model)
    unet = independent.convert_ldm_unet_checkpoint(dict(checkpoint), model.configs["unet"])
    vae = independent.convert_ldm_vae_checkpoint(dict(checkpoint), model.configs["vae"])
    if which == "second":
        text = independent.convert_open_clip_checkpoint(model.pipeline.text_encoder, dict(checkpoint))
    else:
        text = independent.convert_ldm_clip_checkpoint(dict(checkpoint))
    assert same(unet, expected["unet"])
    assert same(vae, expected["vae"])
    if which == "xl":
        prefix = "conditioner.embedders.1.model."
        assert all(key.startswith(prefix) or "embedders.1" not in key for key in checkpoint)
        encoder = model.pipeline.text_encoder_2
        found = independent.convert_open_clip_checkpoint(encoder, dict(checkpoint), prefix=prefix)
        assert same(found, expected["text_encoder_2"])
    assert same({name.removeprefix("text_model."): value for name, value in text.items()}, expected["text_encoder"])


def shapes_of(configs: dict[str, Any]) -> dict[str, Stored]:
    """The tensors that a checkpoint of a model of such configurations has, as shapes alone."""
    tensors: dict[str, Stored] = {}
    for part in parts_in(configs):
        state = empty_module(part, configs[part]).state_dict()
        tensors |= to_original(part, {name: Stored.of(value) for name, value in state.items()}, configs)
    return tensors


def meta_model(version: int) -> tuple[dict[str, Stored], dict[str, Any]]:
    """SD 1.5's or 2.1's tensors, as shapes alone, and the configurations that their hub repositories have."""
    width = 768 if version == 1 else 1024
    levels = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    configs: dict[str, dict[str, Any]] = {
        "unet": {
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": levels,
            "up_block_types": [name.replace("Down", "Up") for name in reversed(levels)],
            "layers_per_block": 2,
            "cross_attention_dim": width,
            "attention_head_dim": 8 if version == 1 else [5, 10, 20, 20],
            "use_linear_projection": version == 2,
        },
        "vae": {
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 4,
            "scaling_factor": 0.18215,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        "text_encoder": {
            "vocab_size": 49408,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 12 if version == 1 else 23,
            "num_attention_heads": 12 if version == 1 else 16,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu" if version == 1 else "gelu",
        },
    }
    return shapes_of(configs), configs


def meta_xl() -> tuple[dict[str, Stored], dict[str, Any]]:
    """SDXL's tensors and configurations, likewise."""
    _, configs = meta_model(1)
    configs["unet"] |= {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    configs["vae"] |= {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
    configs["text_encoder_2"] = {
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    }
    return shapes_of(configs), configs


@pytest.mark.parametrize(("version", "prediction"), [(1, "epsilon"), (2, "v_prediction")])
def test_shapes_tell_the_configuration(version: int, prediction: str) -> None:
    tensors, expected = meta_model(version)
    unet = [name for name in tensors if name.startswith("model.diffusion_model.")]
    vae = [name for name in tensors if name.startswith("first_stage_model.")]
    assert (len(unet), len(vae)) == (686, 248)  # as in the files of CompVis and Stability AI
    assert tensors["model.diffusion_model.output_blocks.8.2.conv.weight"].shape == (640, 640, 3, 3)
    assert tensors["first_stage_model.decoder.up.3.block.0.conv1.weight"].shape == (512, 512, 3, 3)
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    if version == 2:
        last = "cond_stage_model.model.transformer.resblocks.{}.attn.in_proj_weight"
        assert tensors[last.format(22)].shape == (3072, 1024)
        tensors[last.format(23)] = tensors[last.format(22)]  # OpenCLIP's own last layer, which is not used
    configs, remarks = read_configs(TensorFile(Path("/model.safetensors"), tensors, {}), None)
    for part, config in expected.items():
        assert {key: configs[part][key] for key in config} == config
    assert configs["scheduler"]["prediction_type"] == prediction
    assert bool(remarks) == (version == 2)
    # Built from what was found, the modules have every tensor.
    again = {key: tensor.shape for key, tensor in shapes_of(configs).items()}
    assert again.items() <= {key: tensor.shape for key, tensor in tensors.items()}.items()


@pytest.mark.slow
def test_shapes_tell_the_configuration_of_sdxl() -> None:
    tensors, expected = meta_xl()
    # As in Stability AI's file, which holds position_ids and logit_scale besides: 2,515 tensors.
    prefixes = ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
    counts = [sum(name.startswith(prefix) for name in tensors) for prefix in prefixes]
    assert counts == [1680, 248, 196, 389]
    assert sum(counts) == len(tensors) == 2515 - 2
    assert tensors["model.diffusion_model.label_emb.0.0.weight"].shape == (1280, 2816)
    assert tensors["model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight"].shape == (1280, 2048)
    assert tensors["model.diffusion_model.output_blocks.5.2.conv.weight"].shape == (640, 640, 3, 3)
    resblock = "conditioner.embedders.1.model.transformer.resblocks.31."
    assert tensors[f"{resblock}attn.in_proj_weight"].shape == (3840, 1280)
    configs, remarks = read_configs(TensorFile(Path("/model.safetensors"), tensors, {}), None)
    for part, config in expected.items():
        assert {key: configs[part][key] for key in config} == config
    assert "upcast_attention" not in configs["unet"]
    assert (configs["scheduler"]["_class_name"], configs["scheduler"]["prediction_type"]) == (
        "EulerDiscreteScheduler",
        "epsilon",
    )
    assert remarks == []
    assert {k: v.shape for k, v in shapes_of(configs).items()} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "smaller",
    [
        {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
        {"mid_block_type": "UNetMidBlock2D"},
        {"transformer_layers_per_block": [1, 2, 5], "reverse_transformer_layers_per_block": [10, 2, 1]},
    ],
    ids=["uneven levels", "middle without attention", "shallower down than up"],
)
def test_models_distilled_from_sdxl_are_refused_by_name(smaller: dict[str, Any]) -> None:
    _, configs = meta_xl()
    configs["unet"] |= smaller
    with pytest.raises(UserError, match=r"^/model.safetensors is a smaller model, distilled .* SSD-1B"):
        read_configs(TensorFile(Path("/model.safetensors"), shapes_of(configs), {}), None)


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [True, False])
def test_what_an_empty_prompt_means_survives_the_file(zeros: bool, tiny_xl_base: Path, tmp_path: Path) -> None:
    model = read_directory(tiny_xl_base)
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    write_single_file(model, tmp_path / "m.safetensors")
    write_directory(read_single_file(tmp_path / "m.safetensors"), tmp_path / "dir")
    assert json.loads((tmp_path / "dir/model_index.json").read_text())["force_zeros_for_empty_prompt"] is zeros


@pytest.mark.parametrize("marks", [("v_pred",), ("v_pred", "ztsnr")])
def test_sdxl_files_that_are_marked_as_v_prediction(
    marks: tuple[str, ...], xl_single: Path, xl: StoredModel, tmp_path: Path
) -> None:
    marked = {**load_file(xl_single), **{mark: torch.empty(0) for mark in marks}}
    with safe_open(xl_single, "pt") as file:
        notes = {key: value for key, value in file.metadata().items() if "tokenizer" in key}
    save_file(marked, tmp_path / "v.safetensors", notes)
    model = read_single_file(tmp_path / "v.safetensors")
    config = model.pipeline.scheduler.config
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr == ("ztsnr" in marks)
    assert config.timestep_spacing == ("trailing" if "ztsnr" in marks else "leading")
    assert same(read(model)["unet"], {name: value.half() for name, value in read(xl)["unet"].items()})
    # The marks come back, for programs that know no others.
    write_single_file(model, tmp_path / "again.safetensors", dtype=None)
    assert same(load_file(tmp_path / "again.safetensors"), marked)


@pytest.mark.slow
def test_sdxl_without_our_metadata(xl_single: Path, xl: StoredModel, tmp_path: Path) -> None:
    """All but the tokenizers follow from names and shapes, in both formats and with what else such files hold."""
    others = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "denoiser.sigmas": torch.ones(3),
    }
    with safe_open(xl_single, "pt") as file:
        notes = {key: value for key, value in file.metadata().items() if "tokenizer" in key}
    tensors = {**load_file(xl_single), **others}
    save_file(tensors, tmp_path / "m.safetensors", notes)
    torch.save({"state_dict": tensors, **notes}, tmp_path / "m.ckpt")
    wanted = {part: {k: v.half() for k, v in stored.items()} for part, stored in read(xl).items()}
    for path in (tmp_path / "m.safetensors", tmp_path / "m.ckpt"):
        model = read_single_file(path)
        found = read(model)
        assert all(same(found[part], wanted[part]) for part in wanted)
        for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
            ours, theirs = (pipeline.components[part].config for pipeline in (model.pipeline, xl.pipeline))
            names = ["attention_head_dim", "transformer_layers_per_block", "down_block_types", "force_upcast"]
            names += ["scaling_factor", "num_hidden_layers", "num_attention_heads", "hidden_size", "projection_dim"]
            for name in names:
                if hasattr(theirs, name) and (part, name) != ("text_encoder", "projection_dim"):
                    assert _plain(getattr(ours, name)) == _plain(getattr(theirs, name)), (part, name)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("given_", "expected", "remarks"),
    [
        ({"notes": {"global_step": 875000}}, "epsilon", 0),
        ({"notes": {"global_step": 110000}}, "v_prediction", 1),
        ({"notes": {"modelspec.prediction_type": "epsilon"}}, "epsilon", 0),
        ({"notes": {"modelspec.prediction_type": "v"}}, "v_prediction", 0),
        ({"yaml": "v"}, "v_prediction", 0),
        ({"yaml": "eps"}, "epsilon", 0),
        ({"asked": "epsilon"}, "epsilon", 0),
    ],
)
def test_what_sd2_predicts(given_: dict[str, Any], expected: str, remarks: int, tmp_path: Path) -> None:
    tensors, _ = meta_model(2)
    path = tmp_path / "model.ckpt"
    if "yaml" in given_:
        params = {"parameterization": given_["yaml"], "unet_config": {"params": {"num_head_channels": 64}}}
        path.with_suffix(".yaml").write_text(json.dumps({"model": {"params": params}}))  # JSON is YAML
    configs, said = read_configs(TensorFile(path, tensors, given_.get("notes", {})), given_.get("asked"))
    assert configs["scheduler"]["prediction_type"] == expected
    assert len(said) == remarks


@pytest.mark.slow
def test_sd1_with_a_v_prediction_mark() -> None:
    tensors, _ = meta_model(1)
    tensors["v_pred"] = Stored.of(torch.empty(0))
    configs, _ = read_configs(TensorFile(Path("/m.safetensors"), tensors, {}), None)
    assert configs["scheduler"]["prediction_type"] == "v_prediction"


@pytest.mark.slow
def test_a_yaml_that_is_none(tmp_path: Path) -> None:
    tensors, _ = meta_model(1)
    (tmp_path / "m.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"m\.yaml is not a configuration"):
        read_configs(TensorFile(tmp_path / "m.ckpt", tensors, {}), None)


@pytest.mark.slow
def test_the_tokenizer_is_clips() -> None:
    first, second = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")
    # The ids that CLIP's own tokenizer gives.
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert second("a photo of a cat").input_ids == first("a photo of a cat").input_ids
    assert first("x", padding="max_length", max_length=5).input_ids == [49406, 343, 49407, 49407, 49407]
    assert second("x", padding="max_length", max_length=5).input_ids == [49406, 343, 49407, 0, 0]
    assert (len(first), first.model_max_length) == (49408, 77)


@pytest.mark.slow
def test_sdxl_files_get_clips_tokenizer_twice() -> None:
    tensors, _ = meta_xl()
    file = TensorFile(Path("/m.safetensors"), tensors, {})
    configs, _ = read_configs(file, None)
    first, second = (read_tokenizer(file, name, configs) for name in ("tokenizer", "tokenizer_2"))
    assert (first.pad_token, second.pad_token) == ("<|endoftext|>", "!")
    assert first("a photo of a cat").input_ids == second("a photo of a cat").input_ids


# --- Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["toy", "second", "xl"])
def test_directory_to_file_to_directory(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: StoredModel = request.getfixturevalue(which)
    write_single_file(model, tmp_path / "m.safetensors", dtype=None)
    back = read_single_file(tmp_path / "m.safetensors")
    assert alike(model, back)
    write_directory(back, tmp_path / "dir", dtype=None)
    again = read_directory(tmp_path / "dir")
    assert alike(model, again)
    prompt = "photo of zwx toy, at night"
    for name in tokenizers_of(model.tensors):
        ours, theirs = (getattr(each.pipeline, name) for each in (again, model))
        options = {"padding": "max_length", "max_length": 77}
        assert ours(prompt, **options).input_ids == theirs(prompt, **options).input_ids
    assert type(again.pipeline.scheduler) is type(model.pipeline.scheduler)
    kinds = ("prediction_type", "beta_start", "beta_schedule", "steps_offset")
    for kind in kinds:
        assert again.pipeline.scheduler.config[kind] == model.pipeline.scheduler.config[kind]


@pytest.mark.parametrize(
    ("size", "said", "read"), [(None, "256x256", 64), ([24, 40], "160x160", [24, 40]), (16, "64x64", 16)]
)
def test_the_size_that_a_unet_says_it_was_made_for(size: Any, said: str, read: Any, tmp_path: Path) -> None:
    """Two numbers are valid as well, and without any it is its kind's; the VAE of the tiny model has four pixels
    a latent."""
    model = read_directory(save_tiny_pipeline(tmp_path / "base"))
    model.pipeline.unet.register_to_config(sample_size=size)
    write_single_file(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["modelspec.resolution"] == said
    write_directory(read_single_file(tmp_path / "m.safetensors"), tmp_path / "dir")
    assert json.loads((tmp_path / "dir" / "unet" / "config.json").read_text())["sample_size"] == read


@pytest.mark.slow
@pytest.mark.parametrize("which", ["single", "xl_single"])
def test_file_to_directory_to_file(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    single: Path = request.getfixturevalue(which)
    assert main(["convert", str(single), str(tmp_path / "dir")]) == 0
    assert main(["convert", str(tmp_path / "dir"), str(tmp_path / "again.safetensors")]) == 0
    assert same(load_file(tmp_path / "again.safetensors"), load_file(single))


@pytest.mark.slow
def test_diffusers_draws_the_same_picture_from_the_file(single: Path) -> None:
    options = {"dtype": torch.float32, "local_files_only": True}
    ours = StableDiffusionPipeline.from_single_file(str(single), config=str(toybox.BASE), **options)
    theirs = StableDiffusionPipeline.from_pretrained(toybox.BASE, **options)
    drawn = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        picture = pipeline("a red cat", num_inference_steps=2, height=64, width=64, generator=generator).images[0]
        drawn.append(np.asarray(picture))
    assert np.array_equal(*drawn)


@pytest.mark.slow
def test_diffusers_draws_the_same_picture_from_an_sdxl_file(tiny_xl_base: Path, tmp_path: Path) -> None:
    assert main(["convert", str(tiny_xl_base), str(tmp_path / "m.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "m.safetensors"), str(tmp_path / "dir")]) == 0
    options = {"dtype": torch.float32, "local_files_only": True}
    pipelines = [
        StableDiffusionXLPipeline.from_pretrained(tiny_xl_base, **options),
        StableDiffusionXLPipeline.from_single_file(
            str(tmp_path / "m.safetensors"), config=str(tiny_xl_base), **options
        ),
        StableDiffusionXLPipeline.from_pretrained(tmp_path / "dir", **options),
    ]
    drawn = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        picture = pipeline("a red cat", num_inference_steps=2, height=64, width=64, generator=generator).images[0]
        drawn.append(np.asarray(picture))
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected = weights(getattr(pipelines[0], part))
        assert all(same(weights(getattr(pipeline, part)), expected) for pipeline in pipelines[1:])


def test_a_directory_loads_in_diffusers_and_in_older_transformers(toy: StoredModel, tmp_path: Path) -> None:
    write_directory(toy, tmp_path / "dir", dtype=torch.bfloat16)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "dir", dtype=torch.bfloat16)
    for part, tensors in read(toy).items():
        assert same(weights(getattr(pipeline, part)), {k: v.bfloat16() for k, v in tensors.items()})
    stored = load_file(tmp_path / "dir" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in stored)


def test_metadata(single: Path) -> None:
    with safe_open(single, "pt") as file:
        notes = file.metadata()
    assert notes["modelspec.sai_model_spec"] == "1.0.1"
    assert notes["modelspec.title"] == "toy"
    assert notes["modelspec.resolution"] == "128x128"
    assert notes["modelspec.prediction_type"] == "epsilon"
    assert notes["modelspec.architecture"] == "stable-diffusion-v1"
    assert notes["modelspec.trigger_phrase"] == "photo of zwx toy"
    import hashlib

    content = single.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert notes[HASH_FIELD] == "0x" + hashlib.sha256(data).hexdigest()


def test_metadata_of_sdxl(xl_single: Path) -> None:
    with safe_open(xl_single, "pt") as file:
        notes = file.metadata()
    assert notes["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert notes["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert (notes["modelspec.resolution"], notes["modelspec.prediction_type"]) == ("64x64", "epsilon")


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "turned": torch.randn(900, 700).t(),
        "large": torch.randn(1100, 1100),
        "whole": torch.arange(7),
    }
    stored = {name: Stored.of(value) for name, value in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", stored)
    assert same(load_file(tmp_path / "a.safetensors"), tensors)
    write_safetensors(tmp_path / "b.safetensors", stored, dtype=torch.bfloat16)
    found = load_file(tmp_path / "b.safetensors")
    assert same({"large": found["large"]}, {"large": tensors["large"].bfloat16()})
    assert found["turned"].dtype == torch.bfloat16
    assert found["whole"].dtype == torch.int64


# --- Pickles, EMA, VAE ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_ckpt(single: Path, zipped: bool, tmp_path: Path) -> None:
    tensors = load_file(single)
    key = "model.diffusion_model.time_embed.0.weight"
    tensors[key] = tensors[key].t().contiguous().t()  # not every tensor lies in a file as it is read
    with safe_open(single, "pt") as file:
        notes = file.metadata()
    path = tmp_path / "toy.ckpt"
    torch.save({"state_dict": tensors, "global_step": 5, **notes}, path, _use_new_zipfile_serialization=zipped)
    assert alike(read_single_file(path), read_single_file(single))
    base = load_base(hyperparameters(pretrained_model_name_or_path=str(path)))
    expected = load_base(hyperparameters(pretrained_model_name_or_path=toybox.NAME))
    for part in ("unet", "vae", "text_encoder"):
        assert same(weights(getattr(base, part)), weights(getattr(expected, part)))
    assert {p.dtype for p in base.unet.parameters()} == {torch.float32}


@pytest.mark.slow
def test_early_names_of_the_text_encoder(single: Path, tmp_path: Path) -> None:
    with safe_open(single, "pt") as file:
        notes = file.metadata()
    early = {name.replace(".text_model.", "."): value for name, value in load_file(single).items()}
    save_file(early, tmp_path / "early.safetensors", notes)
    assert alike(read_single_file(tmp_path / "early.safetensors"), read_single_file(single))


@pytest.mark.slow
def test_ema_weights(single: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    with safe_open(single, "pt") as file:
        notes = file.metadata()
    prefix = "model.diffusion_model."
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(prefix).replace(".", ""): value + 1
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    path = tmp_path / "both.safetensors"
    save_file({**tensors, **averages}, path, notes)
    assert alike(read_single_file(path), read_single_file(single))
    plain, average = read(read_single_file(path)), read(read_single_file(path, use_ema=True))
    assert same(average["unet"], {name: value + 1 for name, value in plain["unet"].items()})
    assert same(average["vae"], plain["vae"])
    with pytest.raises(UserError, match="no EMA weights"):
        read_single_file(single, use_ema=True)
    with pytest.raises(UserError, match="is a directory"):
        read_stored(toybox.BASE, use_ema=True)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_vae_from_a_file(prefix: str, tmp_path: Path) -> None:
    model = read_directory(save_tiny_pipeline(tmp_path / "tiny"))
    tensors = to_original("vae", model.tensors["vae"], model.configs)
    path = tmp_path / "vae.safetensors"
    names = {name.replace("first_stage_model.", prefix): tensor for name, tensor in tensors.items()}
    write_safetensors(path, names, dtype=torch.float16)
    h = hyperparameters(pretrained_model_name_or_path=str(tmp_path / "tiny"), pretrained_vae_name_or_path=str(path))
    vae = load_base(h).vae
    assert isinstance(vae, AutoencoderKL)
    assert same(weights(vae), {name: value.half().float() for name, value in read(model)["vae"].items()})


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_wants_to_run_code_is_refused(single: Path, zipped: bool, tmp_path: Path) -> None:
    path, owned = tmp_path / "evil.ckpt", tmp_path / "owned"
    content = {"state_dict": load_file(single), "callbacks": Malicious(owned)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as caught:
        read_single_file(path)
    (line,) = caught.value.problems
    assert f"{path} is refused: it wants to run posix.mkdir" in line
    assert not owned.exists()


# --- Damaged and foreign files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("which", ["single", "xl_single"])
def test_truncated_at_any_offset(which: str, suffix: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    single = whole = request.getfixturevalue(which)
    if suffix == ".ckpt":
        whole = tmp_path / "whole.ckpt"
        torch.save({"state_dict": load_file(single)}, whole)
    content = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    for offset in [0, 1, 8, len(content) - 1, *random.Random(0).sample(range(len(content)), 20)]:
        path.write_bytes(content[:offset])
        with pytest.raises(UserError) as caught:
            read_single_file(path)
        (line,) = caught.value.problems
        assert str(path) in line
        assert "copy it again" in line
        assert "\n" not in line


@given(st.integers(0, 2000), st.binary(min_size=1, max_size=20))
def test_a_header_that_was_tampered_with(
    single: Path, tmp_path_factory: pytest.TempPathFactory, at: int, noise: bytes
) -> None:
    """It is told in one line, or does not matter; nothing else is raised."""
    content = single.read_bytes()
    path = tmp_path_factory.getbasetemp() / "noisy.safetensors"
    path.write_bytes(content[:at] + noise + content[at + len(noise) :])
    problems = Problems()
    with problems.collected():
        model = read_single_file(path)
        for part, tensors in read_single_file(single).tensors.items():
            assert model.tensors[part].keys() == tensors.keys()
    assert [str(path) in line and "\n" not in line for line in problems.found] == [True] * len(problems.found)
    assert len(problems.found) <= 1


def named(*names: str, shape: tuple[int, ...] = (4, 4, 3, 3)) -> Tensors:
    return {name: torch.zeros(shape) for name in names}


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (named("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "a LoRA"),
        (named("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"), "a LoRA"),
        (named("double_blocks.0.img_attn.proj.weight"), "a Flux model"),
        (named("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight"), "a Stable Diffusion 3 model"),
        (named("model.diffusion_model.label_emb.0.0.weight", FIRST), "lacks tensors of a Stable Diffusion XL"),
        (named("model.diffusion_model.label_emb.0.0.weight", FIRST, shape=(320, 9, 3, 3)), "an inpainting model"),
        (named("conditioner.embedders.0.model.text_projection", FIRST), "a Stable Diffusion XL refiner"),
        (named("edm_mean", FIRST), "a Playground 2.5 model"),
        (named("noise_augmentor.betas", FIRST), "an unCLIP model"),
        (named("control_model.zero_convs.0.0.weight"), "a ControlNet"),
        (named("emb_params"), "a textual inversion embedding"),
        (named("to_k.linear.0.weight"), "a hypernetwork"),
        (named("encoder.conv_in.weight"), "pretrained_vae_name_or_path"),
        (named("down_blocks.0.resnets.0.conv1.weight"), "a UNet"),
        (named(FIRST, shape=(320, 9, 3, 3)), "an inpainting model whose UNet takes 9 channels"),
        (named(FIRST, shape=(320, 8, 3, 3)), "an InstructPix2Pix model"),
        (named("something.else"), "not a Stable Diffusion checkpoint"),
        (named(FIRST, shape=(320, 4, 3, 3)), "lacks tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_foreign_files_are_told_by_name(tensors: Tensors, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        read_single_file(path)
    (line,) = caught.value.problems
    assert said in line
    assert str(path) in line


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def cut(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, tensors[name][:-1].clone())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("model.diffusion_model.out.2.bias"), "unet lacks conv_out.bias"),
        (cut("first_stage_model.decoder.conv_in.bias"), "has the shape"),
        (without("cond_stage_model.transformer.text_model.final_layer_norm.bias"), "text_encoder lacks"),
    ],
)
def test_incomplete_files(change: Callable[[Tensors], None], said: str, single: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    with safe_open(single, "pt") as file:
        notes = file.metadata()
    change(tensors)
    save_file(tensors, tmp_path / "m.safetensors", notes)
    with pytest.raises(UserError, match=said):
        read_single_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("conditioner.embedders.1.model.text_projection"), "text_projection"),
        (without("conditioner.embedders.1.model.ln_final.bias"), "text_encoder_2 lacks text_model.final_layer_norm"),
        (without("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"), "text_encoder lacks"),
        (cut("model.diffusion_model.label_emb.0.0.bias"), "has the shape"),
    ],
)
@pytest.mark.parametrize("metadata", [True, False])
def test_incomplete_sdxl_files(
    change: Callable[[Tensors], None], said: str, metadata: bool, xl_single: Path, tmp_path: Path
) -> None:
    tensors = load_file(xl_single)
    with safe_open(xl_single, "pt") as file:
        notes = {key: value for key, value in file.metadata().items() if metadata or "tokenizer" in key}
    change(tensors)
    save_file(tensors, tmp_path / "m.safetensors", notes)
    with pytest.raises(UserError, match=said):
        read_single_file(tmp_path / "m.safetensors")


def test_a_tokenizer_that_nobody_knows(single: Path, tmp_path: Path) -> None:
    """Without our metadata a file has CLIP's vocabulary, or it can't be understood."""
    with safe_open(single, "pt") as file:
        notes = file.metadata()
    del notes["dreambooth_sm.tokenizer"]
    save_file(load_file(single), tmp_path / "m.safetensors", notes)
    with pytest.raises(UserError, match="knows 678 tokens"):
        read_single_file(tmp_path / "m.safetensors")


# --- The command ------------------------------------------------------------------------------------------------------


def test_convert_says_what_is_wrong(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    for source, target, said in (
        (str(single), "there", "exists"),
        (str(single), "new.ckpt", "never written"),
        (str(tmp_path / "nothing.safetensors"), "new", "does not exist"),
        (str(single), f"{'x' * 300}", "can't be written"),
    ):
        assert main(["convert", source, str(tmp_path / target)]) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "said"), [(1e5, "beyond the range of float16; take --precision bf16"), (float("nan"), "damaged")]
)
@pytest.mark.parametrize("target", ["m.safetensors", "dir"])
def test_weights_that_a_precision_can_not_hold(
    value: float, said: str, target: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = read_directory(tiny_base)
    model.load().unet.conv_in.weight[1, 2, 0, 1] = value
    write_directory(StoredModel.of("large", model.pipeline), tmp_path / "large", dtype=None)
    assert main(["convert", str(tmp_path / "large"), str(tmp_path / target), "--precision", "fp16"]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    assert main(["convert", str(tmp_path / "large"), str(tmp_path / target)]) == 0
    assert alike(read_stored(tmp_path / target), read_stored(tmp_path / "large")) or value != value


@pytest.mark.slow
def test_convert_changes_the_precision(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(single), str(tmp_path / "dir"), "--precision", "fp32"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "dir")
    unet = load_file(tmp_path / "dir" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in unet.values()} == {torch.float32}


# --- Memory -----------------------------------------------------------------------------------------------------------

# Prints, for each call, the bytes that it takes at most, beyond what the same call takes with a small model. Each has a
# process of its own, forked from one that has imported what they need.
MEASURED = """
import json, os, resource, sys
from pathlib import Path
import dreambooth_sm.stored.classes
from dreambooth_sm import toybox
from dreambooth_sm.convert import convert
from dreambooth_sm.models import read_stored

def run(call, source, target):
    if call == "load":
        return read_stored(Path(source)).load(None)
    return convert(str(source), target, precision="fp16")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for call, source, target in json.loads(sys.argv[1]):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    run(call, toybox.BASE, Path(target).with_stem("small"))
    before = peak()
    kept = run(call, source, Path(target))
    print(peak() - before, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model of 80 million parameters: an fp32 directory, an fp16 directory and an fp16 file."""
    folder = tmp_path_factory.mktemp("large")
    paths = {
        "fp32": save_tiny_pipeline(folder / "fp32", width=256),
        "fp16": folder / "fp16",
        "file": folder / "m.safetensors",
    }
    for name in ("fp16", "file"):
        write = write_directory if name == "fp16" else write_single_file
        write(read_directory(paths["fp32"]), paths[name], dtype=torch.float16)
    return paths


@pytest.mark.slow
def test_memory_is_a_share_of_the_model(large: dict[str, Path], tmp_path: Path) -> None:
    shares = {
        ("load", "fp16", "unused-1"): 1.2,
        ("load", "fp32", "unused-2"): 1.2,
        ("load", "file", "unused-3"): 1.2,
        ("convert", "file", "dir"): 0.3,
        ("convert", "fp32", "m.safetensors"): 0.3,
    }
    calls = [(call, str(large[source]), str(tmp_path / call / target)) for call, source, target in shares]
    for call, *_ in shares:
        (tmp_path / call).mkdir(exist_ok=True)
    command = [sys.executable, "-c", MEASURED, json.dumps(calls)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    for (case, share), peak in zip(shares.items(), ended.stdout.splitlines(), strict=True):
        source = large[case[1]]
        size = sum(path.stat().st_size for path in (source, *source.rglob("*")) if path.is_file())
        assert int(peak) < share * size, case


def test_a_sample_is_of_the_values_that_are_read(tmp_path: Path) -> None:
    matrix = torch.randn(30, 7).to(torch.bfloat16)
    save_file({"odd": torch.ones(3, dtype=torch.uint8), "matrix": matrix, "empty": torch.empty(0)}, tmp_path / "file")
    file = open_tensors(tmp_path / "file").tensors
    stored = file["matrix"]
    for each in (
        stored,
        stored.cast(torch.float64),
        stored.reshaped((7, 30)),
        stored.transposed(),
        stored.part(4, (10, 3)),
        Stored.stacked([stored, stored]),
        stored.cast(torch.float32).part(1, (5,)),
        file["odd"],
        file["empty"],
        Stored.of(matrix),
    ):
        for step in (1, 3, 1000):
            assert torch.equal(each.sample(step), each.read().flatten()[::step])
            assert each.sample(step).dtype == each.dtype
