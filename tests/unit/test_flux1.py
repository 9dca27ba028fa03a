"""FLUX.1, compared with diffusers' own pipeline, transformer, converters and the arithmetic of its script."""

from __future__ import annotations

import copy
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file, save_file

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.comfy_file import write_comfy
from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.adapters.peft_file import write_peft
from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.convert import convert
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.describe import describe
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES, Conditioning
from dreambooth_sm.families.find import find_family
from dreambooth_sm.families.flux1 import run_in_fewer_passes
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw, draw_latents
from dreambooth_sm.stored.denoiser_file import read_denoiser
from dreambooth_sm.stored.model import empty_module
from dreambooth_sm.stored.opening import open_tensors
from tests.helpers.original_names import flux1_original
from tests.helpers.passes import compare_passes
from tests.helpers.tiny import save_tiny_flux1_pipeline
from tests.helpers.training import Run, hyperparameters
from tests.unit.test_z_image import quiet

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
DEV, SCHNELL = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
LICENCE = "flux-1-dev-non-commercial"
LORA = {"method": "lora", "base_architecture": "flux1"}
SHORT, LONG = "photo of zwx toy", "photo of zwx toy, " * 6


def parse(**values: object) -> Hyperparameters:
    usual = {"pretrained_model_name_or_path": DEV, "method": "lora", "accept_license": LICENCE}
    return Hyperparameters.parse({**PROMPTS, **usual, **values})


def train(base: PretrainedModel, root: Path, **values: object) -> Run:
    return Run(base, root, **{**LORA, "learning_rate": 1e-2, "max_train_steps": 2, **values}).train()


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    folder = save_tiny_flux1_pipeline(tmp_path_factory.mktemp("base") / "tiny", guidance=False, dynamic=False)
    return load_base(hyperparameters(pretrained_model_name_or_path=str(folder), method="lora"))


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_in_fewer_passes_it_computes_the_same(flux1: PretrainedModel, recomputing: bool, guided: bool) -> None:
    config = dict(flux1.modules["transformer"].config) | {"guidance_embeds": guided}
    transformer = FluxTransformer2DModel.from_config(config)
    random = torch.Generator().manual_seed(0)
    places = torch.randint(9, (9, 3), generator=random)
    inputs = {
        "hidden_states": torch.randn(2, 6, transformer.config.in_channels, generator=random),
        "encoder_hidden_states": torch.randn(2, 3, transformer.config.joint_attention_dim, generator=random),
        "pooled_projections": torch.randn(2, transformer.config.pooled_projection_dim, generator=random),
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([1.0, 3.5]) if guided else None,
        "img_ids": places[:6],
        "txt_ids": places[6:],
    }
    compare_passes(transformer, run_in_fewer_passes, inputs, recomputing=recomputing)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("side", [64, 48])
def test_pictures_are_the_pipelines_own(flux1: PretrainedModel, side: int, guidance: float) -> None:
    """To the bit, from the same seed."""
    pipeline = quiet(flux1.pipeline())
    options = {"height": side, "width": side, "num_inference_steps": 3, "guidance_scale": guidance}
    expected = pipeline(prompt=SHORT, generator=torch.Generator().manual_seed(3), **options).images[0]
    ((ours,),) = draw(flux1.pipeline(), SHORT, [3], resolution=side, steps=3, guidance=guidance)
    assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_what_is_not_told_its_guidance_draws_as_the_pipeline(schnell: PretrainedModel) -> None:
    pipeline = quiet(schnell.pipeline())
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    expected = pipeline(prompt=SHORT, generator=torch.Generator().manual_seed(3), **options).images
    (ours,) = draw_latents(schnell.pipeline(), SHORT, [3], size=(64, 64), steps=3)
    assert torch.equal(FluxPipeline._pack_latents(ours, *ours.shape), expected)


