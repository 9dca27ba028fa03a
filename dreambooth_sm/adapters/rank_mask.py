"""Masks of the activations between LoRA's two matrices, for training alone: dropout, and ranks by time.

They are functions of a row's own noise and time, and of a layer's name: with no random state, a resumed job, a replayed
graph and a recomputed forward pass mask what the first one did.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_BITS = 0xFFFFFFFF  # of 32-bit numbers, in tensors of 64


@dataclass
class TrainedRows:
    """The rows that are trained on now.

    Attributes:
        noise: ``(rows, channels, height, width)`` float32.
        times: int64 ``(rows,)``, below ``count``.
    """

    noise: Tensor | None = None
    times: Tensor | None = None
    count: int = 1


@dataclass(frozen=True)
class RankMask:
    """The mask of one layer.

    Attributes:
        key: a 32-bit number of the layer's own.
        dropout: the share of values that are 0; the others are scaled, so that their mean stays.
        least: ranks that rows of the last time have, and rows of earlier times as many more as there are times left
            (T-LoRA, arXiv 2507.05964); None: all rows have all.
    """

    key: int
    dropout: float = 0.0
    least: int | None = None
    rows: TrainedRows = field(default_factory=TrainedRows)

    def __call__(self, shape: torch.Size, dtype: torch.dtype, dim: int) -> Tensor | None:
        """What activations of a shape are multiplied by, of that shape or one that spreads to it; None outside of
        training.

        Args:
            shape: of as many entries a row as there are, in the order of the rows.
            dim: where the ranks are.
        """
        if not torch.is_grad_enabled() or self.rows.noise is None:  # pictures are drawn and measured with all there is
            return None
        masks = []
        if self.dropout:
            masks.append(self._kept(shape).to(dtype) / (1 - self.dropout))
        if self.least is not None:
            masks.append(self._used(shape, dim).to(dtype))
        return masks[0] if len(masks) == 1 else masks[0] * masks[1]

    def _kept(self, shape: torch.Size) -> Tensor:
        assert self.rows.noise is not None
        own = self.rows.noise.flatten(1)[:, 0].contiguous().view(torch.int32).long() & _BITS
        numbers = torch.arange(shape.numel() // len(own), device=own.device)
        found = _scatter((_scatter(own ^ self.key)[:, None] + numbers) & _BITS)
        return (found >= int(self.dropout * 2**32)).view(shape)

    def _used(self, shape: torch.Size, dim: int) -> Tensor:
        assert self.rows.times is not None
        assert self.least is not None
        count, ranks = self.rows.count, shape[dim]
        used = (count - self.rows.times) * (ranks - self.least) // count + self.least
        mask = torch.arange(ranks, device=used.device) < used[:, None]
        return mask.view(len(used), *(ranks if each == dim % len(shape) else 1 for each in range(1, len(shape))))


def _scatter(numbers: Tensor) -> Tensor:
    """Maps 32-bit numbers to others, one to one and with no order left: multiplications and shifted bits."""
    numbers = (numbers ^ (numbers >> 16)) * 0x7FEB352D & _BITS
    numbers = (numbers ^ (numbers >> 15)) * 0x846CA68B & _BITS
    return numbers ^ (numbers >> 16)
