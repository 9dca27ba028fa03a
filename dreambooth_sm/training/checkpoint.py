"""Checkpoints: all that a job needs to be resumed as if it had not been interrupted.

Random choices are functions of the seed and the step (see :mod:`dreambooth_sm.data.training_set`), so weights,
optimizer state, averages and the step are everything.

Jobs may share a directory: each removes and replaces only its own checkpoints. Where another's has the name, a job's
own is ``step-00000800-2``.

A checkpoint is a directory ``step-00000800``: ``tensors.pt``, and ``state.json`` with the format's number, the step,
the job's identity, what the job has to tell so far, and the size and CRC-32 of both. CRC-32, because it is there to
find damage, not forgery, and costs half of what SHA-256 costs, or a fifth on processors without instructions for that.
The pictures that were drawn so far lie beside them, in ``samples``; one that is missing costs a picture, not the
checkpoint.

What is read was perhaps written by others: it is checked against the types and ranges that this module writes, tensors
are loaded without running code, and what does not fit is passed over.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import torch
from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, ValidationError

from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.ranges import MOST_STEPS, Seed
from dreambooth_sm.report import Record
from dreambooth_sm.training import checkpoint_format_1

# Of what is written here.
FORMAT = 2
_READ = (1, FORMAT)

STATE = "state.json"
_TENSORS = "tensors.pt"
_PICTURES = "samples"
CHECKPOINT_NAME = re.compile("step-([0-9]{8})(?:-[0-9]+)?")
_CHUNK = 2**20
# A record of a million metric lines has a sixth of this.
LARGEST_STATE = 2**30
# Differences of one kind that are named.
_MOSTNAMED = 5


class _Identity(BaseModel):
    """The values that every identity holds, beside others."""

    model_config = ConfigDict(strict=True, extra="allow")

    seed: Seed


class _State(BaseModel):
    """``state.json``, but for its own checksum."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    step: Annotated[int, Ge(0), Le(MOST_STEPS)]
    identity: _Identity
    bytes: Annotated[int, Ge(0)]
    crc32: Annotated[int, Ge(0), Le(2**32 - 1)]
    record: Record


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        step: optimizer steps done.
        identity: what a resumed job has to have in common with the one that wrote this.
        crc32: of the tensors' file.
        record: what the job had to tell, as JSON's types.
        format: see :data:`FORMAT`; of a checkpoint in another format only this and the step are known.
    """

    directory: Path
    step: int
    identity: dict[str, Any]
    crc32: int
    record: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def pictures(self) -> Path:
        """Where the pictures lie that were drawn so far."""
        return self.directory / _PICTURES

    def is_undamaged(self) -> bool:
        """Whether the tensors' file holds what was written; reads all of it."""
        if self.format not in _READ:
            return True  # as far as anybody knows here
        crc32 = 0
        with (self.directory / _TENSORS).open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                crc32 = zlib.crc32(chunk, crc32)
        return crc32 == self.crc32

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Raises UserError, naming each difference, unless a job with ``identity`` can be resumed from here."""
        if self.format not in _READ:
            raise UserError(
                f"the checkpoint {self.directory} has format {self.format}, and this version reads up to {FORMAT}; "
                "finish the job with the version that wrote it, or set resume_from_checkpoint=no to start again"
            )
        if differences := self._differences(identity):
            words = "; ".join(_difference(name, was, now) for name, (was, now) in differences.items())
            raise UserError(
                f"the job can't be resumed from the checkpoint {self.directory}: {words}; "
                "put the values back, or set resume_from_checkpoint=no to start again"
            )

    def belongs_to(self, identity: dict[str, Any], *, but: Collection[str] = ()) -> bool:
        """Whether it is of a job with ``identity``, which may be resumed from it and may remove it.

        Args:
            but: names of what need not be the same.
        """
        return self.format in _READ and self._differences(identity).keys() <= set(but)

    def _differences(self, identity: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Finds the values that differ: what was and what is, by name."""
        now = checkpoint_format_1.comparable(self.identity, identity) if self.format == 1 else identity
        return {
            name: (was, now.get(name))
            for name in sorted(self.identity.keys() | now.keys())
            # A hyperparameter that the job's version did not have yet: what it has become the default of.
            if (was := self.identity.get(name, _default(name))) != now.get(name)
        }

    def not_comparable(self, identity: dict[str, Any]) -> list[str]:
        """The names of what :meth:`check_identity` can't look at, because an earlier version did not write it."""
        return checkpoint_format_1.not_comparable(self.identity, identity) if self.format == 1 else []

    def load(self) -> dict[str, Any]:
        """The tensors, on the CPU, as :func:`save_checkpoint` is given them."""
        tensors: dict[str, Any] = self._load()
        return tensors

    def _load(self, **options: Any) -> Any:
        tensors = torch.load(self.directory / _TENSORS, map_location="cpu", weights_only=True, **options)
        return checkpoint_format_1.by_parameter(tensors)

    def find_misfit(self, shapes: Mapping[str, torch.Size]) -> str | None:
        """Says why the tensors can't be those of a model; None where they can. Reads no more of them than their names.

        Args:
            shapes: of the parameters that are trained, by name, in their order.
        """
        try:
            state = self._load(mmap=True)
            weights, ema = state["weights"], state["ema"]
            found = {name: value.shape for name, value in weights.items()}
            average = [value.shape for value in ema["average"]] if ema else None
            named = {key for key in ("step", "window") if isinstance(state[key], dict)}
        except Exception as error:  # whatever a file of anybody's can cause
            return f"its tensors can't be read ({type(error).__name__})"
        if list(found.items()) != list(shapes.items()):  # optimizers and averages know parameters by their order
            return "its tensors are not those of this model"
        if average is not None and average != list(shapes.values()):
            return "its average is not one of this model"
        return None if len(named) == 2 else "its optimizer's state is missing"


