"""Z-Image: compared with diffusers' own pipeline and transformer, and with the arithmetic of its training script."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth_sm.convert import convert, extract_from
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.describe import describe
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import Conditioning
from dreambooth_sm.families.find import find_family
from dreambooth_sm.families.z_image import run_in_fewer_passes
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.objectives import FlowMatching
from dreambooth_sm.planning.cards import CARDS, CPU
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw, draw_latents, drawing_part
from dreambooth_sm.training.quantised import is_quantised
from tests.helpers.training import Run, hyperparameters, same, weights

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
HUB = "Tongyi-MAI/Z-Image"
LORA = {"method": "lora", "base_architecture": "z_image"}
# With the template around them, of one multiple of 32 tokens and of another.
SHORT, LONG = "photo of zwx toy", "photo of zwx toy, " * 6
NO_GUIDANCE = 1.0


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, "pretrained_model_name_or_path": HUB, "method": "lora", **values})


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(base: PretrainedModel, root: Path, **values: object) -> Run:
    return Run(base, root, **{**LORA, "learning_rate": 1e-2, "max_train_steps": 2, **values}).train()


@pytest.mark.parametrize("guidance", [NO_GUIDANCE, 5.0])
@pytest.mark.parametrize("side", [64, 48])
@pytest.mark.parametrize("prompt", [SHORT, LONG])
def test_pictures_are_the_pipelines_own(z_image: PretrainedModel, prompt: str, side: int, guidance: float) -> None:
    """To the bit; at 48 pixels, patches are filled up."""
    pipeline = quiet(z_image.pipeline())
    options = {"height": side, "width": side, "num_inference_steps": 3, "guidance_scale": guidance - 1}
    expected = pipeline(prompt, generator=torch.Generator().manual_seed(3), **options).images[0]
    ((ours,),) = draw(z_image.pipeline(), prompt, [3], resolution=side, steps=3, guidance=guidance)
    assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_pictures_are_of_the_size_that_is_asked_for(z_image: PretrainedModel) -> None:
    pipeline = quiet(z_image.pipeline())
    options = {"height": 32, "width": 96, "num_inference_steps": 2, "guidance_scale": 2.0}
    expected = pipeline(SHORT, generator=torch.Generator().manual_seed(1), output_type="latent", **options).images
    (ours,) = draw_latents(z_image.pipeline(), SHORT, [1], size=(96, 32), steps=2, guidance=3.0)
    assert torch.equal(ours, expected)


def test_a_schedule_that_shifts_by_size_is_drawn_as_the_pipeline_draws_it(z_image: PretrainedModel) -> None:
    z_image.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = quiet(z_image.pipeline())
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.0}
    expected = pipeline(SHORT, generator=torch.Generator().manual_seed(1), output_type="latent", **options).images
    (ours,) = draw_latents(z_image.pipeline(), SHORT, [1], size=(64, 64), steps=3, guidance=3.0)
    assert torch.equal(ours, expected)


def test_prompts_are_read_as_the_pipeline_reads_them(z_image: PretrainedModel) -> None:
    prompts = [SHORT, LONG, ""]
    found = embed(z_image.family, z_image, prompts).text
    expected, _ = z_image.pipeline().encode_prompt(list(prompts), do_classifier_free_guidance=False)
    assert [len(states) for states in expected] == found["lengths"].tolist()
    for row, states in enumerate(expected):
        assert torch.allclose(found["states"][row, : len(states)], states, atol=1e-6)
        assert not found["states"][row, len(states) :].any()
    assert found["states"].shape[1] % 32 == 0
    assert found["kept"].sum(1).tolist() == [math.ceil(len(states) / 32) * 32 for states in expected]
    assert "kept" not in embed(z_image.family, z_image, [SHORT, "photo of a toy"]).text


def test_a_prompt_that_is_too_long_is_refused(z_image: PretrainedModel) -> None:
    with pytest.raises(UserError, match="tokens with its template, and Z-Image reads 512; shorten it"):
        z_image.family.tokenize(z_image, ["x" * 600])
    cut = z_image.family.tokenize(z_image, ["x" * 600], max_tokens=None)
    assert cut["ids"].shape == (1, 512)


def theirs(transformer: Any, noised: torch.Tensor, timesteps: torch.Tensor, text: Any) -> torch.Tensor:
    """By the transformer's own forward, as diffusers' training script calls it."""
    states = [row[:length] for row, length in zip(text["states"], text["lengths"].tolist(), strict=True)]
    rows = list(noised.unsqueeze(2).unbind(0))
    return -torch.stack(transformer(rows, (1000 - timesteps) / 1000, states, return_dict=False)[0]).squeeze(2)


@pytest.mark.parametrize("size", [(32, 32), (24, 24), (16, 40)])
@pytest.mark.parametrize("prompts", [[SHORT], [SHORT, "photo of a toy"], [LONG, SHORT, ""]])
def test_the_prediction_is_the_transformers_own(
    z_image: PretrainedModel, prompts: list[str], size: tuple[int, int]
) -> None:
    conditioning = embed(z_image.family, z_image, prompts)
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(len(prompts), 16, *size, generator=generator)
    timesteps = torch.rand(len(prompts), generator=generator) * 1000
    with torch.no_grad():
        ours = z_image.family.predict(z_image.transformer, noised, timesteps, conditioning)
        expected = theirs(z_image.transformer, noised, timesteps, conditioning.text)
    assert torch.allclose(ours, expected, atol=1e-6)


def test_a_step_does_not_wait_for_the_device(z_image: PretrainedModel) -> None:
    """On the meta device there are no values to look at: a step can be captured as a CUDA graph."""
    conditioning = embed(z_image.family, z_image, [LONG, SHORT])
    text = {name: value.to("meta") for name, value in conditioning.text.items()}
    assert "kept" in text
    noised, times = torch.empty(2, 16, 24, 24, device="meta"), torch.empty(2, device="meta")
    made = z_image.family.predict(copy.deepcopy(z_image.transformer).to("meta"), noised, times, Conditioning(text))
    assert made.shape == noised.shape


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_the_loss_is_that_of_diffusers_script(z_image: PretrainedModel, tmp_path: Path, shift: float) -> None:
    """Time, noising, target, sign and prior preservation, in plain arithmetic."""
    z_image.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    values = {**LORA, "with_prior_preservation": True, "prior_loss_weight": 0.3, "train_batch_size": 2}
    run = Run(z_image, tmp_path, **values)
    batch = run.data.batch_sampler.batch(0, 2)
    scheduler = z_image.scheduler
    latents = []
    for picture, view, noise in zip(batch.pictures, batch.views, batch.latent_noise, strict=True):
        mean, deviation = (part[int(view) % len(part)] for part in run.data.latents._cache[int(picture)])
        latents.append((mean + deviation * noise - 0.1159) * 0.3611)
    clean = torch.stack(latents)
    # The scheduler's times fall.
    timesteps = scheduler.timesteps[999 - batch.timesteps]
    sigmas = scheduler.sigmas[999 - batch.timesteps].view(-1, 1, 1, 1)
    noised = (1.0 - sigmas) * clean + sigmas * batch.noise
    prompts = [run.subject.prompt] * 2 + [str(run.subject.class_prompt)] * 2
    text = embed(z_image.family, z_image, prompts).text
    with torch.no_grad():
        made = theirs(z_image.transformer, noised, timesteps, text)
    error = (made - (batch.noise - clean)).square().flatten(1).mean(1)
    instance, prior = error[:2].mean(), error[2:].mean()
    ours = run.trainer.loss(batch).detach()
    assert [float(part) for part in (ours.instance, ours.prior, ours.total)] == pytest.approx(  # type: ignore[arg-type]
        [float(instance), float(prior), float(instance + 0.3 * prior)], rel=1e-5
    )


@pytest.mark.parametrize("part", ["noise_refiner", "context_refiner"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_in_fewer_passes_computes_the_same(z_image: PretrainedModel, part: str, masked: bool) -> None:
    block = copy.deepcopy(getattr(z_image.modules["transformer"], part)[0]).float().requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.normal_(std=0.1, generator=random)
    hidden, grad = torch.randn(2, 2, 6, block.dim, generator=random).unbind()
    pairs = block.head_dim // 2
    turns = torch.polar(torch.ones(2, 6, pairs), torch.randn(2, 6, pairs, generator=random))
    told = torch.randn(2, block.adaLN_modulation[0].in_features, generator=random) if block.modulation else None
    kept = torch.arange(6) < torch.tensor([[6], [4]]) if masked else None
    found = []
    for run in (block, functools.partial(run_in_fewer_passes, block)):
        given = hidden.clone().requires_grad_()
        made = run(given, kept, turns, told)
        made.backward(grad)
        found.append((made, given.grad))
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["plain", "int8", "nf4"])
def test_prompts_are_read_in_the_plans_bits_whatever_they_are_trained_beside(
    z_image: PretrainedModel, text: str
) -> None:
    for bits in ("plain", "nf4"):
        plan = dataclasses.replace(make_plan(parse(base_weights=bits), CPU), text_weights=text)
        assert is_quantised(drawing_part(z_image, plan, "text_encoder")) == (text != "plain")
        assert is_quantised(drawing_part(z_image, plan, "transformer")) == (bits != "plain")


@pytest.fixture
def exported(z_image: PretrainedModel, tmp_path: Path) -> tuple[Run, Path]:
    run = train(z_image, tmp_path / "run", lora_alpha=8, model_name="duck", lora_targets="linear")
    folder = tmp_path / "model"
    folder.mkdir()
    run.trainable.export(folder, run.h, torch.float32)
    return run, folder


@pytest.mark.slow
def test_both_files_draw_in_diffusers_what_was_trained(
    exported: tuple[Run, Path], loaded_z_image: PretrainedModel
) -> None:
    run, folder = exported
    (trained,) = draw_latents(run.base.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    (before,) = draw_latents(loaded_z_image.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert not torch.allclose(trained, before, atol=1e-3)
    layers = {name.partition(".lora_")[0] for name in run.trainable.parameters}
    for name, prefix in ((FILE, "transformer."), ("duck.safetensors", "diffusion_model.")):
        stored = load_file(folder / name)
        assert {key.partition(".lora_")[0] for key in stored} == {
            prefix + layer.removeprefix("transformer.") for layer in layers
        }
        pipeline = quiet(copy.deepcopy(loaded_z_image).pipeline())
        pipeline.load_lora_weights(str(folder), weight_name=name)
        loaded = {key for key, _ in pipeline.transformer.named_parameters() if ".lora_" in key}
        assert len(loaded) == len(stored) == 2 * len(layers)
        options = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0}
        made = pipeline(SHORT, generator=torch.Generator().manual_seed(1), output_type="latent", **options).images
        assert torch.allclose(made, trained, atol=1e-5)


@pytest.mark.slow
def test_the_files_say_what_they_are(exported: tuple[Run, Path]) -> None:
    run, folder = exported
    with safe_open(folder / FILE, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == run.h.lora_rank
    with safe_open(folder / "duck.safetensors", "pt") as file:
        notes = file.metadata()
    assert notes["modelspec.architecture"] == "z-image/lora"
    assert notes["modelspec.trigger_phrase"] == "photo of zwx toy"
    assert notes["ss_network_dim"] == notes["ss_network_alpha"] == "16"


def test_directories_as_the_hub_has_them(tiny_z_image: Path, loaded_z_image: PretrainedModel, tmp_path: Path) -> None:
    """In shards, with a language model's head and the prefix that this brings."""
    model = tmp_path / "model"
    shutil.copytree(tiny_z_image, model)
    text = load_file(model / "text_encoder" / "model.safetensors")
    text = {f"model.{name}": value for name, value in text.items()} | {"lm_head.weight": torch.zeros(4, 32)}
    save_file(text, model / "text_encoder" / "model.safetensors")
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        shard = file.with_name(f"diffusion_pytorch_model-{number:05}-of-00002.safetensors")
        save_file({name: tensors[name] for name in names}, shard)
    assert find_family(str(model)) == "z_image"
    loaded = load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))
    assert loaded.remarks == ()
    for part, module in loaded_z_image.modules.items():
        assert same(weights(loaded.modules[part]), weights(module))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("transformer", {"siglip_feat_dim": 8}, "siglip_feat_dim is set"),
        ("transformer", {"all_patch_size": [4]}, "all_patch_size is"),
        ("transformer", {"cap_feat_dim": 64}, "cap_embedder"),
        ("vae", {"shift_factor": None}, "shift_factor is null"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "its scheduler is EulerDiscreteScheduler"),
        ("scheduler", {"num_train_timesteps": 500}, "num_train_timesteps is 500"),
        ("scheduler", {"shift": -1.0}, "shift is -1.0"),
        ("text_encoder", {"model_type": "llama"}, "is of a llama model; this project takes a Qwen3Model there"),
    ],
)
def test_damaged_directories_are_refused(
    tiny_z_image: Path, tmp_path: Path, part: str, change: dict[str, object], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_z_image, model)
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))


