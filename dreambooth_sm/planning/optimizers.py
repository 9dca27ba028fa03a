"""Optimizers that work on fp32 values: what they take beside AdamW's family, and why no graph holds their updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dreambooth_sm.planning.ladder import Optimizer


@dataclass(frozen=True)
class OnMasters:
    """An optimizer on fp32 weights, or on fp32 masters of 16-bit ones. Bytes are those of one parameter, by arithmetic.

    Attributes:
        state: bytes that stay.
        stored: bytes that a checkpoint has of it.
        working: bytes for as long as it updates, beside the gradients.
        host: what it does on the host in each update, so that no CUDA graph can hold one.
    """

    state: float
    stored: float
    working: float
    host: str


ON_MASTERS: Mapping[Optimizer, OnMasters] = MappingProxyType(
    {
        # Rows and columns instead of elements: two thirds of a 3 x 3 convolution's elements, and hardly any of others'.
        "adafactor": OnMasters(2, 2, 0, "Adafactor counts its steps on the host"),
        "lion": OnMasters(4, 4, 4, "Lion's learning rate is a number on the host"),
        "prodigy": OnMasters(16, 16, 0, "Prodigy finds its learning rate on the host"),
        "schedule_free": OnMasters(8, 12, 4, "the average of schedule-free AdamW has its weights on the host"),
    }
)
