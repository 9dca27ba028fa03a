"""Checkpoints: all that a job needs to go on as if it had not been interrupted.

Random choices are functions of the seed and the step (see :mod:`dreambooth_sm.data.training_set`), so weights,
optimizer state, averages and the step are everything.

A checkpoint is a directory ``step-00000800``: ``tensors.pt``, and ``state.json`` with the step, the job's identity,
what the job has to tell so far, and the size and CRC-32 of both. CRC-32, because it is there to find damage, not
forgery, and costs half of what SHA-256 costs, or a fifth on processors without instructions for that. The pictures that
were drawn so far lie beside them, in ``samples``; one that is missing costs a picture, not the checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from dreambooth_sm.errors import UserError

_STATE = "state.json"
_TENSORS = "tensors.pt"
_PICTURES = "samples"
_CHUNK = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        step: optimizer steps done.
        identity: what a resumed job has to have in common with the one that wrote this.
        crc32: of the tensors' file.
        record: what the job had to tell, as JSON's types; empty where an earlier version wrote the checkpoint.
    """

    directory: Path
    step: int
    identity: dict[str, Any]
    crc32: int
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> Path:
        """Where the pictures lie that were drawn so far."""
        return self.directory / _PICTURES

    def is_undamaged(self) -> bool:
        """Whether the tensors' file holds what was written; reads all of it."""
        crc32 = 0
        with (self.directory / _TENSORS).open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                crc32 = zlib.crc32(chunk, crc32)
        return crc32 == self.crc32

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
    root: Path,
    step: int,
    identity: dict[str, Any],
    tensors: dict[str, Any],
    *,
    keep: int,
    record: dict[str, Any] | None = None,
    pictures: Iterable[Path] = (),
) -> Checkpoint:
    """Writes ``root/step-N`` so that it is there whole or not at all; it and the ``keep - 1`` before it are kept.

    Args:
        record: what the job has to tell so far, as JSON's types.
        pictures: that were drawn so far; copied.
    """
    record = record or {}
    final = root / f"step-{step:08d}"
    partial = root / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / _TENSORS).open("wb") as stream:
        written = _Checksummed(stream)
        torch.save(tensors, cast("BinaryIO", written))
    for picture in pictures:
        (partial / _PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(picture, partial / _PICTURES / picture.name)
    state = {
        "step": step,
        "identity": identity,
        "bytes": written.bytes,
        "crc32": written.crc32,
        "record": record,
    }
    (partial / _STATE).write_text(json.dumps(state | {"state_crc32": _crc32_of(state)}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    whole = all_checkpoints(root)
    # Later steps are those of a run that this one has replaced, and would be taken for the newest of this one.
    replaced = [checkpoint for checkpoint in whole if checkpoint.step > step]
    own = [checkpoint for checkpoint in whole if checkpoint.step <= step]
    for checkpoint in (*replaced, *own[:-keep]):
        shutil.rmtree(checkpoint.directory)
    return Checkpoint(final, step, identity, written.crc32, record)


class _Checksummed:
    """A file that sums up what is written to it, so that it need not be read again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.bytes, self.crc32 = stream, 0, 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += len(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()


def _crc32_of(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def all_checkpoints(root: Path) -> list[Checkpoint]:
    """The whole checkpoints below ``root``, oldest first; one that was copied half-way does not count.

    Of the tensors only the size is looked at; see :meth:`Checkpoint.is_undamaged`.
    """
    found: list[Checkpoint] = []
    for directory in sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)):
        try:
            state = json.loads((directory / _STATE).read_text())
            undamaged = state.pop("state_crc32") == _crc32_of(state)
            if undamaged and (directory / _TENSORS).stat().st_size == state["bytes"]:
                record = state.get("record", {})
                found.append(Checkpoint(directory, state["step"], state["identity"], state["crc32"], record))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def latest_checkpoint(root: Path, warn: Callable[[str], object] = lambda text: None) -> Checkpoint | None:
    """The newest of :func:`all_checkpoints` that is undamaged; ``warn`` is told of those that are not."""
    for checkpoint in reversed(all_checkpoints(root)):
        if checkpoint.is_undamaged():
            return checkpoint
        warn(f"the checkpoint {checkpoint.directory} is damaged: going back to the one before")
    return None
