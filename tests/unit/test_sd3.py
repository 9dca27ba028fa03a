"""Stable Diffusion 3.5 and 3, compared with diffusers' own pipeline, transformer, converters and the arithmetic of its
script."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

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
from dreambooth_sm.families.sd3 import run_in_fewer_passes
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel, load_base
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw, draw_latents
from dreambooth_sm.stored.denoiser_file import read_denoiser
from dreambooth_sm.stored.opening import open_tensors
from tests.helpers.original_names import sd3_original
from tests.helpers.passes import compare_passes
from tests.helpers.tiny import save_tiny_sd3_pipeline
from tests.helpers.training import Run, hyperparameters
from tests.unit.test_z_image import quiet

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
LICENCE = "stabilityai-ai-community"
LORA = {"method": "lora", "base_architecture": "sd3"}
SHORT, LONG = "photo of zwx toy", "photo of zwx toy, " * 6


def parse(**values: object) -> Hyperparameters:
    usual = {"pretrained_model_name_or_path": MEDIUM, "method": "lora", "accept_license": LICENCE}
    return Hyperparameters.parse({**PROMPTS, **usual, **values})


def train(base: PretrainedModel, root: Path, **values: object) -> Run:
    return Run(base, root, **{**LORA, "learning_rate": 1e-2, "max_train_steps": 2, **values}).train()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    """As Stable Diffusion 3 was, before 3.5."""
    folder = save_tiny_sd3_pipeline(tmp_path_factory.mktemp("base") / "tiny", norms=False)
    return load_base(hyperparameters(pretrained_model_name_or_path=str(folder), method="lora"))


@pytest.mark.parametrize("recomputing", [False, True])
def test_in_fewer_passes_it_computes_the_same(sd3: PretrainedModel, recomputing: bool) -> None:
    transformer = SD3Transformer2DModel.from_config(sd3.modules["transformer"].config)
    random = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, transformer.config.in_channels, 4, 6, generator=random),
        "encoder_hidden_states": torch.randn(2, 3, transformer.config.joint_attention_dim, generator=random),
        "pooled_projections": torch.randn(2, transformer.config.pooled_projection_dim, generator=random),
        "timestep": torch.tensor([300.0, 800.0]),
    }

    def run(denoiser: Any, **given: Any) -> torch.Tensor:
        return run_in_fewer_passes(denoiser, *(given[name] for name in inputs))

    compare_passes(transformer, run, inputs, recomputing=recomputing)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("side", [64, 48])
def test_pictures_are_the_pipelines_own(
    sd3: PretrainedModel, first: PretrainedModel, side: int, guidance: float
) -> None:
    """To the bit, from the same seed."""
    options = {"height": side, "width": side, "num_inference_steps": 3, "guidance_scale": guidance}
    for model in (sd3, first):
        pipeline = quiet(model.pipeline())
        expected = pipeline(prompt=SHORT, generator=torch.Generator().manual_seed(3), **options).images[0]
        ((ours,),) = draw(model.pipeline(), SHORT, [3], resolution=side, steps=3, guidance=guidance)
        assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_prompts_are_read_as_the_pipeline_reads_them(sd3: PretrainedModel) -> None:
    prompts = [SHORT, LONG, ""]
    found = embed(sd3.family, sd3, prompts).text
    states, _, pooled, _ = sd3.pipeline().encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
    assert found["states"].shape == (3, 77 + 256, 48)
    assert torch.allclose(found["states"], states, atol=1e-6)
    assert torch.allclose(found["pooled"], pooled, atol=1e-6)
    with pytest.raises(UserError, match=r"and Stable Diffusion 3\.5 reads 256; shorten it"):
        sd3.family.tokenize(sd3, ["x" * 300])


def test_the_loss_is_that_of_diffusers_script(sd3: PretrainedModel, tmp_path: Path) -> None:
    """Latents, scale and shift, time, noising, target, sign and prior preservation, where it does not precondition."""
    values = {**LORA, "with_prior_preservation": True, "prior_loss_weight": 0.3, "train_batch_size": 2}
    values |= {"time_shift": 1, "time_sampling": "uniform"}
    run = Run(sd3, tmp_path, **values)
    batch = run.data.batch_sampler.batch(0, 2)
    drawn = []
    for picture, view, noise in zip(batch.pictures, batch.views, batch.latent_noise, strict=True):
        mean, deviation = (part[int(view) % len(part)] for part in run.data.latents._cache[int(picture)])
        drawn.append(mean + deviation * noise)
    config = sd3.vae.config
    clean = (torch.stack(drawn) - config.shift_factor) * config.scaling_factor
    times = batch.timesteps + 1.0
    sigmas = times.view(-1, 1, 1, 1) / 1000
    prompts = [run.subject.prompt] * 2 + [str(run.subject.class_prompt)] * 2
    text = embed(sd3.family, sd3, prompts).text
    with torch.no_grad():
        made = sd3.transformer(
            hidden_states=(1.0 - sigmas) * clean + sigmas * batch.noise,
            timestep=times,
            encoder_hidden_states=text["states"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]
    error = (made - (batch.noise - clean)).square().flatten(1).mean(1)
    instance, prior = error[:2].mean(), error[2:].mean()
    ours = run.trainer.loss(batch).detach()
    assert [float(part) for part in (ours.instance, ours.prior, ours.total)] == pytest.approx(  # type: ignore[arg-type]
        [float(instance), float(prior), float(instance + 0.3 * prior)], rel=1e-5
    )


def test_a_step_does_not_wait_for_the_device(sd3: PretrainedModel) -> None:
    """On the meta device there are no values to look at: a step can be captured as a CUDA graph."""
    text = {name: value.to("meta") for name, value in embed(sd3.family, sd3, [LONG, SHORT]).text.items()}
    noised, times = torch.empty(2, 8, 8, 12, device="meta"), torch.empty(2, device="meta")
    made = sd3.family.predict(copy.deepcopy(sd3.transformer).to("meta"), noised, times, Conditioning(text))
    assert made.shape == noised.shape


@pytest.mark.slow
def test_diffusers_file_draws_what_was_trained_and_both_are_read(
    sd3: PretrainedModel, loaded_sd3: PretrainedModel, tmp_path: Path
) -> None:
    run = train(sd3, tmp_path / "run", lora_alpha=8, model_name="duck", lora_targets="linear")
    folder = tmp_path / "model"
    folder.mkdir()
    run.trainable.export(folder, run.h, torch.float32)
    (trained,) = draw_latents(run.base.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    (before,) = draw_latents(loaded_sd3.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert not torch.allclose(trained, before, atol=1e-3)
    layers = {name.partition(".lora_")[0] for name in run.trainable.parameters}
    assert any(".attn2." in layer for layer in layers)
    pipeline = quiet(copy.deepcopy(loaded_sd3).pipeline())
    pipeline.load_lora_weights(str(folder), weight_name=FILE)
    assert len({key for key, _ in pipeline.transformer.named_parameters() if ".lora_" in key}) == 2 * len(layers)
    (made,) = draw_latents(pipeline, SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert torch.allclose(made, trained, atol=1e-5)
    for name in (FILE, "duck.safetensors"):
        found = read_adapter(folder / name)
        assert (found.family, found.unknown) == ("sd3", ())
        assert {f"transformer.{layer}" for layer in found.parts["transformer"]} == layers
        assert describe(str(folder / name))["base model"] == "Stable Diffusion 3.5"


@pytest.mark.parametrize("targets", ["attention", "linear"])
def test_comfyuis_file_has_the_makers_names(sd3: PretrainedModel, tmp_path: Path, targets: str) -> None:
    """What it says of each of their layers is what diffusers' converter makes of it."""
    facts = FAMILIES["sd3"].facts
    module = sd3.transformer
    layers = {
        name: LowRank(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 0.5)
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(facts.adapted[targets].denoiser)
    }
    path = tmp_path / "a.safetensors"
    write_comfy(path, Adapter({"transformer": layers}), facts)
    read = read_adapter(path)
    assert (read.family, read.unknown) == ("sd3", ())
    for name, layer in layers.items():
        weight = torch.zeros(layer.up.shape[0], layer.down.shape[1])
        torch.testing.assert_close(read.parts["transformer"][name].change(weight), layer.change(weight))
    theirs = open_tensors(path).tensors
    modules = {name.rpartition(".lora_")[0].removeprefix("diffusion_model.") for name in theirs}
    original = {name.removesuffix(".weight") for name in sd3_original(module.state_dict())}
    assert modules <= original


