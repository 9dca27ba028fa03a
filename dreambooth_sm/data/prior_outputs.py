"""Prior preservation without class images: the base model's own output for the class prompt is what is kept.

Before training, the base model predicts noise for the class prompt on noised pictures of the subject, where it is
about to drift most. These predictions are kept and trained towards, instead of class images: one forward pass
each, where a class image takes some thirty, and no second model on the device ("Learning without Forgetting", Li and
Hoiem 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.data.training_set import Batch, BatchSampler
from dreambooth_sm.families import Conditioning, Family
from dreambooth_sm.objectives import Objective


@dataclass(frozen=True)
class Output:
    """A prediction of the base model, as the latents and the noise that make it the right answer.

    Attributes:
        instance, view: number of the picture that was noised, and of its view.
        latents, noise: ``(4, h, w)`` float32; noised by ``noise`` at ``timestep``, the latents are what the base model
            saw, and its prediction is what a model should say of them.
    """

    instance: int
    view: int
    latents: Tensor
    noise: Tensor
    timestep: int


@torch.no_grad()
def base_outputs(
    denoiser: Any,
    family: Family,
    objective: Objective,
    batch_sampler: BatchSampler,
    latents_of: Callable[[Batch], Tensor],
    conditions_of: Callable[[Batch], Conditioning],
    *,
    count: int,
    batch_size: int,
) -> Iterator[Output]:
    """The base model's outputs on noised instance pictures: ``count`` of them, or a few more.

    Args:
        denoiser: of the base model, on the device that it runs on.
        family, objective: the model's; the objective on the CPU.
        batch_sampler: draws instances alone.
        conditions_of: gives the embedded class prompts of a batch's pictures.
        batch_size: pictures at a time, at most.
    """
    instances = len(batch_sampler.instances)
    size = max(1, min(batch_size, count // instances))  # small enough that every shape has its turn
    for number in range(math.ceil(max(count, instances * size) / size)):
        batch = batch_sampler.batch(number, size)
        seen = objective.noised(latents_of(batch).cpu(), batch.noise, batch.timesteps)
        prediction = family.predict(
            denoiser,
            seen.to(denoiser.device, denoiser.dtype),
            objective.told(batch.timesteps).to(denoiser.device),
            conditions_of(batch).to(denoiser.device, denoiser.dtype),
        )
        latents, noise = objective.invert(seen, prediction.float().cpu(), batch.timesteps)
        numbers = (batch.pictures.tolist(), batch.views.tolist())
        for row in zip(*numbers, latents, noise, batch.timesteps.tolist(), strict=True):
            yield Output(*row)
