"""Tensors in files, read and written in small pieces by a few threads.

Neither a second copy of the weights nor a memory map is ever held: what a module is made of is read into its own
memory, and what is converted passes through memory piece by piece.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dreambooth_sm.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8
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
        piece: makes a flat tensor of the elements from one number to before another, rows one after another; a new one
            each time where it comes from a file.
        in_pieces: whether a piece costs no more than its part of the whole; :meth:`spans` has one otherwise.
        companions: names of tensors beside it in its file, without which it can't be understood, nor with them.
        every: makes a flat tensor of one element in so many, from the first on, without reading those between; None
            where that is not possible.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    piece: Callable[[int, int], Tensor]
    in_pieces: bool = True
    companions: tuple[str, ...] = ()
    every: Callable[[int], Tensor] | None = None

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

    def sample(self, step: int) -> Tensor:
        """One element in ``step``, from the first on, as a flat tensor."""
        return self.every(step) if self.every else self.read().flatten()[::step]

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
        """Returns where each piece begins and ends."""
        size = _PIECE if self.in_pieces else self.numel
        for start in range(0, self.numel, size or 1):
            yield start, min(start + size, self.numel)

    def cast(self, dtype: torch.dtype) -> Stored:
        """The same values in another precision."""
        if dtype == self.dtype:
            return self
        every = self.every
        cast = self.of_pieces(lambda start, stop: self.piece(start, stop).to(dtype), dtype=dtype)
        return replace(cast, every=lambda step: every(step).to(dtype)) if every else cast

    def of_pieces(self, piece: Callable[[int, int], Tensor], **changes: Any) -> Stored:
        """Another tensor, which differs from this one in its pieces and in ``changes``."""
        return replace(self, piece=piece, every=None, **changes)

    def reshaped(self, shape: tuple[int, ...]) -> Stored:
        return replace(self, shape=shape)

    def transposed(self) -> Stored:
        """A matrix with rows and columns exchanged."""

        def piece(start: int, stop: int) -> Tensor:
            return self.read().t().flatten()[start:stop]

        return self.of_pieces(piece, shape=self.shape[::-1], in_pieces=False)

    def part(self, first: int, shape: tuple[int, ...]) -> Stored:
        """A tensor of the elements from the number ``first`` on."""
        return self.of_pieces(lambda start, stop: self.piece(first + start, first + stop), shape=shape)

    def third(self, number: int) -> Stored:
        """One of three equal parts along the first dimension."""
        shape = (self.shape[0] // 3, *self.shape[1:])
        return self.part(number * math.prod(shape), shape)

    @classmethod
    def stacked(cls, parts: list[Stored]) -> Stored:
        """``parts`` of one shape, one after another along the first dimension."""
        size = parts[0].numel
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

        def piece(start: int, stop: int) -> Tensor:
            spans = [(max(start - first, 0), min(stop - first, size)) for first in range(0, size * len(parts), size)]
            return torch.cat([part.piece(*span) for part, span in zip(parts, spans, strict=True) if span[0] < span[1]])

        return parts[0].of_pieces(piece, shape=shape, in_pieces=all(part.in_pieces for part in parts))


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file, and what it says about itself.

    Attributes:
        notes: a safetensors file's metadata; what else a pickle holds, such as ``global_step``.
    """

    path: Path
    tensors: dict[str, Stored]
    notes: dict[str, Any]


def load_tensors(
    tensors: Mapping[str, Stored], dtypes: Mapping[str, torch.dtype], device: torch.device
) -> dict[str, Tensor]:
    """Reads tensors, several at a time, each into memory of its own.

    Args:
        dtypes: of the results.
    """
    with workers() as pool:
        loaded = pool.map(lambda name: tensors[name].load(dtypes[name], device), tensors)
        return dict(zip(tensors, loaded, strict=True))


@contextlib.contextmanager
def workers() -> Iterator[Executor]:
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
    """Yields what ``act`` makes of each item, in their order; only a few are made before they are asked for."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(act, item))
        if len(waiting) > 2 * _WORKERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def at(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
    """A contiguous tensor at ``offset`` bytes into a file."""

    def piece(start: int, stop: int) -> Tensor:
        tensor = torch.empty(stop - start, dtype=dtype)
        if tensor.numel():
            with path.open("rb") as file:
                file.seek(offset + start * dtype.itemsize)
                got = file.readinto(as_bytes(tensor))
            if got != tensor.nbytes:
                raise UserError(f"{path} ends in the middle of a tensor; copy it again")
        return tensor

    def every(step: int) -> Tensor:
        size, numel = dtype.itemsize, math.prod(shape)
        with path.open("rb") as file:
            # A call for each costs less than the page faults of a map.
            items = [os.pread(file.fileno(), size, offset + number * size) for number in range(0, numel, step)]
        if any(len(item) < size for item in items):
            raise UserError(f"{path} ends in the middle of a tensor; copy it again")
        return torch.frombuffer(bytearray(b"".join(items)), dtype=dtype)

    return Stored(dtype, shape, piece, every=every if math.prod(shape) else None)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


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
    kept: Collection[str] = (),
    notes: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Writes a safetensors file, piece by piece; it has its name once it is whole.

    Args:
        dtype: of the floating-point tensors in the file; None leaves them as they are.
        kept: names of those that are float32 whatever the others are.
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
    } | dict.fromkeys(kept, torch.float32)
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
        with partial.open("wb", buffering=0) as file, workers() as pool:
            start_of_data = 8 + len(header)
            _write_at(file.fileno(), 0, memoryview(len(header).to_bytes(8, "little") + header))

            def write(span: tuple[str, int, int]) -> memoryview:
                name, start, stop = span
                piece = tensors[name].piece(start, stop)
                converted = piece.to("cpu", dtypes[name])
                if dtype == converted.dtype and not _is_finite(converted):
                    raise OutOfRange(name, dtype, _is_finite(piece))
                data = as_bytes(converted)
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
