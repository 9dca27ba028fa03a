"""Model files, opened by what they hold: their names say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import DTYPES, Stored, TensorFile, at
from dreambooth_sm.stored.locate import PICKLE, SAFETENSORS, find_kind
from dreambooth_sm.stored.pickles import open_pickle
from dreambooth_sm.stored.scales import with_scales

_GIT_LFS = b"version https://git-lfs"


def open_tensors(path: Path) -> TensorFile:
    """Finds the tensors of a safetensors file or of a pickle (``.ckpt``, ``.pt``, ``.bin``), and reads none but scales.

    Names are as they were before programs that wrap modules put theirs before them; weights are multiplied by their
    scales, see :func:`dreambooth_sm.stored.scales.with_scales`.

    Raises:
        UserError: where the file is damaged, neither of both, or holds a pickle that wants more than tensors.
    """
    try:
        with path.open("rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    if start.startswith(_GIT_LFS):
        raise UserError(f"{path} is a git-lfs pointer, not the model; run git lfs pull, and copy it again")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page, not the model; download it again, signed in where the site asks for it")
    kind = find_kind(path)
    if kind == SAFETENSORS:
        file = _open_safetensors(path)
    elif kind == PICKLE:
        file = open_pickle(path)
    else:
        raise UserError(f"{path} is neither a safetensors file nor one that torch.save wrote; name a model's file")
    return TensorFile(path, with_scales(_unwrapped(file.tensors)), file.notes)


def _unwrapped(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Names without those of DataParallel and torch.compile."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _open_safetensors(path: Path) -> TensorFile:
    try:
        with path.open("rb") as file:
            with safe_open(path, "pt"):
                pass  # checks the header against the file
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
    notes = header.pop("__metadata__", {})
    foreign = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if foreign:
        raise UserError(f"{path} holds tensors of type {', '.join(foreign)}; take a version in fp16, bf16 or fp32")
    tensors = {
        name: at(path, 8 + length + entry["data_offsets"][0], DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
    }
    return TensorFile(path, tensors, notes)
