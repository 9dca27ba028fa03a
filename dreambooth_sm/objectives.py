"""Objectives: what a denoiser is shown and what it has to answer, one class for each way of noising.

An objective knows times, noise and targets, and nothing of models, prompts or devices but where its own tensors lie.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dreambooth_sm.stored.schedulers import training_scheduler

# Stable Diffusion's least signal-to-noise ratio is 0.005; below this one 1 / sqrt(SNR) would grow without bounds.
_LEAST_SNR = 1e-3


class Objective(Protocol):
    """Latents, noise and predictions are ``(rows, channels, height, width)``; times are int64 ``(rows,)``.

    Attributes:
        times: how many there are; a row's time is below.
    """

    @property
    def times(self) -> int: ...

    def to(self, device: torch.device) -> Objective:
        """Itself, with its tensors on a device."""

    def told(self, times: Tensor) -> Tensor:
        """What denoisers are told of times, ``(rows,)``."""

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Makes what the denoiser is shown."""

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Makes what the denoiser has to predict."""

    def row_weights(self, times: Tensor) -> Tensor | None:
        """Weighs each row in the loss, ``(rows,)``; None where all weigh the same."""

    def invert(self, seen: Tensor, prediction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the noise for which :meth:`noised` gives ``seen`` and :meth:`target` ``prediction``."""


@dataclass(frozen=True)
class Diffusion:
    """Noise over the steps of a schedule (Ho et al. 2020, "Denoising Diffusion Probabilistic Models").

    Attributes:
        prediction_type: ``epsilon`` (Ho et al. 2020) or ``v_prediction`` (Salimans and Ho 2022, "Progressive
            Distillation for Fast Sampling of Diffusion Models").
        alphas_cumprod: float32 ``(times,)``, the share of the picture that each time leaves.
        snr_gamma: of min-SNR weights (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting").
        debiased: weighs predicted noise by 1 / sqrt(SNR), and v so that it comes to the same (Yu et al. 2023, "Debias
            the Training of Diffusion Models"). Without either, all times weigh the same.

    Raises:
        ValueError: for another prediction type.
    """

    prediction_type: str
    alphas_cumprod: Tensor
    snr_gamma: float | None = None
    debiased: bool = False

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {self.prediction_type!r} is neither epsilon nor v_prediction")

    @classmethod
    def of(cls, scheduler: Any, snr_gamma: float | None = None, debiased: bool = False) -> Diffusion:
        """As a model was trained whose scheduler this is, whatever it draws with."""
        trained: Any = training_scheduler(scheduler)
        return cls(trained.config.prediction_type, trained.alphas_cumprod, snr_gamma, debiased)

    @property
    def times(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> Diffusion:
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def told(self, times: Tensor) -> Tensor:
        return times

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        signal = self._signal(times)
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        signal = self._signal(times)
        return signal.sqrt() * noise - (1 - signal).sqrt() * latents

    def row_weights(self, times: Tensor) -> Tensor | None:
        if self.snr_gamma is None and not self.debiased:
            return None
        signal = self.alphas_cumprod[times]
        snr = signal / (1 - signal)
        if self.debiased:
            # An error of v is one of the noise over the signal's root.
            v = self.prediction_type == "v_prediction"
            return snr.sqrt() / (snr + 1) if v else snr.clamp(min=_LEAST_SNR).rsqrt()
        divisor = snr + 1 if self.prediction_type == "v_prediction" else snr
        # 0 / 0 where nothing of the picture is left, to predict noise from noise.
        return (snr.clamp(max=self.snr_gamma) / divisor).nan_to_num(nan=1.0)

    def invert(self, seen: Tensor, prediction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        # A last time that leaves nothing of the picture leaves a trace here, as in diffusers' samplers.
        signal = self._signal(times).clamp(min=2**-24)
        if self.prediction_type == "v_prediction":
            return (
                signal.sqrt() * seen - (1 - signal).sqrt() * prediction,
                (1 - signal).sqrt() * seen + signal.sqrt() * prediction,
            )
        return (seen - (1 - signal).sqrt() * prediction) / signal.sqrt(), prediction

    def _signal(self, times: Tensor) -> Tensor:
        return self.alphas_cumprod[times].view(-1, 1, 1, 1)


@dataclass(frozen=True)
class FlowMatching:
    """Straight ways between pictures and noise (Lipman et al. 2022, "Flow Matching for Generative Modeling"; Liu et al.
    2022, "Flow Straight and Fast").

    A time is a quantile: each is drawn as often as another, and ``sigmas`` say how they are spread.

    Attributes:
        sigmas: float32 ``(times,)``, the share of noise at each time, rising.
    """

    sigmas: Tensor

    @classmethod
    def of(cls, shift: float, sampling: str, times: int) -> FlowMatching:
        """With times of which a share is drawn above and below any sigma.

        Args:
            shift: more than 1 shows noisy pictures more often; 1 leaves them as ``sampling`` has them.
            sampling: ``uniform``, or ``logit_normal`` (Esser et al. 2024, "Scaling Rectified Flow Transformers for
                High-Resolution Image Synthesis").
        """
        if sampling == "uniform":
            sigmas = torch.arange(1, times + 1, dtype=torch.float32) / times
        else:
            middles = (torch.arange(times, dtype=torch.float64) + 0.5) / times
            sigmas = torch.special.ndtri(middles).sigmoid().float()
        return cls(shift * sigmas / (1 + (shift - 1) * sigmas))

    @property
    def times(self) -> int:
        return len(self.sigmas)

    def to(self, device: torch.device) -> FlowMatching:
        return replace(self, sigmas=self.sigmas.to(device))

    def told(self, times: Tensor) -> Tensor:
        """Sigmas from 0 to the number of times, as schedulers of diffusers have them."""
        return self.sigmas[times] * self.times

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        sigma = self._sigma(times)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - latents

    def row_weights(self, times: Tensor) -> Tensor | None:
        return None

    def invert(self, seen: Tensor, prediction: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(times)
        return seen - sigma * prediction, seen + (1 - sigma) * prediction

    def _sigma(self, times: Tensor) -> Tensor:
        return self.sigmas[times].view(-1, 1, 1, 1)
