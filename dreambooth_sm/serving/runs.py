"""One picture on its way from noise: its own scheduler, seed, guidance and step, whatever else is drawn beside it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.families import Conditioning, Family
from dreambooth_sm.objectives import Diffusion
from dreambooth_sm.serving.bank import AdapterUse


class PictureRun:
    """A picture while it is drawn.

    Args:
        family: of the model that draws it.
        scheduler: of diffusers, before its first step; the picture's own.
        conditioning: of the prompt, in the last row; with classifier-free guidance, of the negative prompt in the row
            before it.
        shape: of its latents, ``(channels, height, width)``.
        adapters: that draw it.

    Attributes:
        latents: float32 ``(1, channels, height, width)``.
        rows: what the denoiser is asked of it in a step: 2 with classifier-free guidance.
    """

    def __init__(
        self,
        family: Family,
        scheduler: Any,
        conditioning: Conditioning,
        *,
        seed: int,
        guidance: float,
        shape: tuple[int, int, int],
        device: torch.device,
        adapters: tuple[AdapterUse, ...] = (),
    ) -> None:
        self._family, self._scheduler, self._guidance = family, scheduler, guidance
        self.conditioning, self.adapters = conditioning, adapters
        self._times = list(scheduler.timesteps)
        self._position = 0
        self._answer: tuple[Tensor, Tensor] | None = None
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, *shape), generator=generator).to(device)
        self.latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        # Some schedulers add noise at each step, which follows from the same seed.
        takes = inspect.signature(scheduler.step).parameters
        self._noise = {"generator": generator} if "generator" in takes else {}
        self._scales = hasattr(scheduler, "scale_model_input")

    @property
    def rows(self) -> int:
        return len(self.conditioning)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Runs of one kind can be asked of the denoiser in one batch."""
        parts = (self.conditioning.text, self.conditioning.extras)
        named = [(name, value.shape[1:], value.dtype) for part in parts for name, value in part.items()]
        return (self.latents.shape[1:], *named)

    @property
    def is_done(self) -> bool:
        return self._position == len(self._times)

    @property
    def taken(self) -> tuple[int, int]:
        """Steps that were taken, and of how many."""
        return self._position, len(self._times)

    def preview(self) -> Tensor:
        """What it is about to look like, after a step: the clean latents that the denoiser's last answer points to."""
        assert self._answer is not None
        position, (seen, predicted) = self._position - 1, self._answer
        if self._family.facts.matches_flow:
            clean: Tensor = seen - self._scheduler.sigmas[position].to(seen.device) * predicted
            return clean
        trained = Diffusion.of(self._scheduler)
        between = replace(
            trained, alphas_cumprod=_share_left(trained.alphas_cumprod, float(self._times[position]))[None]
        )
        first = torch.zeros(1, dtype=torch.long, device=seen.device)
        return between.to(seen.device).invert(seen, predicted, first)[0]

    @property
    def time(self) -> Tensor:
        """Of the step that comes next, float32 ``(rows,)``."""
        time: Tensor = self._times[self._position].to(self.latents.device, torch.float32)
        return time.expand(self.rows)

    def noised(self) -> Tensor:
        """What the denoiser is shown, ``(rows, channels, height, width)``."""
        latents = torch.cat([self.latents] * self.rows)
        if self._scales:
            latents = self._scheduler.scale_model_input(latents, self._times[self._position])
        self._seen = latents[:1]
        return latents

    def take(self, predicted: Tensor) -> None:
        """Takes a step.

        Args:
            predicted: the denoiser's answer, float32 ``(rows, channels, height, width)``.
        """
        if self.rows == 2:
            without, asked = predicted.chunk(2)
            predicted = self._family.guide(asked, without, self._guidance)
        self._answer = self._seen, predicted
        time = self._times[self._position]
        self.latents = self._scheduler.step(predicted, time, self.latents, return_dict=False, **self._noise)[0]
        self._position += 1


def _share_left(alphas_cumprod: Tensor, time: float) -> Tensor:
    """The share of a picture that is left at a time, which may lie between two that the model was trained with."""
    sigmas = (1 / alphas_cumprod - 1).sqrt()
    before = min(int(time), len(sigmas) - 1)
    sigma = sigmas[before].lerp(sigmas[min(before + 1, len(sigmas) - 1)], time - before)
    return 1 / (1 + sigma**2)
