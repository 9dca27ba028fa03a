"""How a model is taught: which of its parameters a method trains, and how.

A method meets a model only at named parameters: their names are the keys of checkpoints, and their order is that of
optimizers and averages.
"""

from __future__ import annotations

from typing import Protocol

import torch

from dreambooth_sm.methods.full import FULL
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.planning.plan import Plan


class Method(Protocol):
    """One way of teaching.

    Attributes:
        name: as the hyperparameter ``method`` says it.
    """

    name: str

    def parameters(self, model: PretrainedModel, plan: Plan) -> dict[str, torch.nn.Parameter]:
        """What is trained, by names that stay: full-precision values before training and after it."""

    def attach(self, model: PretrainedModel, plan: Plan, device: torch.device) -> None:
        """Puts what the training step runs on the device, in the plan's precision, with gradients where it trains.

        Raises:
            torch.OutOfMemoryError: the caller puts the parameters' values back.
        """

    def drawable(self, model: PretrainedModel, plan: Plan, dtype: torch.dtype) -> PretrainedModel:
        """A model that pictures are drawn with while ``model`` is trained: :meth:`parameters` of it take the values
        of training, in ``dtype``, and leave training's own alone."""


METHODS: dict[str, Method] = {method.name: method for method in (FULL,)}
