"""Chroma, compared with diffusers' own pipeline, transformer and converters: it has no training script for it."""

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
from diffusers import ChromaPipeline, FluxPipeline
from diffusers.pipelines.chroma.pipeline_chroma import calculate_shift
from safetensors.torch import load_file

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.comfy_file import write_comfy
from dreambooth_sm.adapters.layers import LowRank
from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.convert import convert
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.describe import describe
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES, Conditioning
from dreambooth_sm.families.find import find_family
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw, draw_latents
from dreambooth_sm.stored.denoiser_file import read_denoiser
from dreambooth_sm.stored.model import empty_module
from dreambooth_sm.stored.opening import open_tensors
from dreambooth_sm.training.recomputation import checkpoint_activations
from tests.helpers.drawing import levels_between
from tests.helpers.original_names import flux1_original
from tests.helpers.training import Run, hyperparameters
from tests.unit.test_z_image import quiet

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
HUB = "lodestones/Chroma1-HD"
LORA = {"method": "lora", "base_architecture": "chroma"}
SHORT, LONG = "photo of zwx toy", "photo of zwx toy, " * 6


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, "pretrained_model_name_or_path": HUB, "method": "lora", **values})


def train(base: PretrainedModel, root: Path, **values: object) -> Run:
    return Run(base, root, **{**LORA, "learning_rate": 1e-2, "max_train_steps": 2, **values}).train()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("side", [64, 48])
def test_pictures_are_the_pipelines_own(chroma: PretrainedModel, side: int, guidance: float) -> None:
    """From the same seed."""
    pipeline = quiet(chroma.pipeline())
    options = {"height": side, "width": side, "num_inference_steps": 3, "guidance_scale": guidance}
    expected = pipeline(prompt=SHORT, generator=torch.Generator().manual_seed(3), **options).images[0]
    ((ours,),) = draw(chroma.pipeline(), SHORT, [3], resolution=side, steps=3, guidance=guidance)
    assert levels_between(ours, expected) <= (guidance > 1)  # the pipeline asks twice


def test_prompts_are_read_as_the_pipeline_reads_them(chroma: PretrainedModel) -> None:
    prompts = [SHORT, LONG, "", "x" * 510]
    found = embed(chroma.family, chroma, prompts).text
    states, _, seen, *_ = chroma.pipeline().encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.allclose(found["states"], states, atol=1e-6)
    assert torch.equal(found["seen"].float(), seen)
    assert found["seen"].sum(1).tolist() == [len(chroma.tokenizer(text).input_ids) + 1 for text in prompts[:3]] + [512]
    with pytest.raises(UserError, match=r"and Chroma reads 512; shorten it"):
        chroma.family.tokenize(chroma, ["x" * 600])


def theirs(transformer: Any, noised: torch.Tensor, sigmas: torch.Tensor, text: Any) -> torch.Tensor:
    """By the transformer's own forward, as the pipeline calls it."""
    rows, channels, height, width = noised.shape
    patches = height * width // 4
    made = transformer(
        hidden_states=FluxPipeline._pack_latents(noised, rows, channels, height, width),
        timestep=sigmas,
        encoder_hidden_states=text["states"],
        txt_ids=torch.zeros(512, 3),
        img_ids=ChromaPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, "cpu", torch.float32),
        attention_mask=ChromaPipeline._prepare_attention_mask(None, rows, patches, None, text["seen"].float()),
        return_dict=False,
    )[0]
    unpacked: torch.Tensor = ChromaPipeline._unpack_latents(made, height * 8, width * 8, 8)
    return unpacked


