"""The length of a training, and its learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.planning.length import Length


@dataclass(frozen=True)
class Schedule:
    """The length of the job's training, in optimizer steps.

    Attributes:
        save_every: 0 for never.
    """

    steps: int
    save_every: int
    learning_rate: float


def make_schedule(h: Hyperparameters, length: Length) -> Schedule:
    """The schedule of a training of this length."""
    save_every = h.save_steps * (length.epoch if h.save_use_epochs else 1)
    return Schedule(length.steps, save_every, length.learning_rate)


def make_rate(h: Hyperparameters, schedule: Schedule) -> Callable[[int], float]:
    """The learning rate of the step that follows so many steps: a function of the schedule and of nothing before."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=schedule.learning_rate)  # which knows the rate
    scheduler = get_scheduler(
        h.lr_scheduler, optimizer, num_warmup_steps=h.lr_warmup_steps, num_training_steps=schedule.steps
    )
    (factor,) = scheduler.lr_lambdas
    return lambda done: float(schedule.learning_rate * factor(done))
