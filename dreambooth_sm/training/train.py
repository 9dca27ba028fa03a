"""Training on this card, with the next smaller plan where it runs out of memory nevertheless."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth_sm.distributed import World
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.memory import free_memory
from dreambooth_sm.methods import Trainable
from dreambooth_sm.models import PretrainedModel
from dreambooth_sm.onlookers import Onlooker
from dreambooth_sm.planning.choice import smaller_plan
from dreambooth_sm.planning.plan import Plan
from dreambooth_sm.report import Reporter
from dreambooth_sm.training.checkpoint import Checkpoint
from dreambooth_sm.training.loop import Trainer, TrainingSet
from dreambooth_sm.training.schedule import Schedule


@dataclass(frozen=True)
class TrainedModel:
    """The result of training: the base model with the trained values in it, on the CPU."""

    trainable: Trainable

    @property
    def base(self) -> PretrainedModel:
        return self.trainable.model

    def export(self, directory: Path, h: Hyperparameters, dtype: torch.dtype | None) -> None:
        """See :meth:`dreambooth_sm.methods.Trainable.export`."""
        self.trainable.export(directory, h, dtype)


@dataclass
class Bench:
    """Keeps the trainer of one training for the next one of the same plan."""

    _trainer: Trainer | None = None
    _plan: Plan | None = None

    def take(self, plan: Plan) -> Trainer | None:
        """The trainer that was kept for a plan, which is not kept any more; one of another plan is let go of."""
        if self._plan != plan:
            self.clear()
        trainer, self._trainer = self._trainer, None
        return trainer

    def clear(self) -> None:
        """Lets go of the trainer."""
        if self._trainer:
            self._trainer.close()
        self._trainer = self._plan = None

    def keep(self, trainer: Trainer, plan: Plan) -> None:
        """Keeps a trainer that has finished, for trainings of this plan, though its own may be a smaller one."""
        self._trainer, self._plan = trainer, plan


def train(
    trainable: Trainable,
    data: TrainingSet,
    plan: Plan,
    h: Hyperparameters,
    schedule: Schedule,
    identity: dict[str, Any],
    previous: Checkpoint | None,
    checkpoints: Path,
    on_save: Callable[[Path], object] | None = None,
    *,
    keep_last: Callable[[], bool] = lambda: True,
    leaves_no_checkpoint: bool = False,
    onlookers: Sequence[Onlooker] = (),
    report: Reporter,
    stop: threading.Event,
    world: World,
    bench: Bench | None = None,
) -> TrainedModel:
    """Trains in place. Where the card runs out of memory nevertheless, continues with the next smaller plan.

    Args:
        leaves_no_checkpoint: see :class:`~dreambooth_sm.training.loop.Trainer`.
        bench: that the last training of the same model left, and the next one will take over.

    Raises:
        UserError: where not even the smallest plan fits.
        StopRequested: ``stop`` was set; the steps done are in a checkpoint.
    """
    rescued: tuple[dict[str, Any], int] | None = None
    asked = plan
    while True:
        trainer = bench.take(asked) if bench else None
        try:
            if trainer:
                trainer.restart(data, h, schedule, identity, report)
            else:
                trainer = Trainer(
                    trainable,
                    data,
                    plan,
                    h,
                    schedule,
                    device=torch.device(plan.device),
                    identity=identity,
                    report=report,
                    world=world,
                    stays=bench is not None,
                )
            trainer.on_save, trainer.leaves_no_checkpoint = on_save, leaves_no_checkpoint
            if rescued is not None:
                trainer.load_state(*rescued)
                rescued = None  # host memory is short where cards are small
            elif previous is not None:
                trainer.resume(previous)
                report.say(f"resumed after step {previous.step}, from {previous.directory}")
            trainer.train(checkpoints, stop, onlookers, keep_last)
            if bench:
                bench.keep(trainer, asked)
            return TrainedModel(trainable)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        # Not inside the except clause: the exception's frames hold what has to be freed.
        smaller = smaller_plan(trainer.plan if trainer else plan, h)
        if world.size > 1:
            raise UserError(f"out of memory on process {world.rank} ({reason}); set gradient_checkpointing=true")
        if smaller is None:
            raise UserError(f"the card has too little memory for the smallest plan there is: {reason}")
        if trainer is not None:
            rescued = (trainer.rescue(), trainer.step)
            trainer = None
        free_memory()
        report.warn(
            f"out of memory ({reason}); continuing after step {rescued[1] if rescued else 0} with a smaller plan"
        )
        plan = smaller
        report.say(f"plan: {plan.lines()[0]}")
