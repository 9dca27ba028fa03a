"""Krea 2, compared with diffusers' own pipeline and transformer, and with the arithmetic of its script."""

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
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.convert import convert
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.describe import describe
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import FAMILIES, Conditioning
from dreambooth_sm.families import krea2 as family
from dreambooth_sm.families.find import find_family
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw, draw_latents
from dreambooth_sm.stored.model import empty_module
from tests.helpers.original_names import krea2_original
from tests.helpers.tiny import save_tiny_krea2_pipeline
from tests.helpers.training import Run, hyperparameters, same, weights
from tests.unit.test_z_image import quiet

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
HUB, LICENCE = "krea/Krea-2-Raw", "krea-2-community-license"
LORA = {"method": "lora", "base_architecture": "krea2"}
SHORT, LONG = "photo of zwx toy", "photo of zwx toy, " * 6
SHIFTS = (256, 6400, 0.5, 1.15)  # of the tiny model's scheduler, as of the true one's
WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


def parse(**values: object) -> Hyperparameters:
    usual = {"pretrained_model_name_or_path": HUB, "accept_license": LICENCE, "method": "lora"}
    return Hyperparameters.parse({**PROMPTS, **usual, **values})


def train(base: PretrainedModel, root: Path, **values: object) -> Run:
    return Run(base, root, **{**LORA, "learning_rate": 1e-2, "max_train_steps": 2, **values}).train()


def opened(path: Path) -> PretrainedModel:
    return load_base(hyperparameters(pretrained_model_name_or_path=str(path), method="lora"))


@pytest.mark.parametrize(("side", "guidance"), [(64, 0.0), (48, 4.5)])
def test_pictures_are_the_pipelines_own(krea2: PretrainedModel, side: int, guidance: float) -> None:
    """The noise of a seed as well, to 1e-5: what fills prompts up there is left out here, so that other sums are
    rounded. The pipeline counts guidance from 0."""
    pipeline = quiet(krea2.pipeline())
    options: dict[str, Any] = {"height": side, "width": side, "num_inference_steps": 3, "guidance_scale": guidance}
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    packed = pipeline(prompt=SHORT, generator=seeds[0], output_type="latent", **options).images
    expected = pipeline._unpack_latents(packed, side, side).squeeze(2)
    (ours,) = draw_latents(krea2.pipeline(), SHORT, [3], size=(side, side), steps=3, guidance=guidance + 1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    picture = pipeline(prompt=SHORT, generator=seeds[1], **options).images[0]
    ((drawn,),) = draw(krea2.pipeline(), SHORT, [3], resolution=side, steps=3, guidance=guidance + 1)
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(picture, dtype=int)).max() <= 1


def test_the_whole_text_encoder_reads_the_same(krea2: PretrainedModel, tiny_krea2: Path) -> None:
    """With its part that sees pictures, as diffusers loads it, and with what fills prompts up."""
    prompts = [SHORT, LONG, "", "x" * 700]
    found = embed(krea2.family, krea2, prompts, max_tokens=None).text
    pipeline = Krea2Pipeline.from_pretrained(tiny_krea2)
    assert hasattr(pipeline.text_encoder, "visual")
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(prompts)
    assert found["states"].shape[1:] == (int(mask.sum(1).max()), 3, 32)
    for row in range(len(prompts)):
        torch.testing.assert_close(found["states"][row][found["kept"][row]], states[row][mask[row]], rtol=0, atol=1e-5)
        assert not found["states"][row][~found["kept"][row]].any()
    assert "kept" not in embed(krea2.family, krea2, [SHORT, SHORT]).text
    with pytest.raises(UserError, match="tokens with its template, and Krea 2 reads 507; shorten it"):
        krea2.family.tokenize(krea2, ["x" * 700])


