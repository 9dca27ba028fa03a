"""The DreamBooth loss: what the model should predict, and how the two halves of a batch are weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Loss(NamedTuple):
    """Scalars, float32: ``total`` is what is minimised; ``prior`` is None without prior preservation."""

    total: torch.Tensor
    instance: torch.Tensor
    prior: torch.Tensor | None

    def detach(self) -> Loss:
        return Loss(self.total.detach(), self.instance.detach(), None if self.prior is None else self.prior.detach())

    @staticmethod
    def mean(losses: Sequence[Loss]) -> Loss:
        """The mean of the batches that one optimizer step is made of."""
        totals, instances, priors = zip(*losses, strict=True)
        count = len(losses)
        return Loss(sum(totals) / count, sum(instances) / count, None if priors[0] is None else sum(priors) / count)


def prediction_target(
    prediction_type: str, latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """What the UNet has to predict, in the shape of ``latents``.

    Args:
        prediction_type: ``epsilon`` (Ho et al. 2020) or ``v_prediction`` (Salimans and Ho 2022).
        alphas_cumprod: ``(rows,)`` of the rows' time steps.

    Raises:
        ValueError: for another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal = alphas_cumprod.view(-1, 1, 1, 1)
        return signal.sqrt() * noise - (1 - signal).sqrt() * latents
    raise ValueError(f"prediction type {prediction_type!r} is neither epsilon nor v_prediction")


def add_noise(latents: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The noised latents of the rows' time steps; ``alphas_cumprod`` is ``(rows,)``."""
    signal = alphas_cumprod.view(-1, 1, 1, 1)
    return signal.sqrt() * latents + (1 - signal).sqrt() * noise


def min_snr_weights(prediction_type: str, alphas_cumprod: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-gamma weights ``(rows,)`` (Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting").

    Args:
        alphas_cumprod: ``(rows,)`` of the rows' time steps.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    divisor = snr + 1 if prediction_type == "v_prediction" else snr
    return snr.clamp(max=gamma) / divisor


def dreambooth_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    prior_loss_weight: float | None,
    element_weights: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
) -> Loss:
    """The instance loss plus the weighted prior-preservation loss (Ruiz et al. 2023, equation 2).

    Args:
        prediction, target: ``(rows, channels, height, width)``; with prior preservation the first half of the rows
            shows the subject and the second half the class.
        prior_loss_weight: None without prior preservation.
        element_weights: ``(rows, 1, height, width)``, of mean 1 in each row; None weighs all elements alike.
        row_weights: ``(rows,)``, one weight a row (min-SNR); None weighs all rows alike.
    """
    errors = (prediction.float() - target.float()).square()
    if element_weights is not None:
        errors = errors * element_weights
    rows = errors.mean(dim=(1, 2, 3))
    if row_weights is not None:
        rows = rows * row_weights
    if prior_loss_weight is None:
        loss = rows.mean()
        return Loss(loss, loss, None)
    instance, prior = (half.mean() for half in rows.chunk(2))
    return Loss(instance + prior_loss_weight * prior, instance, prior)