@pytest.mark.parametrize("size", [(1024, 1024), (64, 96)])
def test_times_are_spread_as_the_pipeline_spreads_them(
    flux1: PretrainedModel, schnell: PretrainedModel, size: tuple[int, int]
) -> None:
    for model in (flux1, schnell):
        sampler = model.family.sampler(model, 4, size, torch.device("cpu"))
        scheduler = copy.deepcopy(model.scheduler)
        shift = calculate_shift(size[0] // 16 * (size[1] // 16), 256, 4096, 0.5, 1.15)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4), mu=shift)
        assert torch.equal(sampler.sigmas, scheduler.sigmas)


def test_prompts_are_read_as_the_pipeline_reads_them(flux1: PretrainedModel) -> None:
    prompts = [SHORT, LONG * 2, ""]
    found = embed(flux1.family, flux1, prompts).text
    states, pooled, _ = flux1.pipeline().encode_prompt(prompts)
    assert found["states"].shape == (3, 512, 48)
    assert torch.allclose(found["states"], states, atol=1e-6)
    assert torch.allclose(found["pooled"], pooled, atol=1e-6)
    with pytest.raises(UserError, match=r"and FLUX\.1 reads 512; shorten it"):
        flux1.family.tokenize(flux1, ["x" * 600])


def test_a_step_does_not_wait_for_the_device(flux1: PretrainedModel) -> None:
    """On the meta device there are no values to look at: a step can be captured as a CUDA graph."""
    text = {name: value.to("meta") for name, value in embed(flux1.family, flux1, [LONG, SHORT]).text.items()}
    noised, times = torch.empty(2, 8, 8, 12, device="meta"), torch.empty(2, device="meta")
    told = {"guidance": torch.empty(2, 1, device="meta")}
    made = flux1.family.predict(copy.deepcopy(flux1.transformer).to("meta"), noised, times, Conditioning(text, told))
    assert made.shape == noised.shape


@pytest.mark.parametrize("told", [True, False])
def test_the_loss_is_that_of_diffusers_script(
    flux1: PretrainedModel, schnell: PretrainedModel, tmp_path: Path, told: bool
) -> None:
    """Latents, scale and shift, time, noising, packing, guidance of 1, target, sign and prior preservation."""
    model = flux1 if told else copy.deepcopy(schnell)
    values = {**LORA, "with_prior_preservation": True, "prior_loss_weight": 0.3, "train_batch_size": 2, "time_shift": 1}
    run = Run(model, tmp_path, **values)
    batch = run.data.batch_sampler.batch(0, 2)
    drawn = []
    for picture, view, noise in zip(batch.pictures, batch.views, batch.latent_noise, strict=True):
        mean, deviation = (part[int(view) % len(part)] for part in run.data.latents._cache[int(picture)])
        drawn.append(mean + deviation * noise)
    config = model.vae.config
    clean = (torch.stack(drawn) - config.shift_factor) * config.scaling_factor
    sigmas = (batch.timesteps + 1).view(-1, 1, 1, 1) / 1000
    noised = (1.0 - sigmas) * clean + sigmas * batch.noise
    rows, channels, height, width = clean.shape
    prompts = [run.subject.prompt] * 2 + [str(run.subject.class_prompt)] * 2
    text = embed(model.family, model, prompts).text
    with torch.no_grad():
        made = model.transformer(
            hidden_states=FluxPipeline._pack_latents(noised, rows, channels, height, width),
            timestep=sigmas.flatten(),
            guidance=torch.tensor([1.0]).expand(rows) if told else None,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["states"],
            txt_ids=torch.zeros(512, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
    made = FluxPipeline._unpack_latents(made, height * 8, width * 8, 8)
    error = (made - (batch.noise - clean)).square().flatten(1).mean(1)
    instance, prior = error[:2].mean(), error[2:].mean()
    ours = run.trainer.loss(batch).detach()
    assert [float(part) for part in (ours.instance, ours.prior, ours.total)] == pytest.approx(  # type: ignore[arg-type]
        [float(instance), float(prior), float(instance + 0.3 * prior)], rel=1e-5
    )


def test_t5_has_its_words_once(tiny_flux1: Path, loaded_flux1: PretrainedModel, tmp_path: Path) -> None:
    """Whichever of its two names a file has them by."""
    reader = loaded_flux1.text_encoder_2  # type: ignore[attr-defined]
    assert reader.shared.weight is reader.encoder.embed_tokens.weight
    assert "encoder.embed_tokens.weight" not in loaded_flux1.weights("text_encoder_2")
    model = tmp_path / "model"
    shutil.copytree(tiny_flux1, model)
    file = model / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, file)
    again = load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))
    copied = again.copy_of("text_encoder_2", "cpu", torch.bfloat16)
    assert torch.equal(copied.encoder.embed_tokens.weight, reader.shared.weight.bfloat16())
    assert copied.shared.weight is copied.encoder.embed_tokens.weight


