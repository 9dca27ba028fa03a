"""Updaters turn gradients into new weights: an optimizer, its loss scaling and clipping, and how it keeps the weights.

Updaters run under either executor of :mod:`dreambooth_sm.training.step`, eager or captured. Some optimizers compute on
the host, and their updates follow the graph.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.training.adamw_blockwise import BlockwiseAdamW

Groups = Sequence[Sequence[torch.nn.Parameter]]


class Updater(ABC):
    """Changes parameters by their gradients.

    :meth:`prepare_step` once a step, before its backward passes, on the host; then :meth:`scale` and :meth:`update`,
    which only work on the device and may be captured.

    Attributes:
        optimizer: whose groups are given each step's learning rates.
        parameters: what gets gradients.
        capturable: whether a CUDA graph can hold :meth:`update`.
    """

    optimizer: torch.optim.Optimizer
    parameters: Sequence[Tensor]
    capturable = True

    def prepare_step(self) -> None:  # noqa: B027 - most need not
        """Writes the numbers of the next step, such as its learning rate, to the device; never inside a capture."""

    def prepare_capture(self) -> None:  # noqa: B027
        """Before a capture: what is recorded is not a step."""

    @abstractmethod
    def scale(self, loss: Tensor) -> Tensor:
        """The loss that the backward pass starts from."""

    @abstractmethod
    def update(self) -> None:
        """Updates every parameter, and lets go of the gradients."""

    @abstractmethod
    def skipped(self) -> bool:
        """Whether the last step met gradients that are not finite, and left weights as they were. Waits for it."""

    @property
    @abstractmethod
    def scales_loss(self) -> bool:
        """Whether a loss scaler may make steps be skipped."""

    def metrics(self) -> dict[str, float]:
        """What metrics lines tell of it beside the learning rate."""
        return {}

    def complaint(self) -> str | None:
        """What is odd about the last update, in a line for people; None where nothing is."""
        return None

    def read(self, parameter: Tensor) -> Tensor:
        """The full-precision value of a parameter, float32."""
        return parameter.detach().float()

    def bits(self, parameter: Tensor) -> list[Tensor]:
        """Returns what a parameter's full-precision value is stored as, as integers; views, no copies."""
        return [parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])]

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Sets a parameter to a full-precision value."""
        parameter.detach().copy_(value)

    def average_into(self, average: Tensor, parameter: Tensor, weight: Tensor) -> None:
        """Moves an average by the share ``weight`` towards the full-precision value of a parameter."""
        average.lerp_(self.read(parameter), weight)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, without the weights."""

    @abstractmethod
    def accepts(self, state: dict[str, Any]) -> bool:
        """Whether ``state`` has this updater's format; another plan's may not."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave; the weights have to be written before."""

    @abstractmethod
    def restart(self, seed: int) -> None:
        """Forgets all steps, in the memory that graphs know; the weights have to be written after it.

        Args:
            seed: of stochastic rounding.
        """

    def drop_gradients(self) -> None:
        """Lets go of the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Lets go of gradients and hooks."""
        self.drop_gradients()


class BlockwiseUpdater(Updater):
    """Our optimizer; see :class:`~dreambooth_sm.training.adamw_blockwise.BlockwiseAdamW`."""

    optimizer: BlockwiseAdamW

    def __init__(self, groups: Groups, plan: Plan, options: dict[str, Any], seed: int) -> None:
        self._state_bits = plan.state_bits
        self._scales_loss = plan.precision == "fp16"
        self.parameters = [p for group in groups for p in group]
        self.optimizer = BlockwiseAdamW(
            param_groups(groups),
            **options,
            state_bits=plan.state_bits,  # type: ignore[arg-type]
            master="stochastic" if plan.weights == "stochastic" else "residual",
            update_in_backward=plan.update_in_backward,
            max_grad_norm=plan.max_grad_norm,
            seed=seed,
        )

    def prepare_step(self) -> None:
        self.optimizer.prepare_step()

    def prepare_capture(self) -> None:
        self.optimizer.prepare_capture()

    def scale(self, loss: Tensor) -> Tensor:
        return self.optimizer.scale(loss)

    def update(self) -> None:
        self.optimizer.step()
        self.drop_gradients()

    def skipped(self) -> bool:
        return bool(self.optimizer.found_nonfinite.item())

    @property
    def scales_loss(self) -> bool:
        return self._scales_loss

    def read(self, parameter: Tensor) -> Tensor:
        return self.optimizer.fp32_weight(parameter)

    def bits(self, parameter: Tensor) -> list[Tensor]:
        residual = self.optimizer.state[parameter].get("residual")
        return super().bits(parameter) + ([] if residual is None else [residual])

    def write(self, parameter: Tensor, value: Tensor) -> None:
        self.optimizer.set_fp32_weight(parameter, value)

    def average_into(self, average: Tensor, parameter: Tensor, weight: Tensor) -> None:
        self.optimizer.average_into(average, parameter, weight)

    def state_dict(self) -> dict[str, Any]:
        """The residuals are left to the full-precision weights, which :meth:`read` gives."""
        state = self.optimizer.state_dict()
        for tensors in state["state"].values():
            tensors.pop("residual", None)
        return state

    def accepts(self, state: dict[str, Any]) -> bool:
        return bool(state.get("blockwise", {}).get("state_bits") == self._state_bits)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.optimizer.state_dict()
        for index, tensors in own["state"].items():
            if "residual" in tensors:
                state["state"][index]["residual"] = tensors["residual"]
        state["blockwise"]["master"] = own["blockwise"]["master"]
        self.optimizer.load_state_dict(state)

    def restart(self, seed: int) -> None:
        self.optimizer.restart(seed)

    def close(self) -> None:
        self.optimizer.close()


