"""The loss of a batch: what the model is shown, what it says, and what it should say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.families import Conditioning
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import Measurable, Removable, Trainable, Watching, asks_base, encodes_in_steps
from dreambooth_sm.objectives import Objective
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.training.losses import Loss, consistency_loss, dreambooth_loss
from dreambooth_sm.training.precision import compute_dtype
from dreambooth_sm.training.step import Inputs


class BatchLoss:
    """Computes losses of what is trained, which is on its device.

    Args:
        prompts: what the text encoders make of prompts, or take where steps encode them, by name, a row a prompt.
        has_classes: whether the second half of each batch shows the class.
    """

    def __init__(
        self,
        trained: Trainable,
        prompts: Mapping[str, Tensor],
        plan: Plan,
        h: Hyperparameters,
        *,
        device: torch.device,
        has_classes: bool,
    ) -> None:
        self.objective: Objective = trained.model.family.objective(trained.model, h)
        self.objective = self.objective.to(device)
        self._base, self._prompts, self._plan, self._h = trained.model, prompts, plan, h
        self._device, self._dtype = device, compute_dtype(plan)
        self._encodes = encodes_in_steps(plan, h)
        self._prior = h.prior_loss_weight if has_classes else None
        self._untrained: Callable[[], contextlib.AbstractContextManager[None]] | None = None
        if asks_base(h):
            assert isinstance(trained, Removable)
            self._untrained = trained.untrained
        self._watch = trained.watch if isinstance(trained, Watching) else None
        self._distance: Callable[[], Tensor] | None = None
        if h.distance_penalty:
            assert isinstance(trained, Measurable)
            self._distance = trained.distance

    def take(self, prompts: Mapping[str, Tensor], has_classes: bool) -> bool:
        """Takes the prompts of another training of the same model into the memory that graphs know.

        Returns:
            whether they fit there; otherwise this is the loss of the training before.
        """
        shapes, own = ({n: (p.shape, p.dtype) for n, p in each.items()} for each in (prompts, self._prompts))
        if shapes != own or has_classes != (self._prior is not None):
            return False
        for name, table in self._prompts.items():
            table.copy_(prompts[name])
        return True

    def __call__(self, inputs: Inputs) -> Loss:
        """The loss of one batch, with its graph."""
        if self._watch:
            self._watch(inputs.noise, inputs.timesteps, self.objective.times)
        loss = self._loss_of(inputs)
        if self._distance:
            loss = loss._replace(total=loss.total + self._h.distance_penalty * self._distance())
        return loss

    def _loss_of(self, inputs: Inputs) -> Loss:
        noised = self.objective.noised(inputs.latents, inputs.noise, inputs.timesteps)
        if self._plan.weights != "fp32":
            noised = noised.to(self._dtype)
        if self._plan.channels_last:
            noised = noised.contiguous(memory_format=torch.channels_last)
        target = self.objective.target(inputs.latents, inputs.noise, inputs.timesteps)
        weighed: dict[str, Any] = {
            "element_weights": inputs.weights,
            "row_weights": self.objective.row_weights(inputs.timesteps),
            "huber_delta": self._h.huber_delta if self._h.loss == "huber" else None,
        }
        if not self._untrained:
            return dreambooth_loss(self._prediction(noised, inputs), target, prior_loss_weight=self._prior, **weighed)
        # The base model is asked before the model itself is, whose activations stay.
        rows = slice(len(noised) // 2 if self._prior is not None else 0, None)
        with torch.no_grad(), self._untrained():
            of_base = self._prediction(noised[rows], inputs.of(rows)).float()
        if self._prior is None:
            beta = self._h.dco_beta * self.objective.times
            return consistency_loss(self._prediction(noised, inputs), of_base, target, beta=beta, **weighed)
        target = torch.cat([target[: rows.start], of_base])
        return dreambooth_loss(self._prediction(noised, inputs), target, prior_loss_weight=self._prior, **weighed)

    def _prediction(self, noised: Tensor, inputs: Inputs) -> Tensor:
        family = self._base.family
        with self._autocast():
            prompts = {name: table[inputs.prompts] for name, table in self._prompts.items()}
            if self._encodes:
                conditioning = family.encode(self._base, prompts)
            else:
                conditioning = Conditioning(prompts).to(self._device, noised.dtype)
            conditioning = conditioning.beside(inputs.extras)
            return family.predict(self._base.denoiser, noised, self.objective.told(inputs.timesteps), conditioning)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._plan.precision == "fp32" or self._plan.weights != "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)
