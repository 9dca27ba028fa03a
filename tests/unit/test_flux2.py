"""FLUX.2 klein, compared with diffusers' own pipeline and transformer, and with the arithmetic of its script."""

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
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file

from dreambooth_sm.adapters.read import read_adapter
from dreambooth_sm.convert import convert
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.describe import describe
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import Conditioning
from dreambooth_sm.families.find import find_family
from dreambooth_sm.families.flux2 import run_in_fewer_passes
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel, load_base, open_base
from dreambooth_sm.planning.cards import CARDS
from dreambooth_sm.planning.choice import make_plan
from dreambooth_sm.sampling import draw, draw_latents
from tests.helpers.drawing import levels_between
from tests.helpers.original_names import flux2_original
from tests.helpers.passes import compare_passes
from tests.helpers.training import Run, hyperparameters, same, weights
from tests.unit.test_z_image import quiet

PROMPTS = {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}
MAKERS = "black-forest-labs"
HUB, NINE = f"{MAKERS}/FLUX.2-klein-base-4B", f"{MAKERS}/FLUX.2-klein-base-9B"
LORA = {"method": "lora", "base_architecture": "flux2"}
SHORT, LONG = "photo of zwx toy", "photo of zwx toy, " * 6


def parse(**values: object) -> Hyperparameters:
    return Hyperparameters.parse({**PROMPTS, "pretrained_model_name_or_path": HUB, "method": "lora", **values})


def train(base: PretrainedModel, root: Path, **values: object) -> Run:
    return Run(base, root, **{**LORA, "learning_rate": 1e-2, "max_train_steps": 2, **values}).train()


@pytest.mark.parametrize("recomputing", [False, True])
def test_in_fewer_passes_it_computes_the_same(flux2: PretrainedModel, recomputing: bool) -> None:
    transformer = flux2.modules["transformer"]
    random = torch.Generator().manual_seed(0)
    places = torch.randint(9, (9, 4), generator=random)
    inputs = {
        "hidden_states": torch.randn(2, 6, transformer.config.in_channels, generator=random),
        "encoder_hidden_states": torch.randn(2, 3, transformer.config.joint_attention_dim, generator=random),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": places[:6],
        "txt_ids": places[6:],
    }
    compare_passes(transformer, run_in_fewer_passes, inputs, recomputing=recomputing)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("side", [64, 48])