def test_a_file_of_the_transformer_alone_is_the_transformer(sd3: PretrainedModel, tmp_path: Path) -> None:
    """By its makers' names, with the VAE beside it, as they give it."""
    module = sd3.transformer
    made = {f"model.diffusion_model.{name}": value for name, value in sd3_original(module.state_dict()).items()}
    path = tmp_path / "sd3.5_tiny.safetensors"
    save_file({name: value.contiguous() for name, value in made.items()} | {"first_stage_model.x": torch.ones(1)}, path)
    assert find_family(str(path)) == "sd3"
    tensors = read_denoiser(open_tensors(path), "transformer", module)
    for name, value in module.state_dict().items():
        assert torch.equal(tensors[name].read(), value), name


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("transformer", {"patch_size": 4}, "patch_size is 4, and this project trains models with 2"),
        ("vae", {"shift_factor": None}, "shift_factor is None and should be a number such as 0.0609"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "its scheduler is EulerDiscreteScheduler"),
        ("text_encoder_3", {"model_type": "qwen3"}, "is of a qwen3 model; this project takes a T5EncoderModel there"),
    ],
)
def test_damaged_directories_are_refused(
    tiny_sd3: Path, tmp_path: Path, part: str, change: dict[str, object], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd3, model)
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))


def test_parts_of_other_models_are_refused(tiny_sd3: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_sd3, model)
    shutil.rmtree(model / "text_encoder_2")
    shutil.copytree(model / "text_encoder", model / "text_encoder_2")
    with pytest.raises(UserError, match="of a whole prompt is 16 and 16 wide, and the transformer takes 40"):
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))


