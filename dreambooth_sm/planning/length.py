"""How long a job trains, and at what rate."""

from __future__ import annotations

from dataclasses import dataclass

from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.training import DEFAULT_TRAIN_STEPS

# Processes that a job's steps are shared by at most: with more, rates would grow further than was measured.
_SHARED_BY = 4


@dataclass(frozen=True)
class Length:
    """The length of a training.

    Attributes:
        steps: optimizer steps.
        epoch: those of one pass over the pictures.
        learning_rate: the highest.
        note: what several processes change about it; None where they change nothing.
    """

    steps: int
    epoch: int
    learning_rate: float
    note: str | None = None


def length_of(h: Hyperparameters, pictures: int, processes: int = 1) -> Length:
    """Counts steps: ``max_train_steps`` that are set are exact, and win over epochs.

    Of several processes, each takes pictures of its own in a step. So that a job of more GPUs is done sooner, up to
    four share the steps of a length that nobody set, as they share epochs, and the rate is so many times higher (Goyal
    et al. 2017, "Accurate, Large Minibatch SGD").
    """
    of_one = h.train_batch_size * h.gradient_accumulation_steps
    batch = of_one * processes
    epoch = -(-pictures // batch)
    rate = h.learning_rate * (batch if h.scale_lr else 1)
    if h.max_train_steps and "max_train_steps" in h.model_fields_set:
        return Length(h.max_train_steps, epoch, rate)
    if h.num_train_epochs and not h.max_train_steps:  # which more than four share: all see each picture so often
        alone, sharing = h.num_train_epochs * -(-pictures // of_one), processes
    else:
        alone, sharing = h.max_train_steps or DEFAULT_TRAIN_STEPS, min(processes, _SHARED_BY)
    steps = -(-alone // sharing)
    if steps == alone:
        return Length(steps, epoch, rate)
    finds_rate = h.scale_lr or h.optimizer == "prodigy"
    factor = 1.0 if finds_rate else min(alone / steps, _SHARED_BY)
    note = f"{processes} processes take {steps} steps where one takes {alone}"
    note += "" if finds_rate else f", at {factor:.3g} times its learning rate"
    return Length(steps, epoch, rate * factor, f"{note}; set max_train_steps for another length")
