"""The optimizers that plans name, each in its updater."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.training.updater import (
    AutocastUpdater,
    BlockwiseUpdater,
    CapturableUpdater,
    Groups,
    MasterUpdater,
    Updater,
    param_groups,
)

# Prodigy's own learning rate is held here: ten times what adapters are trained with. Where it goes further, its
# estimate has lost its hold.
LARGEST_D = 1e-2


def by_factor(
    parameters: Mapping[str, torch.nn.Parameter], rates: Mapping[str, float]
) -> dict[float, list[torch.nn.Parameter]]:
    """Parameters by the factor of the learning rate that they are trained with, in their order."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(rates.get(name, 1.0), []).append(parameter)
    return groups


def options_of(h: Hyperparameters, rate: float) -> dict[str, Any]:
    """What :func:`make_updater` is to give its optimizer."""
    return {
        "lr": rate,
        "betas": (h.adam_beta1, h.adam_beta2),
        "eps": h.adam_epsilon,
        "weight_decay": h.adam_weight_decay,
    }


def make_updater(groups: Groups, plan: Plan, options: dict[str, Any], seed: int) -> Updater:
    """The updater that the plan asks for.

    Args:
        groups: those whose learning rates are set together; on the device, in the precision that the plan keeps
            weights in.
        options: see :func:`options_of`.
        seed: of stochastic rounding.

    Raises:
        UserError: where the optimizer can't have several learning rates.
    """
    if plan.optimizer == "blockwise":
        return BlockwiseUpdater(groups, plan, options, seed)
    if plan.weights == "master":
        masters: dict[Tensor, torch.nn.Parameter] = {
            p: torch.nn.Parameter(p.detach().to(torch.float32, copy=True)) for group in groups for p in group
        }
        return MasterUpdater(masters, _fp32_updater([[masters[p] for p in group] for group in groups], plan, options))
    return _fp32_updater(groups, plan, options)


def _fp32_updater(groups: Groups, plan: Plan, options: dict[str, Any]) -> AutocastUpdater:
    """For weights of 32 bits."""
    parameters = param_groups(groups)
    scaling: dict[str, Any] = {"max_grad_norm": plan.max_grad_norm, "scales_loss": plan.precision == "fp16"}
    without_eps = {name: value for name, value in options.items() if name != "eps"}
    match plan.optimizer:
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AutocastUpdater(AdamW8bit(parameters, **options), **scaling)
        case "adafactor":
            from transformers.optimization import Adafactor

            # The learning rate is what is asked for, as with all others, and no share of each weight's size: an
            # adapter's weights begin with 0.
            absolute = {"scale_parameter": False, "relative_step": False}
            own = {name: options[name] for name in ("lr", "weight_decay")}
            return AutocastUpdater(Adafactor(parameters, **own, **absolute), **scaling)
        case "lion":
            from lion_pytorch.foreach import Lion

            return AutocastUpdater(Lion(parameters, **without_eps), **scaling)
        case "prodigy":
            return ProdigyUpdater(groups, options, **scaling)
        case "schedule_free":
            return ScheduleFreeUpdater(groups, options, **scaling)
    if plan.device == "cuda":
        return CapturableUpdater(torch.optim.AdamW(parameters, fused=True, capturable=True, **options), **scaling)
    return AutocastUpdater(torch.optim.AdamW(parameters, **options), **scaling)


class ProdigyUpdater(AutocastUpdater):
    """Finds the learning rate, ``d``, from how far the weights have come (Mishchenko and Defazio 2024, "Prodigy: An
    Expeditiously Adaptive Parameter-Free Learner"), with the settings that its authors recommend for diffusion models.

    Args:
        groups: one; all parameters share ``d``.
        options: ``lr`` is a factor of ``d``.

    Raises:
        UserError: several groups.
    """

    def __init__(self, groups: Groups, options: dict[str, Any], **scaling: Any) -> None:
        from prodigyopt import Prodigy

        if len(groups) > 1:
            raise UserError(
                "optimizer=prodigy finds one learning rate for all parameters, and some have one of their own; set "
                "optimizer to auto, or leave out what sets the other learning rates"
            )
        # It prints a line where it is made with weight decay.
        own = {name: value for name, value in options.items() if name != "weight_decay"}
        optimizer = Prodigy(param_groups(groups), **own, use_bias_correction=True, safeguard_warmup=True)
        optimizer.param_groups[0]["weight_decay"] = options["weight_decay"]
        super().__init__(optimizer, **scaling)

    @property
    def d(self) -> float:
        """What the learning rate is a factor of."""
        return float(self.optimizer.param_groups[0]["d"])

    def update(self) -> None:
        super().update()
        (group,) = self.optimizer.param_groups
        group["d"], group["d_max"] = min(group["d"], LARGEST_D), min(group["d_max"], LARGEST_D)

    def metrics(self) -> dict[str, float]:
        return {"d": self.d}

    def complaint(self) -> str | None:
        if self.d < LARGEST_D:
            return None
        return (
            f"optimizer=prodigy has come to a learning rate of {LARGEST_D:g} and is held there, which is too much for "
            "most trainings; if the pictures fall apart, set optimizer to auto"
        )


class ScheduleFreeUpdater(AutocastUpdater):
    """AdamW whose steps need no schedule: gradients are those of a mixture of its iterates and their average, and the
    average is what is trained (Defazio et al. 2024, "The Road Less Scheduled").

    The parameters themselves hold the mixture, and :meth:`read` gives the average: what is drawn, stored and exported.
    """

    def __init__(self, groups: Groups, options: dict[str, Any], **scaling: Any) -> None:
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(param_groups(groups), **options)
        optimizer.train()
        super().__init__(optimizer, **scaling)
        self._mixture = options["betas"][0]

    def read(self, parameter: Tensor) -> Tensor:
        iterate = self.optimizer.state.get(parameter, {}).get("z")
        if iterate is None:
            return super().read(parameter)
        return torch.lerp(parameter.detach(), iterate, 1 - 1 / self._mixture)

    def state_dict(self) -> dict[str, Any]:
        """With the mixture: to come back to it from the average would not be exact."""
        return super().state_dict() | {"mixture": [parameter.detach() for parameter in self.parameters]}

    def accepts(self, state: dict[str, Any]) -> bool:
        return "mixture" in state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for parameter, mixture in zip(self.parameters, state["mixture"], strict=True):
            parameter.detach().copy_(mixture)
