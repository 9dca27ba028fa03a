"""Qwen-Image, compared with diffusers' own pipeline and transformer, and with the arithmetic of its script."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.convert import convert
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.describe import describe
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import Conditioning
from dreambooth_sm.families.find import find_family
from dreambooth_sm.families.qwen_image import run_in_fewer_passes
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw, draw_latents
from tests.helpers.drawing import levels_between
from tests.helpers.training import Run, hyperparameters, same, weights
from tests.unit.test_z_image import quiet

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
HUB = "Qwen/Qwen-Image"
LORA = {"method": "lora", "base_architecture": "qwen_image"}
SHORT, LONG = "photo of zwx toy", "photo of zwx toy, " * 6
SHIFTS = (256, 8192, 0.5, 0.9)  # of the tiny model's scheduler, as of the true one's


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, "pretrained_model_name_or_path": HUB, "method": "lora", **values})


def train(base: PretrainedModel, root: Path, **values: object) -> Run:
    return Run(base, root, **{**LORA, "learning_rate": 1e-2, "max_train_steps": 2, **values}).train()


def packed(latents: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = QwenImagePipeline._pack_latents(latents, *latents.shape)
    return made


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("side", [64, 48])
def test_pictures_are_the_pipelines_own(qwen_image: PretrainedModel, side: int, guidance: float) -> None:
    """The noise of a seed as well; the text encoder's part that sees pictures is not there, and nobody misses it."""
    pipeline = quiet(qwen_image.pipeline())
    options: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": 3}
    if guidance > 1:
        options |= {"true_cfg_scale": guidance, "negative_prompt": ""}
    seed = torch.Generator().manual_seed(3)
    expected = pipeline(prompt=SHORT, generator=seed, **options).images[0]
    ((ours,),) = draw(qwen_image.pipeline(), SHORT, [3], resolution=side, steps=3, guidance=guidance)
    assert levels_between(ours, expected) <= (guidance > 1)  # the pipeline asks twice


def test_the_whole_text_encoder_reads_the_same(qwen_image: PretrainedModel, tiny_qwen_image: Path) -> None:
    """With its part that sees pictures, as diffusers loads it."""
    prompts = [SHORT, LONG, ""]
    found = embed(qwen_image.family, qwen_image, prompts).text
    pipeline = QwenImagePipeline.from_pretrained(tiny_qwen_image)
    assert sum(p.numel() for p in pipeline.text_encoder.parameters()) > sum(
        p.numel() for p in qwen_image.text_encoder.parameters()
    )
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(prompts, max_sequence_length=512)
    assert torch.equal(found["kept"], mask.bool())
    assert torch.allclose(found["states"], states, atol=1e-6)
    assert "kept" not in embed(qwen_image.family, qwen_image, [SHORT, SHORT]).text
    with pytest.raises(UserError, match="tokens with its template, and Qwen-Image reads 512; shorten it"):
        qwen_image.family.tokenize(qwen_image, ["x" * 600])


def test_a_prompt_that_is_cut_off_is_cut_where_the_pipeline_cuts(qwen_image: PretrainedModel) -> None:
    found = embed(qwen_image.family, qwen_image, ["x" * 600], max_tokens=None).text["states"]
    with torch.no_grad():
        expected, _ = qwen_image.pipeline().encode_prompt("x" * 600, max_sequence_length=512)
    assert found.shape == expected.shape == (1, 512, 32)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("size", [(1024, 1024), (64, 96), (1280, 1280)])