def save_checkpoint(
    root: Path,
    step: int,
    identity: dict[str, Any],
    tensors: dict[str, Any],
    *,
    keep: int,
    record: dict[str, Any] | None = None,
    pictures: Iterable[Path] = (),
    owns: Callable[[Checkpoint], bool] | None = None,
) -> Checkpoint:
    """Writes ``root/step-N`` so that it is there whole or not at all; it and the ``keep - 1`` before it are kept.

    Args:
        owns: whether a checkpoint is this job's, and may give way; by default those of the same identity.
        record: what the job has to tell so far, as JSON's types.
        pictures: that were drawn so far; copied.
    """
    record = record or {}
    owns = owns or (lambda checkpoint: checkpoint.belongs_to(identity))
    final = root / own_name(step, {checkpoint.directory.name: owns(checkpoint) for checkpoint in all_checkpoints(root)})
    partial = root / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        crc32 = _write(partial, step, identity, tensors, record, pictures)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    own = [checkpoint for checkpoint in all_checkpoints(root) if owns(checkpoint)]
    # Later steps are those of a run that this one has replaced, and would be taken for the newest of this one.
    replaced = [checkpoint for checkpoint in own if checkpoint.step > step]
    before = [checkpoint for checkpoint in own if checkpoint.step <= step]
    for checkpoint in (*replaced, *before[:-keep]):
        shutil.rmtree(checkpoint.directory, ignore_errors=True)
    return Checkpoint(final, step, identity, crc32, record)


def own_name(step: int, there: Mapping[str, bool]) -> str:
    """The name for a job's checkpoint of a step: of its own that it replaces, or one that no other job's has.

    Args:
        there: the names of the whole checkpoints, and whether they are the job's.
    """
    plain = f"step-{step:08d}"
    names = [plain, *(f"{plain}-{number}" for number in range(2, len(there) + 2))]
    return next((name for name in names if there.get(name)), None) or next(name for name in names if name not in there)


