"""Sums between two lines of the log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dreambooth_sm.distributed import World
from dreambooth_sm.training.losses import Loss


@dataclass
class Window:
    """Means since the last metric line; kept on the device until they are shown."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    count: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, loss: Loss) -> None:
        self.count += 1
        for name, value in (("loss", loss.total), ("instance_loss", loss.instance), ("prior_loss", loss.prior)):
            if value is not None:
                self.sums[name] = self.sums.get(name, 0) + value.detach()

    def means(self, world: World) -> dict[str, float]:
        """Over the steps, and over the processes."""
        mine = {name: (total / self.count).item() for name, total in self.sums.items()}
        everyone = world.gather(mine)
        return {name: sum(means[name] for means in everyone) / world.size for name in mine}

    def share(self, world: World) -> None:
        """Gives every process the mean of all their sums, which leaves the means as they are: one can save for all."""
        if world.size > 1:
            means = self.means(world)
            self.sums = {name: torch.full_like(total, means[name] * self.count) for name, total in self.sums.items()}

    def state(self) -> dict[str, Any]:
        """On the CPU."""
        sums = {name: total.cpu() for name, total in self.sums.items()}
        return {"sums": sums, "count": self.count, "seconds": self.seconds}

    @classmethod
    def going_on(cls, state: Mapping[str, Any], device: torch.device) -> Window:
        """From another's :meth:`state`, whose time stood still meanwhile."""
        sums = {name: total.to(device) for name, total in state["sums"].items()}
        return cls(sums, state["count"], time.monotonic() - state["seconds"])
