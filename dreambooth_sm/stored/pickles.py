"""Checkpoints that ``torch.save`` wrote: their tensors, found without being read, as ``torch.load`` would give them."""

from __future__ import annotations

import io
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import safe_globals

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import Stored, TensorFile, at

ZIP = b"PK\3\4"
_LOCAL_HEADER, _ENCRYPTED = 30, 1
# Records that say where and in which order of bytes storages lie, which is looked at here.
_ABOUT_STORAGES = ("byteorder", ".format_version", ".storage_alignment")
_CONTENT = ("data.pkl", "version", ".data/version")
# Types that torch.save stores as bare bytes, which torch.load leaves in their order.
_BARE = (torch.uint16, torch.uint32, torch.uint64)
# What trainers put beside the tensors. It is never made: stand-ins take its place.
_TRAINERS = re.compile(r"(pytorch_lightning|lightning|numpy|omegaconf|argparse|pathlib|typing|enum)\..+")
# What the tensors are called where a checkpoint holds more, in the order of preference.
_WEIGHTS = ("state_dict", "module", "model", "model_state_dict")


class _StandIn:
    """Takes the place of an object that comes with the tensors, and forgets all about it."""

    def __new__(cls, *_args: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_args: Any) -> None:
        """Takes whatever the object was made of."""

    def __setstate__(self, state: Any) -> None:
        """Takes whatever the object was."""


def open_pickle(path: Path) -> TensorFile:
    """Finds the tensors with torch's weights-only loading, which runs no code of the file.

    Raises:
        UserError: where torch can't read the file, or it wants more than tensors and what trainers put beside them.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(ZIP)) == ZIP  # as torch tells its two formats apart
        if zipped:
            archive = _Archive(path)
            skeleton, names = archive.skeleton()
            with FakeTensorMode():  # gives tensors that know where in the skeleton their storage lies
                loaded = _load(path, lambda: io.BytesIO(skeleton))
                tensors, notes = _found(loaded, lambda key, tensor: archive.stored(key, tensor, names))
        else:  # as torch wrote files before 1.6
            tensors, notes = _found(_load(path, lambda: path), lambda key, tensor: Stored.of(tensor))
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint file ({reason[:200]}); copy it again") from None
    if not tensors and "activation_func" in notes:
        raise UserError(f"{path} is a hypernetwork of WebUI, which goes beside a model; name the model, or an adapter")
    if not tensors:
        raise UserError(f"{path} holds no tensors; name a Stable Diffusion checkpoint")
    return TensorFile(path, tensors, notes)


def _load(path: Path, source: Callable[[], Any]) -> Any:
    stand_ins: list[Any] = []
    while True:
        try:
            with safe_globals(stand_ins):
                return torch.load(source(), weights_only=True, map_location="cpu")
        except Exception as error:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            if wanted is None:
                raise
            name = wanted[1]
            if not _TRAINERS.fullmatch(name) or any(known == name for _, known in stand_ins):
                raise UserError(
                    f"{path} is refused: it wants to run {name}, and a checkpoint needs to run nothing; take a "
                    ".safetensors version of the model"
                ) from None
            stand_ins.append((_StandIn, name))


def _found(loaded: Any, stored: Callable[[str, Tensor], Stored]) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of the mapping that holds the most, and the numbers and texts beside them."""
    mappings = list(_mappings(loaded))
    weights = max(
        mappings, key=lambda mapping: sum(isinstance(value, Tensor) for value in mapping.values()), default={}
    )
    notes = {
        str(key): value
        for mapping in (*mappings[:1], weights)
        for key, value in mapping.items()
        if isinstance(value, int | str)
    }
    found = {str(key): stored(str(key), value) for key, value in weights.items() if isinstance(value, Tensor)}
    return found, notes


def _mappings(value: Any, depth: int = 3) -> Iterator[Mapping[Any, Any]]:
    """A mapping and those within, by the name that weights mostly have first."""
    if isinstance(value, Mapping):
        yield value
        inner = {key: value[key] for key in _WEIGHTS if key in value} | dict(value)
        if depth:
            for each in inner.values():
                yield from _mappings(each, depth - 1)


