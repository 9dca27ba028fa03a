"""How the toybox pipeline and its judge are made, in miniature."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth_sm.data.prompts import encode, tokenize
from dreambooth_sm.models import load_base
from dreambooth_sm.toybox.judge import Judge, as_input, load_judge
from dreambooth_sm.toybox.labels import LABELS
from tests.helpers.training import hyperparameters
from toybox import flow_networks, networks, toys, train, train_flow, vae
from toybox.judge_losses import identity_loss, label_loss
from toybox.optimise import Outcome, train_for
from toybox.photos import Photos, paint_photos
from toybox.timetable import Timetable

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the whole command makes in one step a stage."""
    out = tmp_path_factory.mktemp("toybox")
    settings = train.Settings(minutes=0, pictures=12, held_out=4, drawn=2, vae_batch=2, unet_batch=2, judge_batch=8)
    train.make_all(out, settings, torch.device("cpu"))
    return out


@pytest.fixture(scope="module")
def photos() -> Photos:
    return paint_photos(24, "photos")


@pytest.fixture(scope="module")
def captions() -> list[str]:
    rng = random.Random(1)
    return [toys.caption(toys.random_scene(rng), rng) for _ in range(3000)]


@pytest.mark.slow
def test_the_command_makes_all_files(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        "base",
        "figures.json",
        "judge.safetensors",
        "sheet.png",
        "sheet.txt",
    }
    figures = json.loads((made / "figures.json").read_text())
    assert {"vae", "unet", "judge", "read"} <= figures.keys()
    assert figures["vae"]["psnr_db"] > 3
    assert figures["read"]["drawn"].keys() == {"kind", "colour", "background", "all"}
    assert len((made / "sheet.txt").read_text().splitlines()) == 2


@pytest.mark.slow
def test_files_are_small_enough_to_be_shipped(made: Path) -> None:
    assert sum(path.stat().st_size for path in (made / "base").rglob("*") if path.is_file()) <= 14 * MEGABYTE
    assert (made / "judge.safetensors").stat().st_size <= 2 * MEGABYTE


@pytest.mark.slow
def test_the_pipeline_loads_and_draws(made: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(made / "base", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("a photo of a red cat toy", num_inference_steps=2).images
    assert picture.size == (128, 128)


@pytest.mark.slow
def test_the_pipeline_is_a_base_model_that_jobs_take(made: Path) -> None:
    base = load_base(hyperparameters(pretrained_model_name_or_path=str(made / "base")))
    assert base.latent_scale == 8
    assert base.scheduler.config.prediction_type == "epsilon"
    ids = tokenize(base.tokenizer, ["photo of zwx toy", "toy"])
    assert ids.shape == (2, 1, networks.PROMPT_LENGTH)
    assert encode(base.text_encoder, ids).shape == (2, networks.PROMPT_LENGTH, base.unet.config.cross_attention_dim)


@pytest.mark.slow
def test_words_of_captions_are_one_token_and_fit(captions: list[str]) -> None:
    tokenizer = networks.make_tokenizer(captions)
    for caption in captions[:500]:
        words = caption.replace(",", " ,").split()
        assert len(tokenizer(caption, add_special_tokens=False).input_ids) == len(words)
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= networks.PROMPT_LENGTH


@pytest.mark.parametrize("text", ["zwx", "ünïcode", "漢字", "🐱", "o'clock 42!"])
def test_any_text_can_be_spelled(captions: list[str], text: str) -> None:
    tokenizer = networks.make_tokenizer(captions)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize("make", [networks.make_vae, flow_networks.make_flow_vae])
def test_normalised_latents_leave_pictures_as_they_are(photos: Photos, make: Callable[[], AutoencoderKL]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    pictures = as_input(photos.pixels[:4])
    with torch.no_grad():
        before = model.encode(pictures).latent_dist
        reconstruction = model.decode(before.mean).sample
        networks.normalise_latents(model, before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3)))
        after = model.encode(pictures).latent_dist
        assert torch.allclose(model.decode(after.mean).sample, reconstruction, atol=1e-3)
    scaled = vae.encode_latents(model, photos.pixels[:4]).chunk(2, dim=1)[0]
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(scaled.shape[1]), atol=1e-4)
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(scaled.shape[1]), atol=1e-4)
    relative = [code.std / code.mean.std((0, 2, 3), keepdim=True) for code in (before, after)]
    assert torch.allclose(*relative, rtol=1e-2)


def test_two_photos_after_another_show_one_toy(photos: Photos) -> None:
    assert photos.pixels.shape == (24, 128, 128, 3)
    assert photos.individuals.tolist()[::2] == photos.individuals.tolist()[1::2]
    looks = photos.labels[:, [number for number, head in enumerate(LABELS) if head != "background"]]
    assert torch.equal(looks[::2], looks[1::2])
    assert {len(captions) for captions in photos.captions} == {4}
    assert torch.equal(paint_photos(24, "photos").pixels, photos.pixels)


