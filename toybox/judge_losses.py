"""The losses that the judge learns by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def label_loss(logits: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The sum over the heads of their mean cross entropies.

    Args:
        labels: ``(pictures, heads)``, heads in the order of ``logits``; -1 where a head does not apply.
    """
    losses = []
    for scores, wanted in zip(logits.values(), labels.unbind(1), strict=True):
        total = F.cross_entropy(scores, wanted, ignore_index=-1, reduction="sum")
        losses.append(total / (wanted >= 0).sum().clamp(min=1))
    return torch.stack(losses).sum()


def identity_loss(embeddings: Tensor, individuals: Tensor, temperature: float = 0.1) -> Tensor:
    """Pictures of one toy attract each other, those of different toys repel (Khosla et al. 2020, equation 2).

    Args:
        embeddings: ``(pictures, width)`` of length 1.
        individuals: ``(pictures,)``, a number for each toy; every toy has to be in two pictures or more.
    """
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    others_of_it = (individuals[:, None] == individuals) & ~itself
    similarity = embeddings @ embeddings.T / temperature
    log_shares = similarity.masked_fill(itself, -torch.inf).log_softmax(1)
    return -(log_shares.masked_fill(~others_of_it, 0).sum(1) / others_of_it.sum(1)).mean()
