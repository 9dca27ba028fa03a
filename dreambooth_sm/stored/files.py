"""Tensors in files: found without being read, and read and written in small pieces by a few threads.

Neither a second copy of the weights nor a memory map is ever held: what a module is made of is read into its own
memory, and what is converted passes through memory piece by piece.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dreambooth_sm.errors import UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 8
_GIT_LFS = b"version https://git-lfs"
# Stands for the hash in a header until the data that it is made of has been written.
_NO_HASH = "0x" + "0" * 64
HASH_FIELD = "modelspec.hash_sha256"
# Threads that read and write, and elements that each handles at a time: so few that they stay in a core's cache.
_WORKERS = 4
_PIECE = 1 << 19

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is wanted.

    Attributes:
        piece: makes a flat tensor of the elements from one number to before another, rows one after another; anew each
            time where it comes from a file.
        in_pieces: whether a piece costs no more than its part of the whole; :meth:`spans` has one otherwise.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    piece: Callable[[int, int], Tensor]
    in_pieces: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        def piece(start: int, stop: int) -> Tensor:
            return tensor.detach().flatten()[start:stop]

        return cls(tensor.dtype, tuple(tensor.shape), piece, tensor.is_contiguous())

    def read(self) -> Tensor:
        """All of it, on the CPU where it comes from a file."""
        return self.piece(0, self.numel).reshape(self.shape)

    def load(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """All of it in this precision and place; what has to be converted or moved passes through in pieces."""
        if dtype == self.dtype and device.type == "cpu":
            return self.read()
        whole = torch.empty(self.shape, dtype=dtype, device=device)
        flat = whole.view(-1)
        for start, stop in self.spans():
            flat[start:stop].copy_(self.piece(start, stop))
        return whole

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where each piece begins and ends."""
        size = _PIECE if self.in_pieces else self.numel
        for start in range(0, self.numel, size or 1):
            yield start, min(start + size, self.numel)

    def reshaped(self, shape: tuple[int, ...]) -> Stored:
        return replace(self, shape=shape)

    def transposed(self) -> Stored:
        """A matrix with rows and columns exchanged."""
        return Stored(self.dtype, self.shape[::-1], lambda start, stop: self.read().t().flatten()[start:stop], False)

    def third(self, number: int) -> Stored:
        """One of three equal parts along the first dimension."""
        shape = (self.shape[0] // 3, *self.shape[1:])
        first = number * math.prod(shape)
        return replace(self, shape=shape, piece=lambda start, stop: self.piece(first + start, first + stop))

    @classmethod
    def stacked(cls, parts: list[Stored]) -> Stored:
        """``parts`` of one shape, one after another along the first dimension."""
        size = parts[0].numel
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

        def piece(start: int, stop: int) -> Tensor:
            spans = [(max(start - first, 0), min(stop - first, size)) for first in range(0, size * len(parts), size)]
            return torch.cat([part.piece(*span) for part, span in zip(parts, spans, strict=True) if span[0] < span[1]])

        return replace(parts[0], shape=shape, piece=piece, in_pieces=all(part.in_pieces for part in parts))


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file, and what it says about itself.

    Attributes:
        notes: a safetensors file's metadata; what else a pickle holds, such as ``global_step``.
    """

    path: Path
    tensors: dict[str, Stored]
    notes: dict[str, Any]


def open_tensors(path: Path) -> TensorFile:
    """Finds the tensors of a ``.safetensors`` file or of a pickle (``.ckpt``, ``.pt``, ``.bin``), and reads none.

    Raises:
        UserError: where the file is damaged, or holds a pickle that wants more than tensors.
    """
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_pickle(path)


def load_tensors(
    tensors: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype], device: torch.device
) -> dict[str, Tensor]:
    """Reads tensors, several at a time, each into memory of its own.

    Args:
        dtypes: of the results.
    """
    with _workers() as pool:
        loaded = pool.map(lambda name: tensors[name].load(dtypes[name], device), tensors)
        return dict(zip(tensors, loaded, strict=True))


@contextlib.contextmanager
def _workers() -> Iterator[Executor]:
    """Threads for reading, converting and writing; torch's own are kept out of their way meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(_WORKERS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _in_order(pool: Executor, act: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What ``act`` makes of each item, in their order; only a few are made before they are asked for."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(act, item))
        if len(waiting) > 2 * _WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _at(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
    """A contiguous tensor at ``offset`` bytes into a file."""

    def piece(start: int, stop: int) -> Tensor:
        tensor = torch.empty(stop - start, dtype=dtype)
        if tensor.numel():
            with path.open("rb") as file:
                file.seek(offset + start * dtype.itemsize)
                got = file.readinto(_bytes(tensor))
            if got != tensor.nbytes:
                raise UserError(f"{path} ends in the middle of a tensor; copy it again")
        return tensor

    return Stored(dtype, shape, piece)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _open_safetensors(path: Path) -> TensorFile:
    try:
        with path.open("rb") as file:
            start = file.read(len(_GIT_LFS))
            if start == _GIT_LFS:
                raise UserError(f"{path} is a git-lfs pointer, not the model; run git lfs pull, and copy it again")
            with safe_open(path, "pt"):
                pass  # checks the header against the file
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); copy it again") from None
    notes = header.pop("__metadata__", {})
    foreign = sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES))
    if foreign:
        raise UserError(f"{path} holds tensors of type {', '.join(foreign)}; take a version in fp16, bf16 or fp32")
    tensors = {
        name: _at(path, 8 + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
    }
    return TensorFile(path, tensors, notes)


class _ModelCheckpoint:
    """Stands for Lightning's callback, whose class old checkpoints name without using it."""


_HARMLESS: list[Any] = [(_ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def _open_pickle(path: Path) -> TensorFile:
    """With torch's weights-only loading, which runs no code of the file."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
        zipped = zipfile.is_zipfile(path)
        if start == b"PK" and not zipped:
            raise UserError(f"{path} is cut off; copy it again")
        with safe_globals(_HARMLESS):
            if zipped and (wanted := get_unsafe_globals_in_checkpoint(path)):
                raise _refused(path, ", ".join(wanted))
            if zipped:
                with FakeTensorMode():  # gives tensors that know where in the file they lie
                    loaded = torch.load(path, weights_only=True)
                    tensors, notes = _tensors(loaded, lambda tensor: _in_zip(path, tensor))
            else:  # as torch wrote files before 1.6
                loaded = torch.load(path, weights_only=True, map_location="cpu")
                tensors, notes = _tensors(loaded, Stored.of)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        refusal = next((line for line in lines if "GLOBAL" in line), None)
        if refusal:
            name = refusal.split("GLOBAL")[1].split()[0]
            raise _refused(path, name) from None
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{path} is no whole checkpoint file ({reason[:200]}); copy it again") from None
    if not tensors:
        raise UserError(f"{path} holds no tensors; name a Stable Diffusion checkpoint")
    return TensorFile(path, tensors, notes)


def _refused(path: Path, names: str) -> UserError:
    return UserError(
        f"{path} is refused: it wants to run {names} while it is read, and a model needs nothing but tensors; "
        "take its .safetensors version"
    )


def _tensors(loaded: Any, stored: Callable[[Tensor], Stored]) -> tuple[dict[str, Stored], dict[str, Any]]:
    notes: dict[str, Any] = {}
    while isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        notes |= {key: value for key, value in loaded.items() if isinstance(value, int | str)}
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        return {}, notes
    return {str(key): stored(value) for key, value in loaded.items() if isinstance(value, Tensor)}, notes


def _in_zip(path: Path, tensor: Tensor) -> Stored:
    """A tensor of a checkpoint that was opened under FakeTensorMode; see torch's notes on serialization."""
    storage: Any = tensor.untyped_storage()
    dtype, shape, strides = tensor.dtype, tuple(tensor.shape), tensor.stride()
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    length = last + 1 if tensor.numel() else 0
    offset = storage._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
    stored = _at(path, offset, dtype, (length,))
    if tensor.is_contiguous():
        return stored.reshaped(shape)
    return Stored(
        dtype, shape, lambda start, stop: stored.read().as_strided(shape, strides).flatten()[start:stop], False
    )


class OutOfRange(Exception):  # noqa: N818
    """A weight that can't be written in the precision that is asked for.

    Attributes:
        finite: whether it is a number before it is converted.
    """

    def __init__(self, name: str, dtype: torch.dtype, finite: bool) -> None:
        self.finite = finite
        kind = (
            f"values beyond the range of {str(dtype).removeprefix('torch.')}"
            if finite
            else "values that are not finite"
        )
        super().__init__(f"{name} has {kind}")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Stored],
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Writes a safetensors file, piece by piece; it has its name once it is whole.

    Args:
        dtype: of the floating-point tensors in the file; None leaves them as they are.
        notes: the file's metadata. A value for ``modelspec.hash_sha256`` is replaced by the hash of the file's tensors.
        progress: is called with the bytes of each piece once they are written.

    Raises:
        OutOfRange: where a tensor is not finite in ``dtype``; nothing is written.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(notes or {})}}
    if notes and HASH_FIELD in notes:
        entries["__metadata__"][HASH_FIELD] = _NO_HASH
    dtypes = {
        name: dtype if dtype and value.dtype.is_floating_point else value.dtype for name, value in tensors.items()
    }
    # Largest items first, as the format's own writer does: every tensor is then aligned to its items.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    offset = 0
    for name in order:
        size = tensors[name].numel * dtypes[name].itemsize
        entries[name] = {
            "dtype": _NAMES[dtypes[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    hashed = hashlib.sha256() if notes and HASH_FIELD in notes else None
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb", buffering=0) as file, _workers() as pool:
            start_of_data = 8 + len(header)
            _write_at(file.fileno(), 0, memoryview(len(header).to_bytes(8, "little") + header))

            def write(span: tuple[str, int, int]) -> memoryview:
                name, start, stop = span
                piece = tensors[name].piece(start, stop)
                converted = piece.to("cpu", dtypes[name])
                if dtype == converted.dtype and not _is_finite(converted):
                    raise OutOfRange(name, dtype, _is_finite(piece))
                data = _bytes(converted)
                first = start_of_data + entries[name]["data_offsets"][0]
                _write_at(file.fileno(), first + start * dtypes[name].itemsize, data)
                return data

            for data in _in_order(pool, write, ((name, *span) for name in order for span in tensors[name].spans())):
                if hashed:
                    hashed.update(data)
                progress(data.nbytes)
            if hashed:
                digest = f"0x{hashed.hexdigest()}".encode()
                _write_at(file.fileno(), 8 + header.index(_NO_HASH.encode()), memoryview(digest))
        os.replace(partial, path)  # noqa: PTH105 - one step
    finally:
        partial.unlink(missing_ok=True)


def _is_finite(tensor: Tensor) -> bool:
    # Both are NaN where any value is; ten times as fast as looking at each.
    return all(math.isfinite(each) for each in tensor.aminmax())


def _write_at(file: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
