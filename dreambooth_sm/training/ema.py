"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Steps between two updates of an average that lives on the CPU: each has to fetch the weights from the card.
CPU_INTERVAL = 10


class Ema:
    """Keeps a float32 average of parameters (Polyak averaging).

    The decay warms up as (1 + n) / (10 + n), so that the average forgets the untrained weights soon.

    ``prepare_step()`` then ``update()``, once an optimizer step. ``update()`` only reads device memory where
    the average lives on the parameters' device, so that a CUDA graph can hold it.

    Args:
        parameters: those that are averaged, in an order that stays.
        decay: the decay that the warm-up ends at.
        read: the full-precision value of a parameter; its float32 copy by default.
        average_into: moves an average (first) by a share (third) towards a parameter (second), on the device.
        on_cpu: keep the average on the CPU, and update it every ``CPU_INTERVAL`` steps.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        decay: float,
        *,
        read: Callable[[Tensor], Tensor] = lambda p: p.detach().float(),
        average_into: Callable[[Tensor, Tensor, Tensor], object] | None = None,
        on_cpu: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self._read = read
        self._average_into = average_into or (
            lambda average, parameter, weight: average.lerp_(read(parameter).to(average.device), weight)
        )
        self._interval = CPU_INTERVAL if on_cpu else 1
        home = "cpu" if on_cpu else self.parameters[0].device
        self.average = [read(p).to(home, copy=True) for p in self.parameters]
        self._weight = torch.zeros((), device=home)

    @property
    def on_cpu(self) -> bool:
        return self._interval > 1

    def prepare_step(self) -> None:
        """Counts the step and writes its weight to the device; outside a captured graph."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self._weight.fill_(1 - decay**self._interval)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the current weights into the average."""
        if self.updates % self._interval:
            return
        for parameter, average in zip(self.parameters, self.average, strict=True):
            self._average_into(average, parameter, self._weight)

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets all steps: the average is what the parameters are now."""
        self.updates = 0
        for parameter, average in zip(self.parameters, self.average, strict=True):
            average.copy_(self._read(parameter))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)