def test_times_are_spread_as_the_pipeline_spreads_them(
    qwen_image: PretrainedModel, size: tuple[int, int], steps: int
) -> None:
    sampler = qwen_image.family.sampler(qwen_image, steps, size, torch.device("cpu"))
    scheduler = copy.deepcopy(qwen_image.scheduler)
    shift = calculate_shift(size[0] // 16 * (size[1] // 16), *SHIFTS)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
    assert torch.equal(sampler.sigmas, scheduler.sigmas)


def test_one_step_draws_a_picture(qwen_image: PretrainedModel) -> None:
    """Where diffusers' schedule divides zero by zero."""
    (latents,) = draw_latents(qwen_image.pipeline(), SHORT, [3], size=(64, 64), steps=1)
    assert latents.isfinite().all()


def theirs(transformer: Any, noised: torch.Tensor, timesteps: torch.Tensor, text: Any) -> torch.Tensor:
    """By the transformer's own forward, as diffusers' training script calls it."""
    rows, _, height, width = noised.shape
    made = transformer(
        hidden_states=packed(noised),
        encoder_hidden_states=text["states"],
        encoder_hidden_states_mask=text.get("kept"),
        timestep=timesteps / 1000,
        img_shapes=[(1, height // 2, width // 2)] * rows,
        return_dict=False,
    )[0]
    return QwenImagePipeline._unpack_latents(made, height * 8, width * 8, 8).squeeze(2)


@pytest.mark.parametrize("prompts", [[SHORT], [LONG, SHORT, ""]])
def test_the_prediction_is_the_transformers_own(qwen_image: PretrainedModel, prompts: list[str]) -> None:
    conditioning = embed(qwen_image.family, qwen_image, prompts)
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(len(prompts), 8, 6, 10, generator=generator)
    timesteps = torch.rand(len(prompts), generator=generator) * 1000
    with torch.no_grad():
        ours = qwen_image.family.predict(qwen_image.transformer, noised, timesteps, conditioning)
        expected = theirs(qwen_image.transformer, noised, timesteps, conditioning.text)
    assert torch.equal(ours, expected)


def test_a_step_does_not_wait_for_the_device(qwen_image: PretrainedModel) -> None:
    """On the meta device there are no values to look at: a step can be captured as a CUDA graph."""
    text = {name: value.to("meta") for name, value in embed(qwen_image.family, qwen_image, [LONG, SHORT]).text.items()}
    assert "kept" in text
    noised, times = torch.empty(2, 8, 8, 12, device="meta"), torch.empty(2, device="meta")
    made = qwen_image.family.predict(
        copy.deepcopy(qwen_image.transformer).to("meta"), noised, times, Conditioning(text)
    )
    assert made.shape == noised.shape


def test_the_loss_is_that_of_diffusers_script(qwen_image: PretrainedModel, tmp_path: Path) -> None:
    """Latents (by the VAE's statistics, of a frame), time, noising, target, sign and prior preservation."""
    values = {**LORA, "with_prior_preservation": True, "prior_loss_weight": 0.3, "train_batch_size": 2, "time_shift": 1}
    run = Run(qwen_image, tmp_path, **values)
    batch = run.data.batch_sampler.batch(0, 2)
    config = qwen_image.vae.config
    center = torch.tensor(config.latents_mean).view(-1, 1, 1)
    spread = 1.0 / torch.tensor(config.latents_std).view(-1, 1, 1)
    latents = []
    for picture, view, noise in zip(batch.pictures, batch.views, batch.latent_noise, strict=True):
        mean, deviation = (part[int(view) % len(part)] for part in run.data.latents._cache[int(picture)])
        latents.append((mean + deviation * noise - center) * spread)
    clean = torch.stack(latents)
    scheduler = type(qwen_image.scheduler)(shift=1.0)  # the script's has the shift of pictures only while it draws
    timesteps = scheduler.timesteps[999 - batch.timesteps]  # which fall
    sigmas = scheduler.sigmas[999 - batch.timesteps].view(-1, 1, 1, 1)
    noised = (1.0 - sigmas) * clean + sigmas * batch.noise
    prompts = [run.subject.prompt] * 2 + [str(run.subject.class_prompt)] * 2
    text = embed(qwen_image.family, qwen_image, prompts).text
    with torch.no_grad():
        made = theirs(qwen_image.transformer, noised, timesteps, text)
    error = (made - (batch.noise - clean)).square().flatten(1).mean(1)
    instance, prior = error[:2].mean(), error[2:].mean()
    ours = run.trainer.loss(batch).detach()
    assert [float(part) for part in (ours.instance, ours.prior, ours.total)] == pytest.approx(  # type: ignore[arg-type]
        [float(instance), float(prior), float(instance + 0.3 * prior)], rel=1e-5
    )


def test_latents_are_those_of_the_vae(qwen_image: PretrainedModel, tmp_path: Path) -> None:
    """A picture is one frame: mean and deviation are what the VAE says of it."""
    run = Run(qwen_image, tmp_path, **LORA, center_crop=True)
    mean, deviation = run.data.latents._cache[0]
    assert mean.shape == deviation.shape == (1, 8, 8, 8)
    family, scale = qwen_image.family, qwen_image.family.scale(qwen_image.vae)
    assert torch.allclose(family.denormalise(scale, family.normalise(scale, mean)), mean, atol=1e-6)
    assert deviation.min() > 0


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_in_fewer_passes_computes_the_same(qwen_image: PretrainedModel, masked: bool) -> None:
    block = copy.deepcopy(qwen_image.transformer.transformer_blocks[0]).requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.normal_(std=0.1, generator=random)
    picture, words = torch.randn(2, 9, 64, generator=random), torch.randn(2, 6, 64, generator=random)
    grads = torch.randn(2, 6, 64, generator=random), torch.randn(2, 9, 64, generator=random)
    turns = torch.polar(torch.ones(15, 16), torch.randn(15, 16, generator=random))
    told = torch.randn(2, 64, generator=random)
    kept = torch.arange(6) < torch.tensor([[6], [4]]) if masked else None
    found = []
    for run in (
        lambda *given: block(*given, kept, told, (turns[6:], turns[:6])),
        lambda *given: run_in_fewer_passes(block, *given, kept, told, turns.expand(2, -1, -1)),  # type: ignore[call-arg]
    ):
        given = [each.clone().requires_grad_() for each in (picture, words)]
        made = run(*given)
        torch.autograd.backward(made, grads)
        found.append([*made, *(each.grad for each in given)])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_both_files_draw_in_diffusers_what_was_trained(
    qwen_image: PretrainedModel, loaded_qwen_image: PretrainedModel, tmp_path: Path
) -> None:
    """ComfyUI knows the layers by diffusers' names, behind a prefix of its own."""
    run = train(qwen_image, tmp_path / "run", lora_alpha=8, model_name="duck", lora_targets="linear")
    folder = tmp_path / "model"
    folder.mkdir()
    run.trainable.export(folder, run.h, torch.float32)
    (trained,) = draw_latents(run.base.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    (before,) = draw_latents(loaded_qwen_image.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert not torch.allclose(trained, before, atol=1e-3)
    layers = {name.partition(".lora_")[0] for name in run.trainable.parameters}
    assert len(layers) == 2 * 12
    blocks = {key.removeprefix("transformer.").partition(".lora_")[0] for key in load_file(folder / FILE)}
    comfy = load_file(folder / "duck.safetensors")
    assert {key.partition(".lora_")[0] for key in comfy} == {f"diffusion_model.{name}" for name in blocks}
    for name in (FILE, "duck.safetensors"):
        assert len(load_file(folder / name)) == 2 * len(layers)
        pipeline = quiet(copy.deepcopy(loaded_qwen_image).pipeline())
        pipeline.load_lora_weights(str(folder), weight_name=name)
        loaded = {key for key, _ in pipeline.transformer.named_parameters() if ".lora_" in key}
        assert len(loaded) == 2 * len(layers)
        (made,) = draw_latents(pipeline, SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
        assert torch.allclose(made, trained, atol=1e-5), name
        assert len(read_adapter(folder / name).parts["transformer"]) == len(layers)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_the_transformer_alone_is_the_transformer(
    tiny_qwen_image: Path, loaded_qwen_image: PretrainedModel, tmp_path: Path, prefix: str
) -> None:
    """The makers' names are diffusers'."""
    file = tmp_path / "model.safetensors"
    made = loaded_qwen_image.transformer.state_dict()
    save_file({prefix + name: value.contiguous() for name, value in made.items()}, file)
    values = {"pretrained_model_name_or_path": str(file), "pretrained_parts_name_or_path": str(tiny_qwen_image)}
    assert find_family(str(file)) == "qwen_image"
    model = load_base(hyperparameters(**values, method="lora"))
    assert same(weights(model.transformer), weights(loaded_qwen_image.transformer))
    del made["norm_out.linear.weight"]
    save_file({prefix + name: value.contiguous() for name, value in made.items()}, file)
    with pytest.raises(UserError, match=r"transformer lacks norm_out\.linear\.weight"):
        load_base(hyperparameters(**values, method="lora"))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is True, and this project trains models with"),
        ("transformer", {"zero_cond_t": True}, "zero_cond_t is True"),
        ("transformer", {"use_layer3d_rope": True}, "use_layer3d_rope is True"),
        ("vae", {"latents_mean": [0.5]}, r"latents_mean is \[0.5\] and should be a list of 8 numbers"),
        ("vae", {"latents_std": [0.0] * 8}, "latents_std is"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "its scheduler is EulerDiscreteScheduler"),
        ("text_encoder", {"model_type": "llama"}, "is of a llama model; this project takes a Qwen2_5_VLTextModel"),
    ],
)
def test_damaged_directories_are_refused(
    tiny_qwen_image: Path, tmp_path: Path, part: str, change: dict[str, object], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen_image, model)
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))


@pytest.mark.parametrize("layout", ["within", "flat"])
def test_text_encoders_of_all_versions_are_read(
    tiny_qwen_image: Path, loaded_qwen_image: PretrainedModel, tmp_path: Path, layout: str
) -> None:
    """Tensors by transformers' newer names, and a configuration with the language model's values at its top."""
    model = tmp_path / "model"
    shutil.copytree(tiny_qwen_image, model)
    file = model / "text_encoder" / "model.safetensors"
    path = model / "text_encoder" / "config.json"
    if layout == "within":
        tensors = load_file(file)
        assert any(name.startswith("visual.") for name in tensors)
        inner = {name: name.replace("model.", "model.language_model.", 1) for name in tensors}
        save_file({inner[name].replace("visual.", "model.visual."): value for name, value in tensors.items()}, file)
    else:
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config.pop("text_config"), **config}))
    read = load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))
    assert not read.remarks
    found = embed(read.family, read, [SHORT]).text["states"]
    assert torch.equal(found, embed(read.family, loaded_qwen_image, [SHORT]).text["states"])