@pytest.mark.parametrize("recomputing", [False, True])
def test_in_fewer_passes_it_computes_the_same(
    chroma: PretrainedModel, monkeypatch: pytest.MonkeyPatch, recomputing: bool
) -> None:
    transformer = copy.deepcopy(chroma.modules["transformer"]).float().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():
        parameter.normal_(std=0.1, generator=random)
    if recomputing:
        checkpoint_activations(transformer)
    noised, grad = torch.randn(2, 2, transformer.config.in_channels // 4, 4, 6, generator=random).unbind()
    text = embed(chroma.family, chroma, [SHORT, LONG])
    found = []
    for fewer in (False, True):
        monkeypatch.setattr("dreambooth_sm.families.chroma.runs_in_fewer_passes", lambda *_, fewer=fewer: fewer)
        given = noised.clone().requires_grad_()
        made = chroma.family.predict(transformer, given, torch.tensor([300.0, 800.0]), text)
        made.backward(grad)
        found.append((made, given.grad))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_pipelines_prediction(chroma: PretrainedModel, tmp_path: Path) -> None:
    """Latents, scale and shift, time, noising, packing, mask, target, sign and prior preservation."""
    values = {**LORA, "with_prior_preservation": True, "prior_loss_weight": 0.3, "train_batch_size": 2, "time_shift": 1}
    run = Run(chroma, tmp_path, **values)
    batch = run.data.batch_sampler.batch(0, 2)
    drawn = []
    for picture, view, noise in zip(batch.pictures, batch.views, batch.latent_noise, strict=True):
        mean, deviation = (part[int(view) % len(part)] for part in run.data.latents._cache[int(picture)])
        drawn.append(mean + deviation * noise)
    config = chroma.vae.config
    clean = (torch.stack(drawn) - config.shift_factor) * config.scaling_factor
    sigmas = (batch.timesteps + 1) / 1000
    noised = (1.0 - sigmas.view(-1, 1, 1, 1)) * clean + sigmas.view(-1, 1, 1, 1) * batch.noise
    prompts = [run.subject.prompt] * 2 + [str(run.subject.class_prompt)] * 2
    with torch.no_grad():
        made = theirs(chroma.transformer, noised, sigmas, embed(chroma.family, chroma, prompts).text)
    error = (made - (batch.noise - clean)).square().flatten(1).mean(1)
    instance, prior = error[:2].mean(), error[2:].mean()
    ours = run.trainer.loss(batch).detach()
    assert [float(part) for part in (ours.instance, ours.prior, ours.total)] == pytest.approx(  # type: ignore[arg-type]
        [float(instance), float(prior), float(instance + 0.3 * prior)], rel=1e-5
    )


def test_rows_of_prompts_of_several_lengths_are_predicted_as_the_transformer_does(chroma: PretrainedModel) -> None:
    text = embed(chroma.family, chroma, [LONG, SHORT]).text
    noised, times = torch.randn(2, 8, 8, 12), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        ours = chroma.family.predict(chroma.transformer, noised, times, Conditioning(text))
        assert torch.equal(ours, theirs(chroma.transformer, noised, times / 1000, text))


def test_a_step_does_not_wait_for_the_device(chroma: PretrainedModel) -> None:
    """On the meta device there are no values to look at: a step can be captured as a CUDA graph."""
    text = {name: value.to("meta") for name, value in embed(chroma.family, chroma, [LONG, SHORT]).text.items()}
    noised, times = torch.empty(2, 8, 8, 12, device="meta"), torch.empty(2, device="meta")
    transformer = copy.deepcopy(chroma.transformer).to("meta")
    made = chroma.family.predict(transformer, noised, times, Conditioning(text))
    assert made.shape == noised.shape


@pytest.mark.slow
def test_diffusers_file_draws_what_was_trained_and_both_are_read(
    chroma: PretrainedModel, loaded_chroma: PretrainedModel, tmp_path: Path
) -> None:
    run = train(chroma, tmp_path / "run", lora_alpha=8, model_name="duck", lora_targets="linear")
    folder = tmp_path / "model"
    folder.mkdir()
    run.trainable.export(folder, run.h, torch.float32)
    (trained,) = draw_latents(run.base.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    (before,) = draw_latents(loaded_chroma.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert not torch.allclose(trained, before, atol=1e-3)
    layers = {name.partition(".lora_")[0] for name in run.trainable.parameters}
    pipeline = quiet(copy.deepcopy(loaded_chroma).pipeline())
    pipeline.load_lora_weights(str(folder), weight_name=FILE)
    assert len({key for key, _ in pipeline.transformer.named_parameters() if ".lora_" in key}) == 2 * len(layers)
    (made,) = draw_latents(pipeline, SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert torch.allclose(made, trained, atol=1e-5)
    for name in (FILE, "duck.safetensors"):  # FLUX.1's layers have the same names and sides: the header tells
        found = read_adapter(folder / name)
        assert (found.family, found.unknown) == ("chroma", ())
        assert {f"transformer.{layer}" for layer in found.parts["transformer"]} == layers
        assert describe(str(folder / name))["base model"] == "Chroma"


@pytest.mark.parametrize("targets", ["attention", "linear"])
def test_diffusers_reads_comfyuis_file_whole(tmp_path: Path, targets: str) -> None:
    """Of the true width, which its converter takes for granted: all keys taken, the same products."""
    facts = FAMILIES["chroma"].facts
    module = empty_module("transformer", {"num_layers": 1, "num_single_layers": 1}, facts.pipeline)
    layers = {
        name: LowRank(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 0.5)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(facts.adapted[targets].denoiser)
    }
    path = tmp_path / "a.safetensors"
    write_comfy(path, Adapter({"transformer": layers}), facts)
    found = ChromaPipeline.lora_state_dict(str(path))
    read = read_adapter(path)
    assert (read.family, read.layout, read.unknown) == ("chroma", "kohya", ())
    assert read.parts["transformer"].keys() >= layers.keys()
    for name, layer in layers.items():
        x = torch.randn(layer.down.shape[1])
        down, up = (found.pop(f"transformer.{name}.lora_{end}.weight") for end in "AB")
        assert torch.allclose(up @ (down @ x), 0.5 * (layer.up @ (layer.down @ x)), rtol=1e-4, atol=1e-3)
    # Of layers that are one there, some had no LoRA.
    assert all(not value.any() for name, value in found.items() if "lora_B" in name)


def test_a_file_of_the_transformer_alone_is_the_transformer(tmp_path: Path) -> None:
    """By its makers' names, of the true width, which diffusers' converter takes for granted."""
    config = {"num_layers": 1, "num_single_layers": 1}
    module: Any = empty_module("transformer", config, "ChromaPipeline")
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    made = flux1_original({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    header, end = {}, 0
    for name, value in made.items():
        size = value.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path / "Chroma1-HD.safetensors"
    with path.open("wb") as file:  # of zeros, but for a mark
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(8 + len(text) + header["single_blocks.0.linear1.weight"]["data_offsets"][0] + 2 * 3 * 3072**2)
        file.write(torch.tensor([5.0], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(text) + end)
    assert find_family(str(path)) == "chroma"
    tensors = read_denoiser(open_tensors(path), "transformer", module)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    assert float(tensors["single_transformer_blocks.0.proj_mlp.weight"].read().flatten()[0]) == 5.0


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("transformer", {"patch_size": 2}, "patch_size is 2, and this project trains models with 1"),
        ("vae", {"shift_factor": None}, "shift_factor is None and should be a number such as 0.1159"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "its scheduler is EulerDiscreteScheduler"),
        ("text_encoder", {"model_type": "qwen3"}, "is of a qwen3 model; this project takes a T5EncoderModel there"),
    ],
)
def test_damaged_directories_are_refused(
    tiny_chroma: Path, tmp_path: Path, part: str, change: dict[str, object], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_chroma, model)
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))


def test_a_directory_is_described_and_written_again(
    tiny_chroma: Path, loaded_chroma: PretrainedModel, tmp_path: Path
) -> None:
    assert describe(str(tiny_chroma))["base model"] == "Chroma"
    convert(str(tiny_chroma), tmp_path / "model")
    assert "shared.weight" in load_file(tmp_path / "model" / "text_encoder" / "model.safetensors")
    for pipeline in (
        ChromaPipeline.from_pretrained(tmp_path / "model"),
        load_base(hyperparameters(pretrained_model_name_or_path=str(tmp_path / "model"), method="lora")).pipeline(),
    ):
        ((made,),) = draw(pipeline, SHORT, [3], resolution=64, steps=1)
        ((expected,),) = draw(loaded_chroma.pipeline(), SHORT, [3], resolution=64, steps=1)
        assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2


def test_the_shift_is_that_of_drawing_unless_one_is_asked_for(chroma: PretrainedModel) -> None:
    def shift(**values: object) -> float:
        half = float(chroma.family.objective(chroma, hyperparameters(**{**LORA, **values})).sigmas[499])  # type: ignore[attr-defined]
        return half / (1 - half)

    by_size = math.exp(calculate_shift(64 * 64, 256, 4096, 0.5, 1.15))
    assert shift(time_shift=2.5) == pytest.approx(2.5)
    assert shift(resolution=1024) == pytest.approx(by_size, rel=1e-4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_text_encoder": True}, "its text encoder is a language model"),
        ({"mixed_precision": "fp16"}, "its values are beyond the range of fp16"),
        ({"lora_targets": "all"}, "it has no convolutions"),
        ({"pretrained_model_name_or_path": "lodestones/Chroma1-Flash"}, "distilled to draw in a few steps"),
        ({"pretrained_model_name_or_path": "lodestones/Chroma1-Radiance"}, "Chroma1-Radiance"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(**values)


def test_cards_train_it_in_the_bits_that_they_have_room_for() -> None:
    with pytest.raises(
        UserError, match=r"T4 has no bf16, and Chroma .* beyond the range of fp16; use a card with bf16"
    ):
        make_plan(parse(), CARDS["T4"])
    assert make_plan(parse(), CARDS["L4"]).base_weights in ("int8", "plain")
    assert not any("license" in note for note in make_plan(parse(), CARDS["H100"]).notes)