def theirs(transformer: Any, noised: torch.Tensor, timesteps: torch.Tensor, text: Any) -> torch.Tensor:
    """By the transformer's own forward, as diffusers' script calls it: with a mask, and words that it hides."""
    rows, channels, height, width = noised.shape
    states = text["states"]
    kept = text.get("kept", torch.ones(states.shape[:2], dtype=torch.bool))
    states = torch.cat([states, torch.randn(rows, 5, *states.shape[2:])], dim=1)
    packed = noised.view(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    made = transformer(
        hidden_states=packed.reshape(rows, height * width // 4, 4 * channels),
        encoder_hidden_states=states,
        encoder_attention_mask=torch.nn.functional.pad(kept, (0, 5), value=False),
        timestep=timesteps / 1000,
        position_ids=Krea2Pipeline.prepare_position_ids(states.shape[1], height // 2, width // 2, torch.device("cpu")),
        return_dict=False,
    )[0]
    made = made.view(rows, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return made.reshape(noised.shape)


@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("prompts", [[SHORT], [LONG, SHORT, ""]])
def test_the_prediction_is_the_transformers_own(
    krea2: PretrainedModel, prompts: list[str], fewer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the library's blocks, and with those of cards that have kernels."""
    monkeypatch.setattr(family, "runs_in_fewer_passes", lambda *_: fewer)
    conditioning = embed(krea2.family, krea2, prompts)
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(len(prompts), 8, 6, 10, generator=generator)
    timesteps = torch.rand(len(prompts), generator=generator) * 1000
    with torch.no_grad():
        ours = krea2.family.predict(krea2.transformer, noised, timesteps, conditioning)
        expected = theirs(krea2.transformer, noised, timesteps, conditioning.text)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_step_does_not_wait_for_the_device(krea2: PretrainedModel) -> None:
    """On the meta device there are no values to look at: a step can be captured as a CUDA graph."""
    text = {name: value.to("meta") for name, value in embed(krea2.family, krea2, [LONG, SHORT]).text.items()}
    assert "kept" in text
    noised, times = torch.empty(2, 8, 8, 12, device="meta"), torch.empty(2, device="meta")
    made = krea2.family.predict(copy.deepcopy(krea2.transformer).to("meta"), noised, times, Conditioning(text))
    assert made.shape == noised.shape


def test_the_loss_is_that_of_diffusers_script(krea2: PretrainedModel, tmp_path: Path) -> None:
    """Latents (by the VAE's statistics, of a frame), time, noising, target, sign and prior preservation."""
    values = {**LORA, "with_prior_preservation": True, "prior_loss_weight": 0.3, "train_batch_size": 2, "time_shift": 1}
    run = Run(krea2, tmp_path, **values)
    batch = run.data.batch_sampler.batch(0, 2)
    config = krea2.vae.config
    center, spread = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents = []
    for picture, view, noise in zip(batch.pictures, batch.views, batch.latent_noise, strict=True):
        mean, deviation = (part[int(view) % len(part)] for part in run.data.latents._cache[int(picture)])
        latents.append((mean + deviation * noise - center) / spread)
    clean = torch.stack(latents)
    scheduler = type(krea2.scheduler)(shift=1.0)  # the script's has the shift of pictures only while it draws
    timesteps = scheduler.timesteps[999 - batch.timesteps]  # which fall
    sigmas = scheduler.sigmas[999 - batch.timesteps].view(-1, 1, 1, 1)
    noised = (1.0 - sigmas) * clean + sigmas * batch.noise
    prompts = [run.subject.prompt] * 2 + [str(run.subject.class_prompt)] * 2
    with torch.no_grad():
        made = theirs(krea2.transformer, noised, timesteps, embed(krea2.family, krea2, prompts).text)
    error = (made - (batch.noise - clean)).square().flatten(1).mean(1)
    instance, prior = error[:2].mean(), error[2:].mean()
    ours = run.trainer.loss(batch).detach()
    assert [float(part) for part in (ours.instance, ours.prior, ours.total)] == pytest.approx(  # type: ignore[arg-type]
        [float(instance), float(prior), float(instance + 0.3 * prior)], rel=1e-5
    )


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_in_fewer_passes_computes_the_same(krea2: PretrainedModel, masked: bool) -> None:
    block = copy.deepcopy(krea2.transformer.transformer_blocks[0]).requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.normal_(std=0.1, generator=random)
    x, grad = torch.randn(2, 2, 15, 64, generator=random)
    changes, angles = torch.randn(2, 1, 6 * 64, generator=random), torch.randn(15, 16, generator=random)
    cosine, sine = (each.repeat_interleave(2, dim=1) for each in (angles.cos(), angles.sin()))
    mask = (torch.arange(15) < torch.tensor([[15], [11]]))[:, None, None] if masked else None
    turns = torch.polar(torch.ones(15, 16), angles).expand(2, -1, -1)
    found = []
    for run in (
        lambda x: block(x, changes, (cosine, sine), mask),
        lambda x: family.run_in_fewer_passes(block, x, changes, turns, mask),
    ):
        given = x.clone().requires_grad_()
        made = run(given)
        made.backward(grad)
        found.append((made, given.grad))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_both_files_draw_in_diffusers_what_was_trained(
    krea2: PretrainedModel, loaded_krea2: PretrainedModel, tmp_path: Path
) -> None:
    """ComfyUI knows the layers by their makers' names, which diffusers' loader translates."""
    run = train(krea2, tmp_path / "run", lora_alpha=8, model_name="duck", lora_targets="linear")
    folder = tmp_path / "model"
    folder.mkdir()
    run.trainable.export(folder, run.h, torch.float32)
    options: dict[str, Any] = {"size": (64, 64), "steps": 2, "guidance": 2.0}
    (trained,) = draw_latents(run.base.pipeline(), SHORT, [1], **options)
    (before,) = draw_latents(loaded_krea2.pipeline(), SHORT, [1], **options)
    assert not torch.allclose(trained, before, atol=1e-3)
    layers = {name.partition(".lora_")[0] for name in run.trainable.parameters}
    assert len(layers) == (2 + 1 + 1) * 8  # of blocks, and of both kinds of blocks on prompts
    comfy = {key.partition(".lora_")[0] for key in load_file(folder / "duck.safetensors")}
    assert {"diffusion_model.blocks.1.attn.wo", "diffusion_model.txtfusion.refiner_blocks.0.mlp.up"} < comfy
    for name in (FILE, "duck.safetensors"):
        assert len(load_file(folder / name)) == 2 * len(layers)
        pipeline = quiet(copy.deepcopy(loaded_krea2).pipeline())
        pipeline.load_lora_weights(str(folder), weight_name=name)
        loaded = {key for key, _ in pipeline.transformer.named_parameters() if ".lora_" in key}
        assert len(loaded) == 2 * len(layers)
        (made,) = draw_latents(pipeline, SHORT, [1], **options)
        assert torch.allclose(made, trained, atol=1e-5), name
        read = read_adapter(folder / name)
        assert (read.family, len(read.parts["transformer"])) == ("krea2", len(layers))
    tensors = load_file(folder / "duck.safetensors")
    other = {key.replace("diffusion_model", "base_model.model"): value for key, value in tensors.items()}
    save_file(other, tmp_path / "other.safetensors")  # as AI-Toolkit calls them
    assert read_adapter(tmp_path / "other.safetensors").parts["transformer"].keys() == read.parts["transformer"].keys()


def test_a_file_of_the_transformer_alone_is_the_transformer(
    tiny_krea2: Path, loaded_krea2: PretrainedModel, tmp_path: Path
) -> None:
    """By its makers' names."""
    file = tmp_path / "model.safetensors"
    tensors = krea2_original(loaded_krea2.transformer.state_dict())
    save_file(tensors, file)
    values = {"pretrained_model_name_or_path": str(file), "pretrained_parts_name_or_path": str(tiny_krea2)}
    assert find_family(str(file)) == "krea2"
    model = load_base(hyperparameters(**values, method="lora"))
    assert same(weights(model.transformer), weights(loaded_krea2.transformer))
    del tensors["last.linear.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"transformer lacks final_layer\.linear\.weight"):
        load_base(hyperparameters(**values, method="lora"))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("", {"text_encoder_select_layers": [1, 2]}, "names 2 layers, and the transformer takes states of 3"),
        (
            "",
            {"text_encoder_select_layers": [1, 2, 9]},
            "text_encoder_select_layers names 9, and the text encoder has 4",
        ),
        ("", {"patch_size": 4}, "patch_size is 4, and this project trains models with 2"),
        ("vae", {"latents_mean": [0.5]}, r"latents_mean is \[0.5\] and should be a list of 8 numbers"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "its scheduler is EulerDiscreteScheduler"),
        ("text_encoder", {"model_type": "qwen3"}, "is of a qwen3 model; this project takes a Qwen3VLTextModel"),
    ],
)
def test_damaged_directories_are_refused(
    tiny_krea2: Path, tmp_path: Path, part: str, change: dict[str, object], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_krea2, model)
    name = {"": "model_index.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
    path = model / part / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        opened(model)


@pytest.mark.slow
def test_text_encoders_of_all_versions_are_read(
    tiny_krea2: Path, loaded_krea2: PretrainedModel, tmp_path: Path
) -> None:
    """With a head, behind a prefix more; and a configuration with the language model's values at its top."""
    model = tmp_path / "model"
    shutil.copytree(tiny_krea2, model)
    file, path = (model / "text_encoder" / name for name in ("model.safetensors", "config.json"))
    tensors = load_file(file)
    assert any(name.startswith("visual.") for name in tensors)
    save_file({f"model.{name}": value for name, value in tensors.items()}, file)
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config.pop("text_config"), **config}))
    read = opened(model)
    assert not read.remarks
    assert same(weights(read.text_encoder), weights(loaded_krea2.text_encoder))


def test_a_directory_is_described_and_written_again(tiny_krea2: Path, tmp_path: Path) -> None:
    assert describe(str(tiny_krea2))["base model"] == "Krea 2"
    convert(str(tiny_krea2), tmp_path / "model", precision="bf16")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    whole = {name for name, value in tensors.items() if value.dtype == torch.float32}
    assert whole == {name for name in tensors if "norm" in name}
    read = opened(tmp_path / "model")
    # As diffusers' script reads it, and programs with the whole of the model; what they need of it is there.
    written = tmp_path / "model" / "text_encoder"
    whole_models = (
        Qwen3VLModel.from_pretrained(written),
        Qwen3VLForConditionalGeneration.from_pretrained(written).model,
    )
    for model in whole_models:
        assert same(weights(model.language_model), weights(read.text_encoder))
    ((expected,),) = draw(read.pipeline(), SHORT, [3], resolution=64, steps=1)
    ((made,),) = draw(Krea2Pipeline.from_pretrained(tmp_path / "model"), SHORT, [3], resolution=64, steps=1)
    assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2


def test_times_are_spread_as_the_pipeline_spreads_them(krea2: PretrainedModel) -> None:
    def shift(**values: object) -> float:
        h = hyperparameters(**{**LORA, **values})
        half = float(krea2.family.objective(krea2, h).sigmas[499])  # type: ignore[attr-defined]
        return half / (1 - half)

    for size, steps in (((1024, 1024), 28), ((64, 96), 4)):
        sampler = krea2.family.sampler(krea2, steps, size, torch.device("cpu"))
        scheduler = copy.deepcopy(krea2.scheduler)
        mu = calculate_shift(size[0] // 16 * (size[1] // 16), *SHIFTS)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        assert torch.equal(sampler.sigmas, scheduler.sigmas)
    assert shift(time_shift=3.5) == pytest.approx(3.5)
    assert shift(resolution=1024) == pytest.approx(math.exp(calculate_shift(64 * 64, *SHIFTS)), rel=1e-4)
    krea2.config["is_distilled"] = True
    assert shift(resolution=512) == pytest.approx(math.exp(1.15), rel=1e-4)  # of pictures of any size


def test_a_model_that_draws_in_a_few_steps_is_refused_by_what_it_says(tmp_path: Path) -> None:
    path = save_tiny_krea2_pipeline(tmp_path / "model", distilled=True)
    with pytest.raises(UserError, match="distilled to draw in a few steps"):
        opened(path)
    h = hyperparameters(pretrained_model_name_or_path=str(path), train_distilled=True, method="lora")
    pipeline = quiet(load_base(h).pipeline())
    seed = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 0.0}
    expected = pipeline(prompt=SHORT, generator=seed, **options).images[0]
    ((made,),) = draw(pipeline, SHORT, [3], resolution=64, steps=3, guidance=1.0)
    assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_text_encoder": True}, "its text encoder is a language model"),
        ({"mixed_precision": "fp16"}, "it was not tried in fp16"),
        ({"lora_targets": "all"}, "it has no convolutions"),
        ({"pretrained_model_name_or_path": "krea/Krea-2-Turbo"}, "distilled to draw in a few steps"),
        ({"accept_license": None}, f"the licence {LICENCE}"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(**values)


def test_cards_train_it_in_the_bits_that_they_have_room_for() -> None:
    with pytest.raises(UserError, match=r"T4 has no bf16, and Krea 2 .*use a card with bf16"):
        make_plan(parse(), CARDS["T4"])
    plans = {name: make_plan(parse(), CARDS[name]) for name in ("L4", "A10G", "L40S", "H100")}
    assert [plan.base_weights for plan in plans.values()] == ["int8", "int8", "plain", "plain"]
    assert any(f"accept_license={LICENCE}" in note for note in plans["L4"].notes)


def test_its_norms_stay_as_diffusers_keeps_them(tiny_krea2: Path, tmp_path: Path) -> None:
    theirs = Krea2Transformer2DModel.from_pretrained(tiny_krea2 / "transformer", torch_dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, None):
        model = load_base(hyperparameters(pretrained_model_name_or_path=str(tiny_krea2), method="lora"), dtype)
        ours = model.part("transformer", "cpu", torch.bfloat16)
        assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
        assert same(weights(ours), weights(theirs))


def test_a_word_is_as_wide_as_all_states_that_the_transformer_takes() -> None:
    facts = FAMILIES["krea2"].facts
    config = empty_module("transformer", {}, facts.pipeline).config  # type: ignore[union-attr]
    assert facts.footprint.text_width == config.num_text_layers * config.text_hidden_dim
