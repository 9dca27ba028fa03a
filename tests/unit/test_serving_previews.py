"""What is shown of a picture while it is drawn: where the denoiser's answers lead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler

from dreambooth_sm.families import FAMILIES, Conditioning
from dreambooth_sm.serving.runs import PictureRun
from dreambooth_sm.stored.schedulers import BY_NAME, scheduler_by_name

STEPS, SHAPE = 6, (4, 8, 8)


def steps_of(family: str, scheduler: Any, answer: Any) -> list[torch.Tensor]:
    """Previews after each step of a denoiser that gives these answers, and the latents that were drawn."""
    run = PictureRun(
        FAMILIES[family],
        scheduler,
        Conditioning({"states": torch.zeros(1, 3, 4)}),
        seed=1,
        guidance=1.0,
        shape=SHAPE,
        device=torch.device("cpu"),
    )
    shown = []
    while not run.is_done:
        seen = run.noised()
        run.take(answer(seen, run))
        shown.append(run.preview())
    return [*shown, run.latents]


def clean_latents() -> torch.Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["model", *BY_NAME])
def test_a_denoiser_that_knows_the_picture_shows_it_from_the_first_step(name: str, prediction: str) -> None:
    own = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler = scheduler_by_name(own, name)
    scheduler.set_timesteps(STEPS)
    clean, times = clean_latents(), iter(scheduler.timesteps.tolist())

    def answer(seen: torch.Tensor, run: PictureRun) -> torch.Tensor:
        sigma = float(np.interp(next(times), np.arange(1000), (1 / own.alphas_cumprod - 1).sqrt()))
        left = torch.tensor(1 / (1 + sigma**2))
        noise = (seen - left.sqrt() * clean) / (1 - left).sqrt()
        return noise if prediction == "epsilon" else left.sqrt() * noise - (1 - left).sqrt() * clean

    *shown, _ = steps_of("sd", scheduler, answer)
    assert all((each - clean).abs().max() < 1e-3 for each in shown)


def test_flows_show_where_they_lead() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    clean, sigmas = clean_latents(), iter([*scheduler.sigmas])
    *shown, drawn = steps_of("z_image", scheduler, lambda seen, run: (seen - clean) / next(sigmas))
    assert len(shown) == STEPS
    assert all(torch.allclose(each, clean, atol=1e-5) for each in shown)
    assert torch.allclose(drawn, clean, atol=1e-5)