def test_a_directory_is_described_and_written_again(
    tiny_z_image: Path, loaded_z_image: PretrainedModel, tmp_path: Path
) -> None:
    assert describe(str(tiny_z_image))["base model"] == "Z-Image"
    convert(str(tiny_z_image), tmp_path / "model")
    written = load_base(hyperparameters(pretrained_model_name_or_path=str(tmp_path / "model"), method="lora"))
    assert same(weights(written.transformer), weights(loaded_z_image.transformer))
    with pytest.raises(UserError, match="Z-Image models are written as directories; name one"):
        convert(str(tiny_z_image), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="do not differ in any layer"):
        extract_from(str(tmp_path / "model"), str(tiny_z_image), tmp_path / "lora.safetensors")


def test_times_are_quantiles_of_the_share_of_noise() -> None:
    uniform, middle = FlowMatching.of(1.0, "uniform", 1000), FlowMatching.of(1.0, "logit_normal", 1000)
    assert torch.allclose(uniform.sigmas, torch.arange(1, 1001) / 1000)
    drawn = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).sigmoid()
    for share in (0.1, 0.5, 0.9):
        assert float(middle.sigmas[int(1000 * share)]) == pytest.approx(float(drawn.quantile(share)), abs=0.01)
    for shift in (2.0, 6.0):
        theirs_fall = FlowMatchEulerDiscreteScheduler(shift=shift)
        ours = FlowMatching.of(shift, "uniform", 1000)
        assert torch.equal(ours.sigmas.flip(0), theirs_fall.sigmas)
        assert torch.equal(ours.told(torch.arange(1000)).flip(0), theirs_fall.timesteps)


