"""Checkpoints: all that a job needs to go on as if it had not been interrupted.

Random choices are functions of the seed and the step (see :mod:`dreambooth_sm.data.training_set`), so weights,
optimizer state, averages and the step are everything.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth_sm.errors import UserError

_STATE = "state.json"
_TENSORS = "tensors.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        step: optimizer steps done.
        identity: what a resumed job has to have in common with the one that wrote this.
    """

    directory: Path
    step: int
    identity: dict[str, Any]

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Raises UserError, naming each difference, unless a job with ``identity`` can go on from here."""
        differences = [
            f"{name} was {self.identity.get(name)!r} and is {identity.get(name)!r}"
            for name in sorted(self.identity.keys() | identity.keys())
            if self.identity.get(name) != identity.get(name)
        ]
        if differences:
            raise UserError(
                f"the checkpoint {self.directory} can't be continued: {'; '.join(differences)}; "
                "put the values back, or set resume_from_checkpoint=no to start anew"
            )

    def load(self) -> dict[str, Any]:
        """The tensors, on the CPU, as they were given to :func:`save_checkpoint`."""
        return torch.load(self.directory / _TENSORS, map_location="cpu", weights_only=True)


def save_checkpoint(
    root: Path, step: int, identity: dict[str, Any], tensors: dict[str, Any], *, keep: int
) -> Checkpoint:
    """Writes ``root/step-N`` so that it is there whole or not at all; it and the ``keep - 1`` before it are kept."""
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save(tensors, partial / _TENSORS)
    state = {"step": step, "identity": identity, "bytes": (partial / _TENSORS).stat().st_size}
    (partial / _STATE).write_text(json.dumps(state, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    whole = all_checkpoints(root)
    # Later steps are those of a run that this one has replaced, and would be taken for the newest of this one.
    replaced = [checkpoint for checkpoint in whole if checkpoint.step > step]
    own = [checkpoint for checkpoint in whole if checkpoint.step <= step]
    for checkpoint in (*replaced, *own[:-keep]):
        shutil.rmtree(checkpoint.directory)
    return Checkpoint(final, step, identity)


def all_checkpoints(root: Path) -> list[Checkpoint]:
    """The whole checkpoints below ``root``, oldest first; one that was copied half-way does not count."""
    found: list[Checkpoint] = []
    for directory in sorted(root.glob("step-*")):
        try:
            state = json.loads((directory / _STATE).read_text())
            if (directory / _TENSORS).stat().st_size == state["bytes"]:
                found.append(Checkpoint(directory, int(state["step"]), dict(state["identity"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest of :func:`all_checkpoints`."""
    whole = all_checkpoints(root)
    return whole[-1] if whole else None
