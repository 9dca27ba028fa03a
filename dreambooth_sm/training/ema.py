"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Ema:
    """Keeps a float32 average of parameters (Polyak averaging).

    The decay warms up as (1 + n) / (10 + n), so that the average forgets the untrained weights soon.

    Args:
        parameters: those that are averaged, in an order that stays.
        decay: the decay that the warm-up ends at.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.average = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the current weights into the average; once an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.average, current, 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Puts the average in the parameters' place; the weights that were there are gone."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "average": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, object]) -> None:
        self.updates = int(state["updates"])  # type: ignore[call-overload]
        torch._foreach_copy_(self.average, state["average"])  # type: ignore[arg-type]
