"""The DreamBooth loss: how the two halves of a batch are weighted; and one that compares with the base model."""

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


def dreambooth_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    prior_loss_weight: float | None,
    element_weights: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    huber_delta: float | None = None,
) -> Loss:
    """The instance loss plus the weighted prior-preservation loss (Ruiz et al. 2023, equation 2).

    Args:
        prediction, target: ``(rows, channels, height, width)``; with prior preservation the first half of the rows
            shows the subject and the second half the class.
        prior_loss_weight: None without prior preservation.
        element_weights: ``(rows, 1, height, width)``, of mean 1 in each row; None weighs all elements alike.
        row_weights: ``(rows,)``, one weight a row (min-SNR); None weighs all rows alike.
        huber_delta: of the pseudo-Huber loss (Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption
            Resistance using Scheduled Pseudo-Huber Loss", without its schedule), which is the square for errors far
            below it; None takes the square of all.
    """
    rows = _errors_of_rows(prediction, target, element_weights, row_weights, huber_delta)
    if prior_loss_weight is None:
        loss = rows.mean()
        return Loss(loss, loss, None)
    instance, prior = (half.mean() for half in rows.chunk(2))
    return Loss(instance + prior_loss_weight * prior, instance, prior)


def consistency_loss(
    prediction: torch.Tensor,
    of_base: torch.Tensor,
    target: torch.Tensor,
    *,
    beta: float,
    element_weights: torch.Tensor | None = None,
    row_weights: torch.Tensor | None = None,
    huber_delta: float | None = None,
) -> Loss:
    """How much less a row's error is than the base model's, with diminishing returns (Lee et al. 2024, "Direct
    Consistency Optimization for Robust Customization of Text-to-Image Diffusion Models").

    The logistic loss of ``beta`` times the difference of both errors, which are means over a row: ``log 2`` where the
    model is the base.

    Args:
        prediction, of_base, target: ``(rows, channels, height, width)``.
        beta: a smaller one lets the model go farther from the base.
        element_weights, row_weights, huber_delta: of both errors, as in :func:`dreambooth_loss`.
    """
    ours, theirs = (
        _errors_of_rows(said, target, element_weights, row_weights, huber_delta) for said in (prediction, of_base)
    )
    loss = torch.nn.functional.softplus(beta * (ours - theirs)).mean()
    return Loss(loss, loss, None)


def _errors_of_rows(
    prediction: torch.Tensor,
    target: torch.Tensor,
    element_weights: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    huber_delta: float | None,
) -> torch.Tensor:
    """``(rows,)``, float32."""
    errors = (prediction.float() - target.float()).square()
    if huber_delta is not None:
        errors = 2 * huber_delta * ((errors + huber_delta**2).sqrt() - huber_delta)
    if element_weights is not None:
        errors = errors * element_weights
    rows = errors.mean(dim=(1, 2, 3))
    return rows if row_weights is None else rows * row_weights
