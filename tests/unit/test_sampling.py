"""Our sampling loop draws what the pipeline's own draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from dreambooth_sm.data.training_set import PromptTable
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.sampling import decode, draw, draw_latents

SIZE = (64, 64)


def drawn(base: PretrainedModel, seeds: list[int], **options: object) -> torch.Tensor:
    settings = {"size": SIZE, "batch_size": len(seeds), "steps": 6} | options
    return torch.cat(list(draw_latents(base.pipeline(), "a toy", seeds, **settings)))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("which", ["base", "xl_base"])
def test_the_same_as_the_pipelines_own_call(which: str, guidance: float, request: pytest.FixtureRequest) -> None:
    base: PretrainedModel = request.getfixturevalue(which)
    pipeline = base.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )
    expected: list[Image.Image] = pipeline(
        ["a toy"] * 2,
        height=64,
        width=64,
        num_inference_steps=6,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).images
    (ours,) = draw(base.pipeline(), "a toy", [3, 4], resolution=64, batch_size=2, steps=6, guidance=guidance)
    for mine, theirs in zip(ours, expected, strict=True):
        assert np.abs(np.asarray(mine).astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("which", ["base", "xl_base"])
def test_a_prompt_over_one_window_is_drawn_as_it_is_trained(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: PretrainedModel = request.getfixturevalue(which)
    forward, seen = type(base.unet).forward, []

    def watched(self: torch.nn.Module, *rest: object, **options: Any) -> object:
        seen.append(options["encoder_hidden_states"])
        return forward(self, *rest, **options)

    monkeypatch.setattr(type(base.unet), "forward", watched)
    table = PromptTable(base.family, max_tokens=225, pad=True, shuffle=False, seed=0)
    pictures = []
    for word in ("cat", "dog"):  # past the second window's start
        prompt = "toy " * 100 + word
        (row,) = table.rows(prompt)
        (picture,) = draw_latents(base.pipeline(), prompt, [1], size=SIZE, steps=1, guidance=2.0)
        empty, states = seen[-1]
        assert torch.allclose(states, table.embeddings(base).text["states"][row], atol=1e-5)
        assert states.shape == empty.shape == (154, states.shape[1])
        pictures.append(picture)
    assert not torch.allclose(*pictures, atol=1e-4)


@pytest.mark.slow
def test_guidance_acts_between_its_noise_levels_alone(base: PretrainedModel) -> None:
    guided, unguided = drawn(base, [1]), drawn(base, [1], guidance=1.0)
    nowhere = drawn(base, [1], guided=(0.0, 0.0))
    assert torch.allclose(nowhere, unguided, atol=1e-5)
    somewhere = drawn(base, [1], guided=(5.0, 0.3))
    assert not torch.allclose(somewhere, unguided, atol=1e-3)
    assert not torch.allclose(somewhere, guided, atol=1e-3)


@pytest.mark.slow
def test_a_picture_depends_on_its_own_seed_alone(base: PretrainedModel) -> None:
    together = drawn(base, [5, 6, 7])
    one_by_one = drawn(base, [5, 6, 7], batch_size=1)
    assert torch.allclose(together, one_by_one, atol=1e-4)
    assert torch.allclose(drawn(base, [6]), together[1:2], atol=1e-4)


@pytest.mark.slow
def test_width_and_height_are_what_was_asked_for(base: PretrainedModel) -> None:
    latents = drawn(base, [0], size=(96, 64))
    (picture,) = decode(base.pipeline(), latents)
    assert picture.size == (96, 64)


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [pytest.param(50, 16, [13, 13, 12, 12], marks=pytest.mark.slow), (5, 8, [5]), (4, 2, [2, 2])],
)
def test_batches_are_of_one_size_as_far_as_that_goes(
    count: int, batch_size: int, sizes: list[int], base: PretrainedModel
) -> None:
    batches = draw_latents(base.pipeline(), "a toy", range(count), size=SIZE, batch_size=batch_size, steps=1)
    assert [len(batch) for batch in batches] == sizes


@pytest.mark.slow
def test_a_picture_that_does_not_fit_is_decoded_in_tiles(
    base: PretrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for tiles of 256 pixels, and no more."""
    latents = drawn(base, [1], size=(288, 272), steps=1)
    (whole,) = decode(base.pipeline(), latents)
    decode_part = base.vae.decoder.forward

    def limited(part: torch.Tensor, *options: object) -> torch.Tensor:
        if max(part.shape[2:]) * base.latent_scale > 256:
            raise torch.OutOfMemoryError
        return decode_part(part, *options)

    monkeypatch.setattr(base.vae.decoder, "forward", limited)
    (tiled,) = decode(base.pipeline(), latents)
    assert tiled.size == whole.size == (288, 272)
    assert np.abs(np.asarray(tiled).astype(int) - np.asarray(whole)).mean() < 16


def test_a_batch_that_does_not_fit_is_halved(base: PretrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(base.unet).forward

    def small(self: torch.nn.Module, sample: torch.Tensor, *rest: object, **options: object) -> object:
        if len(sample) > 4:
            raise torch.OutOfMemoryError("too many")
        return forward(self, sample, *rest, **options)

    monkeypatch.setattr(type(base.unet), "forward", small)
    batches = list(draw_latents(base.pipeline(), "a toy", range(6), size=SIZE, batch_size=6, steps=1))
    assert [len(batch) for batch in batches] == [1] * 6