def test_pictures_are_the_pipelines_own(flux2: PretrainedModel, side: int, guidance: float) -> None:
    """The pipeline draws its noise patch by patch; given ours, pictures are the same."""
    pipeline = quiet(flux2.pipeline())
    noise = torch.randn(1, 8, side // 8, side // 8, generator=torch.Generator().manual_seed(3))
    options = {"height": side, "width": side, "num_inference_steps": 3, "guidance_scale": guidance}
    expected = pipeline(prompt=SHORT, latents=Flux2KleinPipeline._patchify_latents(noise), **options).images[0]
    ((ours,),) = draw(flux2.pipeline(), SHORT, [3], resolution=side, steps=3, guidance=guidance)
    assert levels_between(ours, expected) <= (guidance > 1)  # the pipeline asks twice


@pytest.mark.parametrize("steps", [4, 50])
@pytest.mark.parametrize("size", [(1024, 1024), (64, 96), (1280, 1280)])
def test_times_are_spread_as_the_pipeline_spreads_them(
    flux2: PretrainedModel, size: tuple[int, int], steps: int
) -> None:
    sampler = flux2.family.sampler(flux2, steps, size, torch.device("cpu"))
    scheduler = copy.deepcopy(flux2.scheduler)
    shift = compute_empirical_mu(size[0] // 16 * (size[1] // 16), steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
    assert torch.equal(sampler.sigmas, scheduler.sigmas)


def test_prompts_are_read_as_the_pipeline_reads_them(flux2: PretrainedModel) -> None:
    prompts = [SHORT, LONG, ""]
    found = embed(flux2.family, flux2, prompts).text["states"]
    expected, _ = flux2.pipeline().encode_prompt(prompts)
    assert found.shape == (3, 512, 96)
    assert torch.allclose(found, expected, atol=1e-6)
    with pytest.raises(UserError, match=r"tokens with its template, and FLUX\.2 klein reads 512; shorten it"):
        flux2.family.tokenize(flux2, ["x" * 600])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layers_whose_states_nobody_reads_are_not_loaded(tiny_flux2: Path, dtype: torch.dtype) -> None:
    h = hyperparameters(pretrained_model_name_or_path=str(tiny_flux2), **LORA)
    base, whole = open_base(h), load_base(h)
    readers = [each.part("text_encoder", "cpu", dtype) for each in (base, whole)]
    assert [len(each.layers) for each in (*readers, base.text_encoder)] == [27, 28, 28]
    states, expected = (
        embed(base.family, base.with_parts({"text_encoder": reader}), [SHORT, LONG, ""]).text["states"]
        for reader in readers
    )
    assert torch.equal(states, expected)


def theirs(transformer: Any, noised: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> Any:
    """By the transformer's own forward, as diffusers' training script calls it: latents and answer in patches."""
    places = Flux2KleinPipeline._prepare_latent_ids(noised)
    made = transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(noised),
        timestep=timesteps / 1000,
        guidance=None,
        encoder_hidden_states=states,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(states),
        img_ids=places,
        return_dict=False,
    )[0]
    return Flux2KleinPipeline._unpack_latents_with_ids(made, places)


def test_a_step_does_not_wait_for_the_device(flux2: PretrainedModel) -> None:
    """On the meta device there are no values to look at: a step can be captured as a CUDA graph."""
    text = {name: value.to("meta") for name, value in embed(flux2.family, flux2, [LONG, SHORT]).text.items()}
    noised, times = torch.empty(2, 8, 8, 12, device="meta"), torch.empty(2, device="meta")
    made = flux2.family.predict(copy.deepcopy(flux2.transformer).to("meta"), noised, times, Conditioning(text))
    assert made.shape == noised.shape


def test_the_loss_is_that_of_diffusers_script(flux2: PretrainedModel, tmp_path: Path) -> None:
    """Latents (their mean, by the norm's statistics), time, noising, target, sign and prior preservation."""
    values = {**LORA, "with_prior_preservation": True, "prior_loss_weight": 0.3, "train_batch_size": 2, "time_shift": 1}
    run = Run(flux2, tmp_path, **values)
    batch = run.data.batch_sampler.batch(0, 2)
    patched = Flux2KleinPipeline._patchify_latents
    means = []
    for picture, view in zip(batch.pictures, batch.views, strict=True):
        mean, deviation = (part[int(view) % len(part)] for part in run.data.latents._cache[int(picture)])
        assert not deviation.any()
        means.append(mean)
    norm = flux2.vae.bn
    center = norm.running_mean.view(1, -1, 1, 1)
    spread = torch.sqrt(norm.running_var.view(1, -1, 1, 1) + flux2.vae.config.batch_norm_eps)
    clean = (patched(torch.stack(means)) - center) / spread
    noise = patched(batch.noise)
    scheduler = flux2.scheduler  # whose times fall
    timesteps = scheduler.timesteps[999 - batch.timesteps]
    sigmas = scheduler.sigmas[999 - batch.timesteps].view(-1, 1, 1, 1)
    noised = (1.0 - sigmas) * clean + sigmas * noise
    prompts = [run.subject.prompt] * 2 + [str(run.subject.class_prompt)] * 2
    with torch.no_grad():
        made = theirs(flux2.transformer, noised, timesteps, embed(flux2.family, flux2, prompts).text["states"])
    error = (made - (noise - clean)).square().flatten(1).mean(1)
    instance, prior = error[:2].mean(), error[2:].mean()
    ours = run.trainer.loss(batch).detach()
    assert [float(part) for part in (ours.instance, ours.prior, ours.total)] == pytest.approx(  # type: ignore[arg-type]
        [float(instance), float(prior), float(instance + 0.3 * prior)], rel=1e-5
    )


@pytest.fixture
def exported(flux2: PretrainedModel, tmp_path: Path) -> tuple[Run, Path]:
    run = train(flux2, tmp_path / "run", lora_alpha=8, model_name="duck", lora_targets="linear")
    folder = tmp_path / "model"
    folder.mkdir()
    run.trainable.export(folder, run.h, torch.float32)
    return run, folder


@pytest.mark.slow
def test_both_files_draw_in_diffusers_what_was_trained(
    exported: tuple[Run, Path], loaded_flux2: PretrainedModel
) -> None:
    """That of ComfyUI has the makers' names, with queries, keys and values as one."""
    run, folder = exported
    (trained,) = draw_latents(run.base.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    (before,) = draw_latents(loaded_flux2.pipeline(), SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
    assert not torch.allclose(trained, before, atol=1e-3)
    layers = {name.partition(".lora_")[0] for name in run.trainable.parameters}
    assert len(load_file(folder / FILE)) == 2 * len(layers)
    comfy = load_file(folder / "duck.safetensors")
    blocks = ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "txt_attn.qkv", "txt_attn.proj")
    names = {f"double_blocks.0.{block}" for block in (*blocks, "txt_mlp.0", "txt_mlp.2")}
    names |= {f"single_blocks.{number}.linear{layer}" for number in (0, 1) for layer in (1, 2)}
    assert {key.partition(".lora_")[0] for key in comfy} == {f"diffusion_model.{name}" for name in names}
    for name in (FILE, "duck.safetensors"):
        pipeline = quiet(copy.deepcopy(loaded_flux2).pipeline())
        pipeline.load_lora_weights(str(folder), weight_name=name)
        loaded = {key for key, _ in pipeline.transformer.named_parameters() if ".lora_" in key}
        assert len(loaded) == 2 * len(layers)
        (made,) = draw_latents(pipeline, SHORT, [1], size=(64, 64), steps=2, guidance=2.0)
        assert torch.allclose(made, trained, atol=1e-5), name
        assert len(read_adapter(folder / name).parts["transformer"]) == len(layers)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_the_transformer_alone_is_the_transformer(
    tiny_flux2: Path, loaded_flux2: PretrainedModel, tmp_path: Path, prefix: str
) -> None:
    """By its makers' names; halves of the last modulation change places, which diffusers' converter computes."""
    file = tmp_path / "klein-base.safetensors"
    made = flux2_original(loaded_flux2.transformer.state_dict())
    save_file({prefix + name: value.contiguous() for name, value in made.items()}, file)
    values = {"pretrained_model_name_or_path": str(file), "pretrained_parts_name_or_path": str(tiny_flux2)}
    assert find_family(str(file)) == "flux2"
    model = load_base(hyperparameters(**values, method="lora"))
    assert same(weights(model.transformer), weights(loaded_flux2.transformer))
    del made["final_layer.adaLN_modulation.1.weight"]
    save_file({prefix + name: value.contiguous() for name, value in made.items()}, file)
    with pytest.raises(UserError, match=r"transformer lacks norm_out\.linear\.weight"):
        load_base(hyperparameters(**values, method="lora"))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is True, and this project trains models with"),
        ("transformer", {"patch_size": 2}, "patch_size is 2"),
        ("vae", {"patch_size": [1, 1]}, "patch_size is"),
        ("vae", {"batch_norm_eps": None}, "batch_norm_eps is None"),
        ("scheduler", {"_class_name": "EulerDiscreteScheduler"}, "its scheduler is EulerDiscreteScheduler"),
        ("text_encoder", {"model_type": "llama"}, "is of a llama model; this project takes a Qwen3Model there"),
    ],
)
def test_damaged_directories_are_refused(
    tiny_flux2: Path, tmp_path: Path, part: str, change: dict[str, object], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_flux2, model)
    path = model / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_base(hyperparameters(pretrained_model_name_or_path=str(model), method="lora"))


@pytest.mark.slow
def test_a_directory_is_described_and_written_again(
    tiny_flux2: Path, loaded_flux2: PretrainedModel, tmp_path: Path
) -> None:
    assert describe(str(tiny_flux2))["base model"] == "FLUX.2 klein"
    convert(str(tiny_flux2), tmp_path / "model")
    for pipeline in (
        Flux2KleinPipeline.from_pretrained(tmp_path / "model"),
        load_base(hyperparameters(pretrained_model_name_or_path=str(tmp_path / "model"), method="lora")).pipeline(),
    ):
        ((made,),) = draw(pipeline, SHORT, [3], resolution=64, steps=1)
        ((expected,),) = draw(loaded_flux2.pipeline(), SHORT, [3], resolution=64, steps=1)
        assert np.abs(np.asarray(made, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2


def test_the_shift_is_that_of_drawing_unless_one_is_asked_for(flux2: PretrainedModel) -> None:
    def shift(**values: object) -> float:
        sigmas = flux2.family.objective(flux2, hyperparameters(**{**LORA, **values})).sigmas  # type: ignore[attr-defined]
        half = float(sigmas[499])
        return half / (1 - half)

    assert shift(time_shift=2.5) == pytest.approx(2.5)
    assert shift(resolution=1024) == pytest.approx(math.exp(compute_empirical_mu(64 * 64, 50)), rel=1e-4)
    assert shift(resolution=1024, time_shift="resolution") == shift(resolution=1024)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_text_encoder": True}, "its text encoder is a language model"),
        ({"mixed_precision": "fp16"}, "it was not tried in fp16"),
        ({"lora_targets": "all"}, "it has no convolutions"),
        ({"pretrained_model_name_or_path": f"{MAKERS}/FLUX.2-klein-4B"}, "distilled to draw in a few steps"),
        (
            {"pretrained_model_name_or_path": NINE},
            "the licence flux-non-commercial",
        ),
        (
            {"pretrained_model_name_or_path": "s3://models/FLUX.2-klein-base-9B/", "accept_license": "apache-2.0"},
            "set accept_license=flux-non-commercial if it allows yours",
        ),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(**values)


@pytest.mark.parametrize("folder", ["klein", "mine"])
def test_what_the_index_says_of_distillation_counts_before_the_name(
    flux2: PretrainedModel, tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / folder
    flux2.save(path)
    index = path / "model_index.json"
    h = parse(pretrained_model_name_or_path=str(path))
    assert load_base(h).family.facts.name == "flux2"
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    assert parse(pretrained_model_name_or_path=str(path), train_distilled=True).architecture == "flux2"
    with pytest.raises(UserError, match=r"is distilled to draw in a few steps.* set train_distilled=true"):
        parse(pretrained_model_name_or_path=str(path))
    with pytest.raises(UserError, match="is distilled to draw in a few steps"):  # as when it came from the hub
        load_base(h)
    monkeypatch.chdir(path)
    assert parse().architecture == "flux2"  # which names no other parts, nor what lies in the working directory


def test_a_licence_that_is_accepted_is_named_in_the_plan() -> None:
    h = parse(pretrained_model_name_or_path=NINE, accept_license="flux-non-commercial")
    assert any("accept_license=flux-non-commercial" in note for note in make_plan(h, CARDS["H100"]).notes)
    assert not any("license" in note for note in make_plan(parse(), CARDS["H100"]).notes)


def test_cards_without_bf16_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"T4 has no bf16, and FLUX\.2 .* it was not tried in fp16; use a card with bf16"
    ):
        make_plan(parse(), CARDS["T4"])
    assert make_plan(parse(), CARDS["L4"]).precision == "bf16"
