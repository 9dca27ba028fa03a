"""Tensors in files: found without being read, read one at a time, and written one at a time.

Neither a second copy of the weights nor a memory map is ever held: what a module is made of is read straight into its
own memory, and what is converted passes through memory one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is wanted.

    Attributes:
        read: makes the tensor, anew each time where it comes from a file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.detach)

    def reshaped(self, shape: tuple[int, ...]) -> Stored:
        return Stored(self.dtype, shape, lambda: self.read().reshape(shape))

    def transposed(self) -> Stored:
        """A matrix with rows and columns exchanged."""
        return Stored(self.dtype, self.shape[::-1], lambda: self.read().t().contiguous())

    def third(self, number: int) -> Stored:
        """One of three equal parts along the first dimension."""
        rows = self.shape[0] // 3
        shape = (rows, *self.shape[1:])
        return Stored(self.dtype, shape, lambda: self.read()[number * rows : (number + 1) * rows])

    @classmethod
    def stacked(cls, parts: list[Stored]) -> Stored:
        """``parts`` of one shape, one after another along the first dimension."""
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return cls(parts[0].dtype, shape, lambda: torch.cat([part.read() for part in parts]))


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


def _at(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
    """A contiguous tensor at ``offset`` bytes into a file."""

    def read() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            with path.open("rb") as file:
                file.seek(offset)
                got = file.readinto(_bytes(tensor))
            if got != tensor.numel() * tensor.element_size():
                raise UserError(f"{path} ends in the middle of a tensor; copy it again")
        return tensor

    return Stored(dtype, shape, read)


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
    flat = _at(path, offset, dtype, (length,))
    return Stored(dtype, shape, lambda: flat.read().as_strided(shape, strides))


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Stored],
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> None:
    """Writes a safetensors file, one tensor at a time; the file has its name once it is whole.

    Args:
        dtype: of the floating-point tensors in the file; None leaves them as they are.
        notes: the file's metadata. A value for ``modelspec.hash_sha256`` is replaced by the hash of the file's tensors.
        progress: is called with the bytes of each tensor once they are written.
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
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name in order:
                data = _bytes(tensors[name].read().to("cpu", dtypes[name]).contiguous())
                file.write(data)
                if hashed:
                    hashed.update(data)
                progress(data.nbytes)
            if hashed:
                file.seek(8 + header.index(_NO_HASH.encode()))
                file.write(b"0x" + hashed.hexdigest().encode())
        os.replace(partial, path)  # noqa: PTH105 - one step
    finally:
        partial.unlink(missing_ok=True)
