"""Whether the disk has room for what a job will write."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from dreambooth_sm.convert import EXPORT_DTYPES
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import Trainable
from dreambooth_sm.planning.optimizers import ON_MASTERS
from dreambooth_sm.planning.plan import Plan

# For pictures, reports and the file system itself.
_SPARE = 16 * 2**20


@dataclass(frozen=True)
class Space:
    """The disk space that a job takes, in bytes, and where.

    Attributes:
        model: the trained model, in all formats that are asked for.
        checkpoint: one of them.
    """

    model: int
    checkpoint: int
    models_path: Path
    checkpoints: Path

    @classmethod
    def needed(cls, trained: Trainable, h: Hyperparameters, plan: Plan, checkpoints: Path) -> Space:
        """For a job that trains this."""
        on_masters = ON_MASTERS.get(plan.optimizer)
        each = 4 + (on_masters.stored if on_masters else plan.state_bits / 4) + (4 if plan.use_ema else 0)
        return cls(
            trained.exported_values(h) * EXPORT_DTYPES[h.export_precision].itemsize + _SPARE,
            int(sum(p.numel() for p in trained.parameters.values()) * each) + _SPARE,
            Path(h.models_path),
            checkpoints,
        )

    def check(self, kept: int) -> str | None:
        """Looks before anything is trained.

        Args:
            kept: checkpoints that the job keeps.

        Returns:
            a warning where not all checkpoints fit, or None.

        Raises:
            UserError: the model does not fit.
        """
        free = _free(self.models_path)
        if free < self.model:
            raise UserError(
                f"models_path: the trained model takes {self.model / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free at "
                f"{self.models_path}; free some, or take an instance or a volume with a larger disk"
            )
        free = _free(self.checkpoints) - (self.model if self._share_a_disk() else 0)
        wanted = (kept + 1) * self.checkpoint  # the oldest goes once the newest is there
        if free >= wanted:
            return None
        return (
            f"{kept} checkpoints and the next take {wanted / 1e9:.1f} GB, and {max(0, free) / 1e9:.1f} GB are free for "
            f"them at {self.checkpoints}; those that don't fit are left out"
        )

    def has_room_for_last(self) -> bool:
        """Whether a checkpoint of the finished training leaves room for the model."""
        return _free(self.checkpoints) >= self.checkpoint + (self.model if self._share_a_disk() else 0)

    def _share_a_disk(self) -> bool:
        return _there(self.models_path).stat().st_dev == _there(self.checkpoints).stat().st_dev


def _there(path: Path) -> Path:
    """The path, or the nearest directory above that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _free(path: Path) -> int:
    return shutil.disk_usage(_there(path)).free