@pytest.mark.slow
def test_a_directory_is_described_and_written_again(
    tiny_qwen_image: Path, loaded_qwen_image: PretrainedModel, tmp_path: Path
) -> None:
    assert describe(str(tiny_qwen_image))["base model"] == "Qwen-Image"
    convert(str(tiny_qwen_image), tmp_path / "model")
    written = tmp_path / "model" / "text_encoder"
    layers = loaded_qwen_image.text_encoder.state_dict()
    assert load_file(written / "model.safetensors").keys() == {f"model.{name}" for name in layers}
    config = json.loads((written / "config.json").read_text())["text_config"]  # for transformers 4 as well
    assert (config["rope_theta"], config["rope_scaling"]["mrope_section"]) == (1e6, [2, 3, 3])
    # As diffusers' script reads it; what it needs of it is there.
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(written)
    assert same(weights(whole.model.language_model), weights(loaded_qwen_image.text_encoder))
    for pipeline in (
        QwenImagePipeline.from_pretrained(tmp_path / "model"),
        load_base(hyperparameters(pretrained_model_name_or_path=str(tmp_path / "model"), method="lora")).pipeline(),
    ):
        ((made,),) = draw(pipeline, SHORT, [3], resolution=64, steps=2)
        ((expected,),) = draw(loaded_qwen_image.pipeline(), SHORT, [3], resolution=64, steps=2)
        assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2


