"""Adapters of many subjects beside the layers of one model: a bank of slots for each layer, and a slot for each row.

The matrices of a slot are padded with zeros to the largest rank, so that all rows of a batch are one product, whatever
adapter draws each (after Sheng et al. 2023, "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", for language
models). Slot 0 holds zeros: of rows without an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreambooth_sm.adapters.layers import LowRank


@dataclass(frozen=True)
class AdapterUse:
    """An adapter of a picture.

    Attributes:
        slot: that it lies in.
        strength: 1 is all of what was trained.
    """

    slot: int
    strength: float


class BatchRows:
    """Which adapters draw which row of the batch that is computed now; shared by all layers.

    Attributes:
        slots: int64 ``(adapters of a row, rows)``, or one column for all rows; None: no row has an adapter.
        strengths: float32, of the same shape.
    """

    slots: Tensor | None = None
    strengths: Tensor | None = None

    def __deepcopy__(self, memo: object) -> BatchRows:
        return self  # a copy of a module computes the same batch

    def set(self, uses: Sequence[Sequence[AdapterUse]], device: torch.device) -> None:
        """Says which adapters each row has."""
        slots, strengths = slot_tensors(uses)
        self.slots = slots if slots is None else slots.to(device)
        self.strengths = strengths if strengths is None else strengths.to(device)


def slot_tensors(uses: Sequence[Sequence[AdapterUse]]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Slots and strengths of rows, as :class:`BatchRows` has them; Nones where no row has an adapter."""
    most = max(map(len, uses), default=0)
    if not most:
        return None, None
    none = AdapterUse(0, 0.0)
    filled = [[*each, *[none] * (most - len(each))] for each in uses]
    slots = torch.tensor([[use.slot for use in each] for each in filled]).T
    return slots, torch.tensor([[use.strength for use in each] for each in filled]).T


class SlotBank:
    """The slots of one layer.

    Args:
        layer: that they lie beside: linear, or a convolution of one group.
        count: slots beside slot 0.
        rank: of all slots.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, count: int, rank: int) -> None:
        weight = layer.weight
        self.down = weight.new_zeros(count + 1, rank, *weight.shape[1:])
        self.up = weight.new_zeros(count + 1, weight.shape[0], rank)

    def __deepcopy__(self, memo: object) -> SlotBank:
        return self  # a copy of a module draws with the same adapters

    def grow(self, rank: int) -> None:
        """Takes adapters of a higher rank from now on."""
        more = rank - self.down.shape[1]
        self.down = F.pad(self.down, [*[0, 0] * (self.down.dim() - 2), 0, more])
        self.up = F.pad(self.up, [0, more])

    def put(self, slot: int, layer: LowRank | None) -> None:
        """Fills a slot; with zeros where the adapter leaves the layer as it is."""
        self.down[slot], self.up[slot] = 0, 0
        if layer is not None:
            folded = layer.folded()
            self.down[slot, : layer.rank] = folded.down.to(self.down).reshape(layer.rank, *self.down.shape[2:])
            self.up[slot, :, : layer.rank] = folded.up.to(self.up).flatten(1)


class BankedLayer(nn.Module):
    """A layer with the slots beside it."""

    def __init__(self, base: nn.Linear | nn.Conv2d, bank: SlotBank, rows: BatchRows) -> None:
        super().__init__()
        self.base, self.bank, self._rows = base, bank, rows

    @property
    def weight(self) -> Tensor:
        """Of the layer itself."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the layer itself."""
        return self.base.bias

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.base(states)
        rows = self._rows
        if rows.slots is None or rows.strengths is None:
            return result
        add = _beside_convolution if isinstance(self.base, nn.Conv2d) else _beside_linear
        for slots, strengths in zip(rows.slots, rows.strengths, strict=True):
            chosen = slots.expand(len(states))
            result = result + add(self.base, states, self.bank.down[chosen], self.bank.up[chosen], strengths)
        return result


def _beside_linear(layer: Any, states: Tensor, down: Tensor, up: Tensor, strengths: Tensor) -> Tensor:
    """What the adapters of each row add.

    Args:
        states: ``(rows, ..., in)``.
        down, up: ``(rows, rank, in)`` and ``(rows, out, rank)``.
        strengths: ``(rows,)`` or one.
    """
    flat = states.reshape(len(states), -1, states.shape[-1])
    low = torch.bmm(flat, down.transpose(1, 2)) * strengths[:, None, None].to(flat.dtype)
    return torch.bmm(low, up.transpose(1, 2)).reshape(*states.shape[:-1], up.shape[1])


def _beside_convolution(layer: Any, states: Tensor, down: Tensor, up: Tensor, strengths: Tensor) -> Tensor:
    """The same of a convolution: the rows are the groups of one.

    Args:
        states: ``(rows, in, height, width)``.
        down: ``(rows, rank, in, height, width)`` of the kernel.
    """
    rows, rank = down.shape[:2]
    together = states.reshape(1, -1, *states.shape[2:])
    low = F.conv2d(together, down.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, groups=rows)
    flat = low.reshape(rows, rank, -1) * strengths[:, None, None].to(low.dtype)
    return torch.bmm(up, flat).reshape(rows, up.shape[1], *low.shape[2:])