@pytest.fixture
def exported(flux1: PretrainedModel, tmp_path: Path) -> tuple[Run, Path]:
    run = train(flux1, tmp_path / "run", lora_alpha=8, model_name="duck", lora_targets="linear")
    folder = tmp_path / "model"
    folder.mkdir()
    run.trainable.export(folder, run.h, torch.float32)
    return run, folder


@pytest.mark.slow
def test_diffusers_file_draws_what_was_trained_and_both_are_read(
    exported: tuple[Run, Path], loaded_flux1: PretrainedModel
) -> None:
    run, folder = exported
    (trained,) = draw_latents(run.base.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    (before,) = draw_latents(loaded_flux1.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert not torch.allclose(trained, before, atol=1e-3)
    layers = {name.partition(".lora_")[0] for name in run.trainable.parameters}
    pipeline = quiet(copy.deepcopy(loaded_flux1).pipeline())
    pipeline.load_lora_weights(str(folder), weight_name=FILE)
    assert len({key for key, _ in pipeline.transformer.named_parameters() if ".lora_" in key}) == 2 * len(layers)
    (made,) = draw_latents(pipeline, SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert torch.allclose(made, trained, atol=1e-5)
    for name in (FILE, "duck.safetensors"):
        found = read_adapter(folder / name)
        assert (found.family, found.unknown) == ("flux1", ())
        assert {f"transformer.{layer}" for layer in found.parts["transformer"]} == layers
        assert describe(str(folder / name))["base model"] == "FLUX.1"


def of_true_width(kinds: tuple[str, ...]) -> dict[str, LowRank]:
    """Random LoRAs of rank 2 beside layers of one block of each kind of the true model."""
    config = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    module = empty_module("transformer", config, "FluxPipeline")
    return {
        name: LowRank(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 0.5)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(kinds) and "blocks" in name
    }


@pytest.mark.parametrize("targets", ["attention", "linear"])
def test_diffusers_reads_comfyuis_file_whole(tmp_path: Path, targets: str) -> None:
    """Of the true width, which its converter takes for granted: all keys taken, the same products."""
    facts = FAMILIES["flux1"].facts
    layers = of_true_width(tuple(end.replace(".0.proj_out", "") for end in facts.adapted[targets].denoiser))
    path = tmp_path / "a.safetensors"
    write_comfy(path, Adapter({"transformer": layers}), facts)
    found = FluxPipeline.lora_state_dict(str(path))
    read = read_adapter(path)
    assert (read.family, read.layout, read.unknown) == ("flux1", "kohya", ())
    for name, layer in layers.items():
        x = torch.randn(layer.down.shape[1])
        expected = 0.5 * (layer.up @ (layer.down @ x))
        down, up = (found.pop(f"transformer.{name}.lora_{end}.weight") for end in "AB")
        assert torch.allclose(up @ (down @ x), expected, rtol=1e-4, atol=1e-3)
        ours = read.parts["transformer"][name]
        assert isinstance(ours, LowRank)
        assert torch.allclose(ours.scale * (ours.up @ (ours.down @ x)), expected, rtol=1e-4, atol=1e-3)
    # Of layers that are one there, some had no LoRA.
    assert all(not value.any() for name, value in found.items() if "lora_B" in name)


def test_names_that_others_share_are_told_apart(tmp_path: Path, loaded_flux2: PretrainedModel) -> None:
    """FLUX.1's and FLUX.2's makers call layers of other sides by the same names; so do files for text encoders."""
    facts, path = FAMILIES["flux1"].facts, tmp_path / "a.safetensors"
    write_comfy(path, Adapter({"transformer": of_true_width(("attn.to_q", "attn.to_k", "attn.to_v"))}), facts)
    flat = load_file(path)
    dotted = {}
    for key, value in flat.items():
        layer, end = key.removeprefix("lora_unet_").split(".", 1)
        for words in ("double_blocks", "single_blocks", "img_attn", "txt_attn"):
            layer = layer.replace(words, words.replace("_", "!"))
        dotted[f"diffusion_model.{layer.replace('_', '.').replace('!', '_')}.{end}"] = value
    save_file(dotted, path)
    assert read_adapter(path).family == "flux1"
    save_file(
        {**flat, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(2, 8)}, path
    )
    found = read_adapter(path)
    assert found.family == "flux1"
    assert found.unknown
    linear = {
        name: LowRank(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
        for name, layer in loaded_flux2.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(("qkv_mlp_proj", ".to_q", ".to_k", ".to_v"))
    }
    for write in (write_peft, lambda path, adapter: write_comfy(path, adapter, FAMILIES["flux2"].facts)):
        write(path, Adapter({"transformer": linear}))
        assert read_adapter(path).family == "flux2"


def test_a_file_of_the_transformer_alone_is_the_transformer(tmp_path: Path) -> None:
    """By its makers' names, of the true width, which diffusers' converter takes for granted."""
    config = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    module: Any = empty_module("transformer", config, "FluxPipeline")
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    made = flux1_original({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    header, end = {}, 0
    for name, value in made.items():
        size = value.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / "flux1-dev.safetensors"
    marks = {
        "double_blocks.0.img_attn.qkv.weight": {0: 1.0, 3072 * 3072: 2.0, 2 * 3072 * 3072: 3.0},
        "single_blocks.0.linear1.weight": {0: 4.0, 3 * 3072 * 3072: 5.0},
        "final_layer.adaLN_modulation.1.weight": {0: 6.0, 3072 * 3072: 7.0},
    }
    with path.open("wb") as file:  # nothing but marks is written: the rest of the file has no blocks on the disk
        file.write(struct.pack("<Q", len(text)) + text)
        for name, values in marks.items():
            for place, value in values.items():
                file.seek(8 + len(text) + header[name]["data_offsets"][0] + 2 * place)
                file.write(torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(text) + end)
    assert find_family(str(path)) == "flux1"
    tensors = read_denoiser(open_tensors(path), "transformer", module)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    for name, mark in {
        "transformer_blocks.0.attn.to_q": 1.0,
        "transformer_blocks.0.attn.to_k": 2.0,
        "transformer_blocks.0.attn.to_v": 3.0,
        "single_transformer_blocks.0.attn.to_q": 4.0,
        "single_transformer_blocks.0.proj_mlp": 5.0,
        "norm_out.linear": 7.0,
    }.items():
        assert float(tensors[f"{name}.weight"].read().flatten()[0]) == mark


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("transformer", {"patch_size": 2}, "patch_size is 2, and this project trains models with 1"),
        ("vae", {"shift_factor": None}, "shift_factor is None and should be a number such as 0.1159"),
        ("vae", {"scaling_factor": 0}, "scaling_factor is 0 and should be a number such as 0.3611"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "its scheduler is EulerDiscreteScheduler"),
        ("text_encoder_2", {"model_type": "qwen3"}, "is of a qwen3 model; this project takes a T5EncoderModel there"),
        ("text_encoder", {"model_type": "t5"}, "is of a t5 model; this project takes a CLIPTextModel there"),
    ],
)
def test_damaged_directories_are_refused(
    tiny_flux1: Path, tmp_path: Path, part: str, change: dict[str, object], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_flux1, model)
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))


def test_a_transformer_of_other_sides_is_refused(tiny_flux1: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_flux1, model)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1}
    FluxTransformer2DModel(
        in_channels=16, joint_attention_dim=24, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6), **sizes
    ).save_pretrained(model / "transformer")
    with pytest.raises(UserError) as found:
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))
    for said in ("latents of 8 channels", "T5's states are 48 wide", "CLIP's states are 32 wide"):
        assert said in str(found.value)


