"""What SDXL is told beside the prompt's states: pooled states, sizes and crops."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from dreambooth_sm.data.buckets import Shape
from dreambooth_sm.data.class_cache import pack
from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.data.conditioning import embed
from dreambooth_sm.data.pictures import View, crop, open_picture
from dreambooth_sm.data.training_set import PictureExtras, PromptTable
from dreambooth_sm.errors import StopRequested, UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.stored.tokenizer import bpe_tokenizer
from dreambooth_sm.training.checkpoint import latest_checkpoint
from tests.helpers.training import Run, cpu_plan, hyperparameters, make_set, paint_pictures, same, weights

XL = {"base_architecture": "sdxl"}
SDXL = FAMILIES["sdxl"]


def test_prompts_are_embedded_as_diffusers_does(xl_base: PretrainedModel) -> None:
    prompts = ["photo of zwx toy", "a toy, on the beach", "x" * 60]
    ours = embed(xl_base.family, xl_base, prompts)
    states, _, pooled, _ = xl_base.pipeline().encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.allclose(ours.text["states"], states, atol=1e-6)
    assert torch.allclose(ours.text["pooled"], pooled, atol=1e-6)
    assert ours.text["states"].shape == (3, 77, 192)
    assert not ours.text["states"].requires_grad


def test_long_prompts_have_the_states_of_all_chunks_and_the_first_pooled(xl_base: PretrainedModel) -> None:
    long, short = "toy " * 75 + "cat", "toy " * 75
    one, other = (embed(xl_base.family, xl_base, [prompt], max_tokens=150) for prompt in (long, short))
    assert one.text["states"].shape == (1, 154, 192)
    assert torch.allclose(one.text["pooled"], other.text["pooled"], atol=1e-5)


@pytest.mark.parametrize(("words", "pad", "length"), [(1, True, 77), (1, False, 3 + 2), (30, True, 2 * 77)])
def test_tokenizers_that_count_differently(words: int, pad: bool, length: int, xl_base: PretrainedModel) -> None:
    """The second one spells what is one token for the first one; prompts are as long as it needs."""
    xl_base.tokenizer_2 = bpe_tokenizer(["z z"])
    ours = embed(xl_base.family, xl_base, ["toy " * words], max_tokens=150, pad=pad)
    assert ours.text["states"].shape == (1, length, 192)
    with pytest.raises(UserError, match="has 90 tokens and max_token_length=75 allows 75"):
        embed(xl_base.family, xl_base, ["toy " * 30])


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_what_it_is_when_pictures_are_drawn(xl_base: PretrainedModel, zeros: bool) -> None:
    xl_base.config["force_zeros_for_empty_prompt"] = zeros
    table = PromptTable(xl_base.family, max_tokens=75, pad=True, shuffle=False, seed=0)
    rows = [table.rows("a toy"), table.rows("")]
    assert rows == [(0,), (1,)]
    ours = table.embeddings(xl_base)
    _, negative, _, negative_pooled = xl_base.pipeline().encode_prompt("a toy", do_classifier_free_guidance=True)
    assert torch.allclose(ours.text["states"][1:], negative, atol=1e-6)
    assert torch.allclose(ours.text["pooled"][1:], negative_pooled, atol=1e-6)
    assert bool(ours.text["states"][1].any()) != zeros


@pytest.mark.parametrize(
    ("size", "shape", "view", "expected"),
    [
        ((80, 64), (64, 64), View(), [64, 80, 0, 8, 64, 64]),
        ((80, 64), (64, 64), View(left=0.0), [64, 80, 0, 0, 64, 64]),
        ((80, 64), (64, 64), View(left=0.25), [64, 80, 0, 4, 64, 64]),
        ((80, 64), (64, 64), View(left=0.25, mirrored=True), [64, 80, 0, 12, 64, 64]),
        ((64, 160), (64, 64), View(top=1.0), [160, 64, 96, 0, 64, 64]),
        ((400, 100), (64, 64), View(left=1.0), [100, 400, 0, 192, 64, 64]),  # scaled to 256 x 64
        ((200, 100), (128, 64), View(left=0.3), [100, 200, 0, 0, 64, 128]),
        ((100, 50), (96, 32), View(top=0.5), [50, 100, 8, 0, 32, 96]),
    ],
)
def test_sizes(size: Shape, shape: Shape, view: View, expected: list[int], tmp_path: Path) -> None:
    (path,) = paint_pictures(tmp_path, 1, size=size)
    sizes = PictureExtras([path], [shape], [[view]], SDXL.extras)
    assert sizes._rows[0]["sizes"].tolist() == [expected]
    # The crop lies there in the scaled (and mirrored) picture.
    height, width, top, left, *_ = expected
    scale = max(shape[0] / width, shape[1] / height)
    whole = crop(open_picture(path), (round(width * scale), round(height * scale)), View(mirrored=view.mirrored))
    seen = crop(open_picture(path), shape, view)
    same_place = whole.crop((left, top, left + shape[0], top + shape[1]))
    different = sum(a != b for a, b in zip(seen.tobytes(), same_place.tobytes(), strict=True))
    assert different < 0.05 * len(seen.tobytes())


def test_a_generated_class_image_was_drawn_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "class.safetensors").write_bytes(pack(torch.zeros(4, 32, 48)))
    sizes = PictureExtras([tmp_path / "class.safetensors"], [(96, 64)], [[View()]], SDXL.extras)
    assert sizes._rows[0]["sizes"].tolist() == [[64, 96, 0, 0, 64, 96]]


@pytest.mark.slow
def test_each_row_of_a_batch_has_the_sizes_of_its_view(xl_base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(xl_base, tmp_path, center_crop=False, aspect_ratio_buckets=False, with_prior_preservation=True, **XL)
    seen = set()
    for number in range(8):
        batch = run.data.batch_sampler.batch(number, 2)
        numbers = run.data.extras(batch)["sizes"]
        assert numbers.shape == (4, 6)
        assert numbers[:, [0, 1, 2, 4, 5]].tolist() == [[64, 80, 0, 64, 64]] * 4
        seen |= set(numbers[:, 3].tolist())
    assert len(seen) > 3
    assert seen <= set(range(17))


def test_the_loss_depends_on_pooled_states_and_sizes(xl_base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(xl_base, tmp_path, **XL)
    batch = run.data.batch_sampler.batch(0, 1)
    before = run.trainer.loss(batch).total.item()
    run.data.prompts["pooled"].add_(1)
    pooled = run.trainer.loss(batch).total.item()
    run.data.prompts["pooled"].sub_(1)
    for row in run.data.extras._rows:
        row["sizes"].add_(500)
    sizes = run.trainer.loss(batch).total.item()
    assert len({before, pooled, sizes}) == 3


def test_a_captured_step_takes_over_all_of_a_batch(xl_base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(xl_base, tmp_path, **XL)
    first, second = (run.trainer._inputs(number) for number in range(2))
    mine = first.clone()
    assert mine.extras["sizes"] is not first.extras["sizes"]
    assert mine.weights is None
    second.extras["sizes"].add_(1)
    places = {name: value.data_ptr() for name, value in mine.extras.items()}
    mine.copy_(second)
    assert {name: value.data_ptr() for name, value in mine.extras.items()} == places
    assert torch.equal(mine.extras["sizes"], second.extras["sizes"])
    assert torch.equal(mine.noise, second.noise)
    assert not torch.equal(first.extras["sizes"], second.extras["sizes"])


@pytest.mark.slow
def test_the_text_encoders_and_the_vae_are_left_bitwise(xl_base: PretrainedModel, tmp_path: Path) -> None:
    run = Run(xl_base, tmp_path, use_ema=True, **XL).train()
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert same(weights(getattr(run.base, part)), weights(getattr(xl_base, part)))
    assert not same(weights(run.base.unet), weights(xl_base.unet))


@pytest.mark.slow
def test_resumed_training_is_bitwise_the_uninterrupted_one(xl_base: PretrainedModel, tmp_path: Path) -> None:
    values = {"with_prior_preservation": True, "use_ema": True, "center_crop": False, "max_train_steps": 5, **XL}
    whole = Run(xl_base, tmp_path / "whole", **values).train()
    stopped = Run(xl_base, tmp_path / "stopped", **values)
    with pytest.raises(StopRequested):
        stopped.train(stop_at=2)
    again = Run(xl_base, tmp_path / "stopped", **values)
    found = latest_checkpoint(tmp_path / "stopped" / "checkpoints", print)
    assert found is not None
    again.trainer.resume(found)
    again.train()
    assert stopped.losses + again.losses == whole.losses
    assert same(weights(again.base.unet), weights(whole.base.unet))


@pytest.mark.slow
def test_the_base_models_own_output_as_prior(xl_base: PretrainedModel, tmp_path: Path) -> None:
    """Its sizes and pooled states are those that training tells: before the first update nothing is to be corrected."""
    values = {"prior": "output", "class_prompt": "photo of a toy", "with_prior_preservation": True, **XL}
    values |= {"num_class_images": 2, "center_crop": False, "aspect_ratio_buckets": False}
    h = hyperparameters(**values)
    paths = tuple(paint_pictures(tmp_path / "instance", 3))
    subject = Subject(paths, "photo of zwx toy", "photo of a toy", tmp_path / "class", ())
    data = make_set(copy.deepcopy(xl_base), [subject], h, cpu_plan(h))
    assert set(data.extras._rows[-1]) == {"sizes"}
    run = Run(xl_base, tmp_path / "run", subject=subject, **values)
    for number in range(3):
        batch = run.data.batch_sampler.batch(number, 1)
        prior = run.trainer.loss(batch).detach().prior
        assert prior is not None
        assert float(prior) < 1e-6
    batches = (run.data.batch_sampler.batch(number, 1) for number in range(6))
    assert len({tuple(run.data.extras(batch)["sizes"][1].tolist()) for batch in batches}) > 1