def test_joined_photos_share_no_toy(photos: Photos) -> None:
    both = photos.and_also(photos)
    assert len(both) == 48
    assert not set(both.individuals[:24].tolist()) & set(both.individuals[24:].tolist())


def test_the_judge_embeds_unit_vectors_and_reads_labels(tmp_path: Path) -> None:
    train.save_judge(Judge(), tmp_path / "judge.safetensors")
    judge = load_judge(tmp_path / "judge.safetensors")
    pictures = [Image.new("RGB", (128, 128), "red"), Image.new("RGBA", (64, 96), "blue")]
    embeddings = judge.embed(pictures)
    assert embeddings.dtype == torch.float32
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(2))
    for answer in judge.read(pictures):
        assert all(answer[head] in names for head, names in LABELS.items())
    assert judge.embed([]).shape == (0, 128)
    assert judge.read([]) == []


def test_heads_that_do_not_apply_cost_nothing() -> None:
    logits = {"kind": torch.zeros(2, 4), "hat": torch.zeros(2, 3)}
    loss = label_loss(logits, torch.tensor([[0, -1], [1, -1]]))
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_identity_loss_wants_one_place_for_each_toy() -> None:
    individuals = torch.tensor([0, 0, 1, 1])
    apart = torch.eye(2)[individuals]
    mixed = torch.eye(2)[torch.tensor([0, 1, 0, 1])]
    assert identity_loss(apart, individuals) < 0.01 < identity_loss(mixed, individuals)


@pytest.mark.slow
def test_training_lowers_the_loss_and_keeps_an_average() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)
    wanted = torch.tensor([1.0, -2.0, 0.5])

    def loss() -> torch.Tensor:
        inputs = torch.randn(16, 3)
        return (module(inputs)[:, 0] - inputs @ wanted).square().mean()

    first = loss().item()
    outcome = train_for(1.0, [module], loss, name="line", rows=16, rate=0.05)
    assert outcome.steps > 20
    assert outcome.loss < first / 10
    assert torch.allclose(module.weight[0], wanted, atol=0.3)
    assert not module.training
    assert not module.weight.requires_grad


class _HostWatch(TorchDispatchMode):
    """Collects operations that would break the capture of a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        if any(isinstance(tensor, torch.Tensor) and not tensor.is_meta for tensor in tensors):
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _train_vae() -> None:
    vae.train_vae(networks.make_vae().to("meta"), _meta(8, 128, 128, 3, dtype=torch.uint8), 1, 4)


def _train_unet() -> None:
    tokenizer = networks.make_tokenizer(["a toy"])
    parts = networks.make_vae(), networks.make_unet(), networks.make_text_encoder(tokenizer), tokenizer
    pipeline = networks.make_pipeline(*parts)
    pipeline.unet.to("meta")
    pipeline.text_encoder.to("meta")
    train.train_unet(pipeline, _meta(8, 8, 16, 16), [["a toy"] * 4] * 8, Timetable(1, train.SHARES), 4)


def _train_judge() -> None:
    heads = len(LABELS)
    numbers = _meta(8, heads, dtype=torch.int64), _meta(8, dtype=torch.int64)
    pixels = _meta(8, 128, 128, 3, dtype=torch.uint8)
    train.train_judge(Judge().to("meta"), Photos(pixels, *numbers, []), pixels, Timetable(1, train.SHARES), 4)


def _train_flow_vae() -> None:
    model, pixels = flow_networks.make_flow_vae().to("meta"), _meta(8, 128, 128, 3, dtype=torch.uint8)
    vae.train_vae(model, pixels, 1, 4, halved_weight=0.25)


def _train_denoiser() -> None:
    tokenizer = flow_networks.make_tokenizer(["a toy"])
    pipeline = flow_networks.make_pipeline(flow_networks.make_flow_vae(), tokenizer).to("meta")
    timetable = Timetable(1, train_flow.FLOW_SHARES)
    train_flow.train_denoiser(pipeline, _meta(8, 32, 16, 16), [["a toy"] * 4] * 8, timetable, 4, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [_train_vae, _train_unet, _train_judge, _train_flow_vae, _train_denoiser])
def test_a_step_never_waits_for_the_device(stage: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    class WatchedError(Exception):
        pass

    def watch(seconds: float, modules: Any, loss: Callable[[], torch.Tensor], **_: Any) -> Outcome:
        for module in modules:
            module.to(torch.bfloat16)
        loss()  # what is made once is there when a step is captured
        weights = itertools.chain(*(module.parameters() for module in modules))
        with _HostWatch() as host:
            value = loss()
            # On the meta device `item()` and the like raise by themselves.
            torch.autograd.grad(value, [weight for weight in weights if weight.requires_grad])
        assert host.found == set()
        assert (value.dtype, value.shape) == (torch.float32, ())
        raise WatchedError

    for module in (train, train_flow, vae):
        monkeypatch.setattr(module, "train_for", watch)
    with pytest.raises(WatchedError):
        stage()