def test_a_directory_without_t5_is_refused(tiny_sd3: Path, tmp_path: Path) -> None:
    """diffusers draws without it; people keep such directories, which are smaller."""
    model = tmp_path / "model"
    shutil.copytree(tiny_sd3, model)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(model / part)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps(index | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    )
    with pytest.raises(UserError, match="text_encoder_3"):
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))


@pytest.mark.slow
def test_a_directory_is_described_and_written_again(
    tiny_sd3: Path, loaded_sd3: PretrainedModel, tmp_path: Path
) -> None:
    assert describe(str(tiny_sd3))["base model"] == "Stable Diffusion 3.5"
    convert(str(tiny_sd3), tmp_path / "model")
    for pipeline in (
        StableDiffusion3Pipeline.from_pretrained(tmp_path / "model"),
        load_base(hyperparameters(pretrained_model_name_or_path=str(tmp_path / "model"), method="lora")).pipeline(),
    ):
        ((made,),) = draw(pipeline, SHORT, [3], resolution=64, steps=1)
        ((expected,),) = draw(loaded_sd3.pipeline(), SHORT, [3], resolution=64, steps=1)
        assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2


def test_the_shift_is_that_of_drawing_unless_one_is_asked_for(sd3: PretrainedModel) -> None:
    def shift(**values: object) -> float:
        half = float(
            sd3.family.objective(sd3, hyperparameters(**{**LORA, "time_sampling": "uniform", **values})).sigmas[499]
        )  # type: ignore[attr-defined]
        return half / (1 - half)

    assert shift() == pytest.approx(3.0)
    assert shift(time_shift=2.5) == pytest.approx(2.5)
    assert parse().time_sampling == "logit_normal"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_text_encoder": True}, "its text encoders stay as they are"),
        ({"mixed_precision": "fp16"}, "it was not tried in fp16"),
        ({"lora_targets": "all"}, "it has no convolutions"),
        (
            {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"},
            "distilled to draw in a few steps",
        ),
        ({"pretrained_model_name_or_path": "stabilityai/stable-diffusion-3.5-large-controlnet-blur"}, "controlnet"),
        ({"accept_license": None}, f"the licence {LICENCE}"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(**values)


def test_cards_train_it_in_the_bits_that_they_have_room_for() -> None:
    with pytest.raises(UserError, match=r"T4 has no bf16, and Stable Diffusion 3\.5 .*use a card with bf16"):
        make_plan(parse(), CARDS["T4"])
    plan = make_plan(parse(), CARDS["L4"])
    assert plan.base_weights == "plain"
    assert any(f"accept_license={LICENCE}" in note for note in plan.notes)


@pytest.mark.parametrize(("heads", "blocks"), [(24, 24), (38, 38)], ids=["medium", "large"])
def test_a_file_of_diffusers_script_is_told_from_those_of_families_with_the_same_names(
    tmp_path: Path, heads: int, blocks: int
) -> None:
    """By the sides of its layers: it trains the attention of both sides, and says nothing of the base model."""
    width = 64 * heads
    names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
    tensors = {
        f"transformer.transformer_blocks.{block}.attn.{name}.lora_{end}.weight": torch.zeros(shape)
        for block in (0, blocks - 1)
        for name in names
        for end, shape in (("A", (4, width)), ("B", (width, 4)))
    }
    save_file(tensors, tmp_path / FILE)
    assert read_adapter(tmp_path / FILE).family == "sd3"