def _write(
    directory: Path,
    step: int,
    identity: dict[str, Any],
    tensors: dict[str, Any],
    record: dict[str, Any],
    pictures: Iterable[Path],
) -> int:
    """Writes all files of a checkpoint; the CRC-32 of its tensors."""
    directory.mkdir(parents=True)
    with (directory / _TENSORS).open("wb") as stream, _without_torchs_checksums():
        written = _Checksummed(stream)
        try:
            torch.save(tensors, cast("BinaryIO", written))
        except RuntimeError:
            if written.error:  # torch hides it
                raise written.error from None
            raise
    for picture in pictures:
        (directory / _PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(picture, directory / _PICTURES / picture.name)
    state = {
        "format": FORMAT,
        "step": step,
        "identity": identity,
        "bytes": written.bytes,
        "crc32": written.crc32,
        "record": record,
    }
    (directory / STATE).write_text(json.dumps(state | {"state_crc32": _crc32_of(state)}, indent=1))
    return written.crc32


@contextlib.contextmanager
def _without_torchs_checksums() -> Iterator[None]:
    """Ours is computed of the same values."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Checksummed:
    """A file that computes the checksum of what is written to it, so that it need not be read again."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.bytes, self.crc32 = stream, 0, 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += len(data)
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()


def _crc32_of(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _default(name: str) -> Any:
    field = Hyperparameters.model_fields.get(name)
    return field.default if field else None


def _difference(name: str, was: Any, now: Any) -> str:
    """One difference between two identities, in words."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return f"{name} was {was!r} and is {now!r}"
    kinds = {
        "changed": [key for key in now if key in was and was[key] != now[key]],
        "new": [key for key in now if key not in was],
        "gone": [key for key in was if key not in now],
    }
    words = [
        f"{', '.join(keys[:_MOSTNAMED])}{f' and {len(keys) - _MOSTNAMED} more' if keys[_MOSTNAMED:] else ''} {kind}"
        for kind, keys in kinds.items()
        if keys
    ]
    return f"{name}: {'; '.join(words)}"


def _read(directory: Path) -> Checkpoint:
    """The checkpoint in a directory.

    Raises:
        ValueError: there is none that is whole; the message says why.
    """
    if directory.is_symlink() or (directory / STATE).is_symlink() or (directory / _TENSORS).is_symlink():
        raise ValueError("it is a link")
    try:
        if (directory / STATE).stat().st_size > LARGEST_STATE:
            raise ValueError(f"{STATE} is too large")
        checkpoint, expected = parse_state((directory / STATE).read_bytes(), directory)
        size = (directory / _TENSORS).stat().st_size if expected is not None else None
    except OSError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if size != expected:
        raise ValueError(f"{_TENSORS} has {size} of {expected} bytes")
    return checkpoint


def parse_state(content: bytes, directory: Path) -> tuple[Checkpoint, int | None]:
    """Reads a ``state.json``, and how many bytes the tensors have; None in another format.

    Args:
        directory: that it comes from, whose name says which step it has to be of.

    Raises:
        ValueError: it is not what this project writes; the message says why.
    """
    name = CHECKPOINT_NAME.fullmatch(directory.name)
    assert name is not None
    try:
        state = json.loads(content.decode())
        if not isinstance(state, dict) or state.pop("state_crc32", None) != _crc32_of(state):
            raise ValueError(f"{STATE} is not what was written")
        state = checkpoint_format_1.with_all_fields(state)
        if type(state["format"]) is int and state["format"] not in _READ:
            return Checkpoint(directory, int(name[1]), {}, 0, format=state["format"]), None
        _State.model_validate_json(json.dumps(state))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ValueError(f"{STATE}: {where} is not valid") from None
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if state["step"] != int(name[1]):
        raise ValueError(f"{STATE} is of step {state['step']}")
    found = Checkpoint(directory, state["step"], state["identity"], state["crc32"], state["record"], state["format"])
    return found, state["bytes"]


def _ignore(text: str) -> None:
    pass


def all_checkpoints(root: Path, warn: Callable[[str], object] = _ignore) -> list[Checkpoint]:
    """The whole checkpoints below ``root``, oldest first; ``warn`` is told of those that are not whole.

    Of the tensors only the size is looked at; see :meth:`Checkpoint.is_undamaged`.
    """
    found: list[Checkpoint] = []
    for directory in sorted(path for path in root.glob("step-*") if CHECKPOINT_NAME.fullmatch(path.name)):
        try:
            found.append(_read(directory))
        except ValueError as error:
            warn(f"the checkpoint {directory} is damaged and passed over: {error}")
    return found


def undamaged_checkpoints(
    root: Path, warn: Callable[[str], object] = _ignore, owns: Callable[[Checkpoint], bool] = lambda _: False
) -> Iterator[Checkpoint]:
    """Those of :func:`all_checkpoints` that are undamaged, the newest first; ``warn`` is told of the others.

    Args:
        owns: where it says so of any, the others are left out.
    """
    whole = all_checkpoints(root, warn)
    own = [checkpoint for checkpoint in whole if owns(checkpoint)]
    for checkpoint in reversed(own or whole):
        if checkpoint.is_undamaged():
            yield checkpoint
        else:
            warn(f"the checkpoint {checkpoint.directory} is damaged: going back to the one before")


def latest_checkpoint(root: Path, warn: Callable[[str], object] = _ignore) -> Checkpoint | None:
    """The first of :func:`undamaged_checkpoints`."""
    return next(undamaged_checkpoints(root, warn), None)