def test_the_shift_is_that_of_drawing_unless_one_is_asked_for(qwen_image: PretrainedModel) -> None:
    def shift(**values: object) -> float:
        h = hyperparameters(**{**LORA, **values})
        half = float(qwen_image.family.objective(qwen_image, h).sigmas[499])  # type: ignore[attr-defined]
        return half / (1 - half)

    assert shift(time_shift=2.5) == pytest.approx(2.5)
    assert shift(resolution=1024) == pytest.approx(math.exp(calculate_shift(64 * 64, *SHIFTS)), rel=1e-4)
    assert shift(resolution=1024, time_shift="resolution") == shift(resolution=1024)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_text_encoder": True}, "its text encoder is a language model"),
        ({"mixed_precision": "fp16"}, "it was not tried in fp16"),
        ({"lora_targets": "all"}, "it has no convolutions"),
        ({"pretrained_model_name_or_path": "lightx2v/Qwen-Image-Lightning"}, "distilled to draw in a few steps"),
        ({"pretrained_model_name_or_path": "Qwen/Qwen-Image-Edit-2511"}, "is of another kind than Qwen-Image"),
        ({"pretrained_model_name_or_path": "s3://models/qwen_image_edit/"}, "QwenImagePipeline draws with, such as"),
        ({"pretrained_model_name_or_path": "Qwen/Qwen-Image-2.1"}, "is of another kind than Qwen-Image"),
        ({"pretrained_model_name_or_path": "Qwen/Qwen-Image-Layered"}, "is of another kind than Qwen-Image"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(**values)


def test_later_versions_of_its_kind_are_taken() -> None:
    assert parse(pretrained_model_name_or_path="Qwen/Qwen-Image-2512").architecture == "qwen_image"


def test_cards_without_bf16_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"T4 has no bf16, and Qwen-Image .* it was not tried in fp16; use a card with bf16"
    ):
        make_plan(parse(), CARDS["T4"])
    assert make_plan(parse(), CARDS["L4"]).base_weights == "nf4"