def test_a_directory_is_described_and_written_again(
    tiny_flux1: Path, loaded_flux1: PretrainedModel, tmp_path: Path
) -> None:
    assert describe(str(tiny_flux1))["base model"] == "FLUX.1"
    convert(str(tiny_flux1), tmp_path / "model")
    for pipeline in (
        FluxPipeline.from_pretrained(tmp_path / "model"),
        load_base(hyperparameters(pretrained_model_name_or_path=str(tmp_path / "model"), method="lora")).pipeline(),
    ):
        ((made,),) = draw(pipeline, SHORT, [3], resolution=64, steps=1)
        ((expected,),) = draw(loaded_flux1.pipeline(), SHORT, [3], resolution=64, steps=1)
        assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2


def test_the_shift_is_that_of_drawing_unless_one_is_asked_for(flux1: PretrainedModel, schnell: PretrainedModel) -> None:
    def shift(model: PretrainedModel, **values: object) -> float:
        h = hyperparameters(**{**LORA, **values})
        half = float(model.family.objective(model, h).sigmas[499])  # type: ignore[attr-defined]
        return half / (1 - half)

    by_size = math.exp(calculate_shift(64 * 64, 256, 4096, 0.5, 1.15))
    assert shift(flux1, time_shift=2.5) == pytest.approx(2.5)
    assert shift(flux1, resolution=1024) == pytest.approx(by_size, rel=1e-4)
    assert shift(schnell, resolution=1024) == pytest.approx(1.0)
    assert shift(schnell, resolution=1024, time_shift="resolution") == pytest.approx(by_size, rel=1e-4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_text_encoder": True}, "its text encoder is a language model"),
        ({"mixed_precision": "fp16"}, "its values are beyond the range of fp16"),
        ({"lora_targets": "all"}, "it has no convolutions"),
        ({"pretrained_model_name_or_path": SCHNELL}, "distilled to draw in a few steps"),
        ({"pretrained_model_name_or_path": "black-forest-labs/FLUX.1-Fill-dev"}, "FLUX.1-Fill-dev"),
        ({"accept_license": None}, f"the licence {LICENCE}"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(**values)


def test_a_licence_that_is_accepted_is_named_in_the_plan() -> None:
    assert any(f"accept_license={LICENCE}" in note for note in make_plan(parse(), CARDS["H100"]).notes)
    apache = {"pretrained_model_name_or_path": SCHNELL, "train_distilled": True, "accept_license": None}
    assert not any("license" in note for note in make_plan(parse(**apache), CARDS["H100"]).notes)


def test_small_cards_train_it_in_fewer_bits() -> None:
    with pytest.raises(
        UserError, match=r"T4 has no bf16, and FLUX\.1 .* beyond the range of fp16; use a card with bf16"
    ):
        make_plan(parse(), CARDS["T4"])
    assert make_plan(parse(), CARDS["L4"]).base_weights == "int8"
    alone = parse(base_weights="nf4", with_prior_preservation=False)
    assert make_plan(alone, CARDS["L4"]).predicted_peak_gb < 10