def test_what_is_seen_and_said_is_inverted() -> None:
    objective, times = FlowMatching.of(3.0, "uniform", 1000), torch.tensor([0, 300, 999])
    seen, said = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    latents, noise = objective.invert(seen, said, times)
    assert torch.allclose(objective.noised(latents, noise, times), seen, atol=1e-5)
    assert torch.allclose(objective.target(latents, noise, times), said, atol=1e-5)


def test_the_shift_is_the_models_own_unless_one_is_asked_for(z_image: PretrainedModel) -> None:
    def shift(**values: object) -> float:
        sigmas = z_image.family.objective(z_image, hyperparameters(**{**LORA, **values})).sigmas  # type: ignore[attr-defined]
        half = float(sigmas[499])
        return half / (1 - half)

    assert shift() == pytest.approx(6.0)
    assert shift(time_shift=2.5) == pytest.approx(2.5)
    # 32 x 32 latents make 256 words of pictures of 128 pixels; and 1,024 those of 256.
    assert shift(time_shift="resolution", resolution=128) == pytest.approx(math.exp(0.5))
    assert shift(time_shift="resolution", resolution=256) == pytest.approx(math.exp(0.5 + 0.65 * 768 / 3840))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_text_encoder": True}, "its text encoder is a language model"),
        ({"snr_gamma": 5}, "trained by flow matching"),
        ({"lora_targets": "all"}, "it has no convolutions"),
        ({"lora_variant": "loha"}, "read LoRA alone"),
        ({"mixed_precision": "fp16"}, "beyond the range of fp16"),
        ({"attention": "xformers"}, "rotary positions"),
        ({"max_token_length": 150}, "up to 512 tokens"),
        ({"resolution": 1000}, "takes multiples of 16; set 992"),
        ({"bucket_step": 8}, "multiples of 16"),
        ({"pretrained_model_name_or_path": f"{HUB}-Turbo"}, "distilled to draw in a few steps"),
        ({"pretrained_model_name_or_path": "a/b", "time_shift": 2}, "time_shift is for models of flow matching"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(**values)


def test_a_distilled_model_is_trained_where_that_is_asked_for() -> None:
    assert parse(pretrained_model_name_or_path=f"{HUB}-Turbo", train_distilled=True).architecture == "z_image"


@pytest.mark.parametrize("method", ["full", "textual_inversion", "hypernetwork"])
def test_other_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(UserError, match=f"method={method}: the base model is a Z-Image model; set method to lora"):
        make_plan(parse(method=method), CARDS["H100"])


def test_cards_without_bf16_are_refused() -> None:
    for card in ("T4", "V100"):
        with pytest.raises(UserError, match=f"{card} has no bf16, and Z-Image .* use a card with bf16, such as A10G"):
            make_plan(parse(), CARDS[card])
    assert make_plan(parse(), CARDS["L4"]).precision == "bf16"