class _Archive:
    """A zip file as torch reads it, whoever wrote it: records may be deflated, in any order, at any place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as file:
            self._root = file.namelist()[0].partition("/")[0] + "/"  # as torch finds it
            records = [each for each in file.infolist() if each.filename.startswith(self._root) and not each.is_dir()]
        self._records = {record.filename.removeprefix(self._root): record for record in records}
        if len(self._records) < len(records):
            raise ValueError("it holds a record twice")
        order = self._read("byteorder").decode() if "byteorder" in self._records else "little"
        if order not in ("little", "big"):
            raise ValueError(f"unknown order of bytes: {order:.20}")
        self._swapped = order != sys.byteorder

    def skeleton(self) -> tuple[bytes, dict[int, str]]:
        """The archive without what the storages hold, and the record that begins at each offset into it."""
        buffer, names = io.BytesIO(), {}
        with zipfile.ZipFile(buffer, "w") as small:
            for name in self._records.keys() - set(_ABOUT_STORAGES):
                small.writestr(f"{self._root}{name}", self._read(name) if name in _CONTENT else b"")
                written = small.infolist()[-1]
                names[written.header_offset + _LOCAL_HEADER + len(written.filename.encode())] = name
        return buffer.getvalue(), names

    def stored(self, key: str, tensor: Tensor, names: Mapping[int, str]) -> Stored:
        """A tensor that was loaded from the skeleton, as it lies in this archive."""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
            raise UserError(f"{self.path}: {key} is not a plain tensor; take a .safetensors version of the model")
        storage: Any = tensor.untyped_storage()
        name = names[storage._checkpoint_offset]
        dtype, shape, strides = tensor.dtype, tuple(tensor.shape), tensor.stride()
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        length, first = last + 1 if tensor.numel() else 0, int(tensor.storage_offset())
        if (first + length) * dtype.itemsize > self._records[name].file_size:
            raise UserError(f"{self.path} ends in the middle of {key}; copy it again")
        flat = self._flat(name, first, length, dtype)
        if self._swapped and dtype.itemsize > 1 and dtype not in _BARE:
            flat = _swapped(flat)
        if tensor.is_contiguous():
            return flat.reshaped(shape)
        return Stored(
            dtype, shape, lambda start, stop: flat.read().as_strided(shape, strides).flatten()[start:stop], False
        )

    def _flat(self, name: str, first: int, length: int, dtype: torch.dtype) -> Stored:
        """Items of a storage, one after another."""
        record = self._records[name]
        if record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & _ENCRYPTED:
            return at(self.path, self._offset(name) + first * dtype.itemsize, dtype, (length,))

        def piece(start: int, stop: int) -> Tensor:
            if start == stop:
                return torch.empty(0, dtype=dtype)
            content = bytearray(self._read(name))
            return torch.frombuffer(content, dtype=dtype, count=stop - start, offset=(first + start) * dtype.itemsize)

        return Stored(dtype, (length,), piece, in_pieces=False)

    def _offset(self, name: str) -> int:
        """Finds where a record's bytes begin. Only the header before them says so; the directory's may differ."""
        with self.path.open("rb") as file:
            file.seek(self._records[name].header_offset)
            header = file.read(_LOCAL_HEADER)
        if header[:4] != ZIP or len(header) < _LOCAL_HEADER:
            raise ValueError(f"the record {name:.100} is not where the directory has it")
        lengths = (int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little"))
        return self._records[name].header_offset + _LOCAL_HEADER + sum(lengths)

    def _read(self, name: str) -> bytes:
        """All of a record. Its checksum is not looked at, as torch does not either, which may have written none."""
        record = self._records[name]
        with self.path.open("rb") as file:
            file.seek(self._offset(name))
            content = file.read(record.compress_size)
        if record.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, record.file_size)
        elif record.compress_type != zipfile.ZIP_STORED or record.flag_bits & _ENCRYPTED:
            raise ValueError(f"the record {name:.100} is stored in a way that torch does not read")
        if len(content) != record.file_size:
            raise ValueError(f"the record {name:.100} ends early")
        return content


def _swapped(stored: Stored) -> Stored:
    """With each number's bytes in the other order."""
    size = stored.dtype.itemsize // (2 if stored.dtype.is_complex else 1)

    def piece(start: int, stop: int) -> Tensor:
        content = stored.piece(start, stop).view(torch.uint8).view(-1, size)
        return content.flip(1).reshape(-1).view(stored.dtype)

    return Stored(stored.dtype, stored.shape, piece, stored.in_pieces)