class AutocastUpdater(Updater):
    """An optimizer of torch's kind on fp32 weights, with torch's loss scaler and clipping.

    Args:
        optimizer: one that may compute on the host; its groups' learning rates are floats.
        max_grad_norm: gradients are clipped to this global norm; None: not at all.
        scales_loss: whether the backward pass runs in fp16.
    """

    capturable = False

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None, scales_loss: bool) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._max_grad_norm = max_grad_norm
        self._scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=scales_loss)
        self._norm: Tensor | None = None
        self._first_scaler = self._scaler.state_dict()
        # Some optimizers count and estimate in their groups.
        self._first_groups = [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def scale(self, loss: Tensor) -> Tensor:
        return self._scaler.scale(loss)

    def update(self) -> None:
        self._scaler.unscale_(self.optimizer)
        if self._max_grad_norm is not None:
            self._norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm)
        elif self.scales_loss:
            self._norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.drop_gradients()

    def skipped(self) -> bool:
        return self.scales_loss and self._norm is not None and not bool(self._norm.isfinite())

    @property
    def scales_loss(self) -> bool:
        return self._scaler.is_enabled()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def accepts(self, state: dict[str, Any]) -> bool:
        return "optimizer" in state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def restart(self, seed: int) -> None:
        if self.capturable:  # a graph knows where the state is, which begins with zeros
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        else:
            self.optimizer.state.clear()
        for group, first in zip(self.optimizer.param_groups, self._first_groups, strict=True):
            group.update(copy.deepcopy(first))
        if self.scales_loss:
            self._scaler.load_state_dict(self._first_scaler)
        self._norm = None


class CapturableUpdater(AutocastUpdater):
    """An :class:`AutocastUpdater` whose optimizer takes ``capturable`` and reads its learning rate from the device.

    The loop and checkpoints keep seeing rates that are floats: to read one from the device would wait for it.
    """

    capturable = True

    def __init__(self, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None, scales_loss: bool) -> None:
        super().__init__(optimizer, max_grad_norm=max_grad_norm, scales_loss=scales_loss)
        device = self.parameters[0].device
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    def prepare_step(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            rate.fill_(group["lr"])

    def update(self) -> None:
        groups = self.optimizer.param_groups
        shown = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        super().update()
        for group, lr in zip(groups, shown, strict=True):
            group["lr"] = lr

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for group in self.optimizer.param_groups:  # a checkpoint may come from a job that was not captured
            group["capturable"] = True


class MasterUpdater(Updater):
    """Updates fp32 masters of 16-bit weights, which are the masters' rounded copies.

    Masters, their gradients and the copies take a few kernels each for any number of parameters.

    Args:
        masters: of each weight that is computed with, and gets gradients.
        updater: of the masters.
    """

    def __init__(self, masters: Mapping[Tensor, Tensor], updater: AutocastUpdater) -> None:
        self.optimizer = updater.optimizer
        self.capturable = updater.capturable
        self.parameters = list(masters)
        self._updater = updater
        self._master_of = masters

    def prepare_step(self) -> None:
        self._updater.prepare_step()

    def prepare_capture(self) -> None:
        self._updater.prepare_capture()

    def scale(self, loss: Tensor) -> Tensor:
        return self._updater.scale(loss)

    @torch.no_grad()
    def update(self) -> None:
        weights = [weight for weight in self.parameters if weight.grad is not None]
        # Only now, when the activations are gone.
        gradients = [torch.empty_like(self._master_of[weight]) for weight in weights]
        torch._foreach_copy_(gradients, [weight.grad for weight in weights if weight.grad is not None])
        for weight, gradient in zip(weights, gradients, strict=True):
            self._master_of[weight].grad, weight.grad = gradient, None
        self._updater.update()
        self._round()

    def skipped(self) -> bool:
        return self._updater.skipped()

    @property
    def scales_loss(self) -> bool:
        return self._updater.scales_loss

    @torch.no_grad()
    def _round(self) -> None:
        torch._foreach_copy_(list(self._master_of), list(self._master_of.values()))

    def metrics(self) -> dict[str, float]:
        return self._updater.metrics()

    def complaint(self) -> str | None:
        return self._updater.complaint()

    def read(self, parameter: Tensor) -> Tensor:
        return self._updater.read(self._master_of[parameter])

    def bits(self, parameter: Tensor) -> list[Tensor]:
        return self._updater.bits(self._master_of[parameter])

    def write(self, parameter: Tensor, value: Tensor) -> None:
        self._updater.write(self._master_of[parameter], value)
        super().write(parameter, value)

    def state_dict(self) -> dict[str, Any]:
        return self._updater.state_dict()

    def accepts(self, state: dict[str, Any]) -> bool:
        return self._updater.accepts(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updater.load_state_dict(state)
        self._round()

    def restart(self, seed: int) -> None:
        self._updater.restart(seed)

    def drop_gradients(self) -> None:
        self._updater.drop_gradients()
        for weight in self.parameters:
            weight.grad = None


def param_groups(groups: Groups) -> list[dict[str, Any]]:
    """As optimizers take them."""
    return [{"params": list(group)} for group in groups]
