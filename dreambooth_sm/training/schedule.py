"""The length of a training, and its learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dreambooth_sm.hyperparameters import Hyperparameters


@dataclass(frozen=True)
class Schedule:
    """The length of the job's training, in optimizer steps.

    Attributes:
        save_every: 0 for never.
    """

    steps: int
    save_every: int
    learning_rate: float


def make_schedule(h: Hyperparameters, instance_pictures: int, default_steps: int, processes: int = 1) -> Schedule:
    """Turns epochs into steps; ``max_train_steps`` wins."""
    batch = h.train_batch_size * h.gradient_accumulation_steps * processes
    steps_per_epoch = -(-instance_pictures // batch)
    steps = h.max_train_steps or (h.num_train_epochs or 0) * steps_per_epoch or default_steps
    rate = h.learning_rate * (batch if h.scale_lr else 1)
    return Schedule(steps, h.save_steps * (steps_per_epoch if h.save_use_epochs else 1), rate)


def make_rate(h: Hyperparameters, schedule: Schedule) -> Callable[[int], float]:
    """The learning rate of the step that follows so many steps: a function of the schedule and of nothing before."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=schedule.learning_rate)  # which knows the rate
    scheduler = get_scheduler(
        h.lr_scheduler, optimizer, num_warmup_steps=h.lr_warmup_steps, num_training_steps=schedule.steps
    )
    (factor,) = scheduler.lr_lambdas
    return lambda done: float(schedule.learning_rate * factor(done))
