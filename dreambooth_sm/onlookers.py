"""Whoever looks at the weights now and then while training continues: to draw with them, or to measure them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from dreambooth_sm.methods import Trainable
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.plan import Plan


class Onlooker(Protocol):
    """The loop asks it after each step but the last one; the steps are the same, to the bit, with and without it."""

    def is_due(self, step: int) -> bool:
        """Whether it wants to look after ``step`` steps of training that continues."""

    def look(self, weights: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Looks, and goes without where the device has no memory left for it.

        Args:
            weights: name and value of each parameter that is trained.
        """


class DrawingCopy:
    """A model to draw with while training continues: training's own weights are never touched.

    It is on the device only while it draws.

    Args:
        trained: before training.
    """

    def __init__(self, trained: Trainable, plan: Plan) -> None:
        # In half precision where pictures are drawn so: host memory is short where cards are small.
        half = trained.model.half
        self._copy = trained.drawable(half if plan.device != "cpu" and plan.precision != "fp32" else torch.float32)

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> PretrainedModel:
        """The model with these weights: name and value of each parameter."""
        parameters = self._copy.parameters  # which walks the modules
        with torch.no_grad():
            for name, value in weights:
                parameters[name].copy_(value)
        return self._copy.model
