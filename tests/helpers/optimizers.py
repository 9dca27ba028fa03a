"""Optimizers written down once more, from their papers, for comparison with those of libraries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class PlainOptimizer(torch.optim.Optimizer):
    """Calls :meth:`update` for each parameter, with the number of the step, from 1."""

    def __init__(
        self, params: Any, *, lr: float, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group, self.steps)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: Mapping[str, Any], k: int) -> None:
        raise NotImplementedError


class PlainLion(PlainOptimizer):
    """Chen et al. 2023, algorithm 2."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: Mapping[str, Any], k: int) -> None:
        beta1, beta2 = group["betas"]
        m = state.get("m", torch.zeros_like(p))
        direction = (beta1 * m + (1 - beta1) * g).sign()
        p.sub_(group["lr"] * (direction + group["weight_decay"] * p))
        state["m"] = beta2 * m + (1 - beta2) * g


class PlainAdafactor(PlainOptimizer):
    """Shazeer and Stern 2018, algorithms 4 and 5, with a step size that is given."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: Mapping[str, Any], k: int) -> None:
        beta = 1 - k**-0.8
        square = g**2 + 1e-30

        def average(name: str, now: Tensor) -> Tensor:
            state[name] = beta * state.get(name, torch.zeros_like(now)) + (1 - beta) * now
            return state[name]

        if p.dim() < 2:
            variance = average("v", square)
        else:
            rows, columns = average("r", square.mean(-1)), average("c", square.mean(-2))
            rows = rows / rows.mean(-1, keepdim=True)
            variance = rows[..., :, None] * columns[..., None, :]
        u = g / variance.sqrt()
        u /= max(1.0, u.square().mean().sqrt().item())
        p.sub_(group["lr"] * (u + group["weight_decay"] * p))


class PlainScheduleFree(PlainOptimizer):
    """Defazio et al. 2024, algorithm 1, at one learning rate; the parameters hold ``y``."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: Mapping[str, Any], k: int) -> None:
        beta1, beta2 = group["betas"]
        if not state:
            state.update(x=p.clone(), z=p.clone(), v=torch.zeros_like(p))
        state["v"] = beta2 * state["v"] + (1 - beta2) * g**2
        scaled = g / ((state["v"] / (1 - beta2**k)).sqrt() + group["eps"])
        state["z"] = state["z"] - group["lr"] * (scaled + group["weight_decay"] * p)
        state["x"] = (1 - 1 / k) * state["x"] + state["z"] / k
        p.copy_((1 - beta1) * state["z"] + beta1 * state["x"])

    @torch.no_grad()
    def take_average(self) -> None:
        """Puts ``x`` into the parameters: what training comes to."""
        for p, state in self.state.items():
            p.copy_(state["x"])


class PlainProdigy(PlainOptimizer):
    """Mishchenko and Defazio 2024, algorithm 4, with bias correction, and with warm-up safeguarded: no learning rate in
    the denominator of ``d``."""

    D0 = 1e-6

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.d, self.numerator = self.D0, 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.steps += 1
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        d, beta3 = self.d, math.sqrt(beta2)
        rate = d * group["lr"] * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        self.numerator *= beta3
        denominator = 0.0
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            state, g = self.state[p], p.grad
            if not state:
                state.update(start=p.clone(), **{name: torch.zeros_like(p) for name in "msv"})
            self.numerator += d / self.D0 * rate * (g * (state["start"] - p)).sum().item()
            state["m"] = beta1 * state["m"] + (1 - beta1) * d * g
            state["v"] = beta2 * state["v"] + (1 - beta2) * d**2 * g**2
            state["s"] = beta3 * state["s"] + d**2 / self.D0 * g
            denominator += state["s"].abs().sum().item()
        self.d = max(self.d, self.numerator / denominator)
        for p in parameters:
            state = self.state[p]
            p.sub_(rate * group["weight_decay"] * p)
            p.sub_(rate * state["m"] / (state["v"].sqrt() + self.d * group["eps"]))


# By what the hyperparameter calls them.
PLAIN_OPTIMIZERS: dict[str, type[PlainOptimizer]] = {
    "adafactor": PlainAdafactor,
    "lion": PlainLion,
    "prodigy": PlainProdigy,
    "schedule_free": PlainScheduleFree,
}
