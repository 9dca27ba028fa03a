"""Files of models and adapters from one format to another: no GPU, and a few small pieces in memory at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from dreambooth_sm import sources
from dreambooth_sm.adapters.adapter import Adapter, check_fit, merged_weight
from dreambooth_sm.adapters.base_model import base_model, guessed_configs
from dreambooth_sm.adapters.comfy_file import write_comfy
from dreambooth_sm.adapters.extract import adapted, extract
from dreambooth_sm.adapters.kohya_file import check_carried, write_kohya
from dreambooth_sm.adapters.layers import Layer
from dreambooth_sm.adapters.peft_file import CONFIG_FIELD, write_peft
from dreambooth_sm.adapters.read import find_adapter, read_adapter
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import family_of
from dreambooth_sm.models import find_denoiser, read_stored
from dreambooth_sm.stored.directory import write_directory
from dreambooth_sm.stored.files import HASH_FIELD, OutOfRange, Stored
from dreambooth_sm.stored.layout import Configs
from dreambooth_sm.stored.model import StoredModel
from dreambooth_sm.stored.single_file import write_single_file

EXPORT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FilePrecision = Literal["keep", "fp16", "bf16", "fp32"]
AdapterLayout = Literal["diffusers", "kohya", "comfyui"]
# Metadata of an adapter's file that is written again, or was of the old file alone.
_OWN_NOTES = ("format", "ss_network_", "sshs_", CONFIG_FIELD, HASH_FIELD)


def convert(
    source: str,
    target: Path,
    *,
    precision: FilePrecision = "keep",
    use_ema: bool = False,
    prediction_type: str | None = None,
    layout: AdapterLayout | None = None,
    parts: str | None = None,
) -> tuple[str, ...]:
    """Writes a model in the other format, with a progress bar; or an adapter in the other layout.

    Args:
        source: single-file checkpoint, diffusers directory, ``s3://`` location or hub id; or an adapter's file.
        target: a ``.safetensors`` file in the original layout; any other name is that of a diffusers directory. Must
            not exist. An adapter's is always a ``.safetensors`` file.
        precision: of the weights; ``keep`` leaves each as it is.
        use_ema: takes the average that some checkpoints carry beside the UNet's weights.
        prediction_type: ``epsilon`` or ``v_prediction``; None to find out.
        layout: of the adapter's file; None for that which ``source`` does not have.
        parts: the model that the other parts come from, where ``source`` is a file of a denoiser alone.

    Returns:
        remarks on what was guessed of the source; for the user to read.

    Raises:
        UserError: where ``source`` is not such a model or adapter, or ``target`` can't be written.
    """
    _check_target(target)
    path = _fetch(source)
    if found := find_adapter(path):
        adapter = read_adapter(found)
        other = adapter.facts.adapters if adapter.layout == "diffusers" else "diffusers"
        to: AdapterLayout = layout or other
        _write_adapter(adapter, None, target, to, source, precision)
        told = () if base_model(adapter) else (f"{source} does not say what base model it is for",)
        return (*told, *_left_out(adapter, source, with_words=to == "kohya"))
    if layout:
        raise UserError(f"--layout is for adapters, and {source} is a model; leave it out")
    if parts:
        model = read_stored(path, parts=_fetch(parts))
    else:
        model = read_stored(path, use_ema=use_ema, prediction_type=prediction_type)
    _write_model(model, target, source, precision)
    return model.remarks


def merge_into(
    source: str,
    base: str,
    target: Path,
    *,
    strength: float = 1.0,
    precision: FilePrecision = "keep",
    parts: str | None = None,
) -> tuple[str, ...]:
    """Writes a base model with an adapter in its weights.

    Args:
        source: the adapter's file.
        base: as ``source`` of :func:`convert`, and so are ``target``, ``precision`` and ``parts``.
        strength: 0 leaves the base as it is, 1 takes all of what was trained.

    Returns:
        remarks; for the user to read.

    Raises:
        UserError: where ``source`` is no adapter, or one for another base model, or ``target`` can't be written.
    """
    _check_target(target)
    adapter = _adapter(source)
    model = read_stored(_fetch(base), parts=_fetch(parts) if parts else None)
    shapes = {part: {name: each.shape for name, each in found.items()} for part, found in model.tensors.items()}
    check_fit(adapter, shapes, base)
    tensors = {part: dict(found) for part, found in model.tensors.items()}
    for part, name, layer in adapter:
        tensors[part][f"{name}.weight"] = _merged(layer, tensors[part][f"{name}.weight"], strength)
    _write_model(replace(model, tensors=tensors), target, source, precision)
    return (*model.remarks, *_left_out(adapter, source))


def extract_from(
    source: str,
    base: str,
    target: Path,
    *,
    rank: int = 32,
    precision: FilePrecision = "fp16",
    layout: AdapterLayout | None = None,
    parts: str | None = None,
) -> tuple[str, ...]:
    """Writes a LoRA of what a model differs in from the base that it was trained from, with a progress bar.

    Args:
        source: the model, as that of :func:`convert`.
        base: the one that it was trained from.
        target: a ``.safetensors`` file that must not exist.
        rank: of each layer.
        precision: of the values; ``keep`` is fp32.
        layout: of the file; None for ``kohya`` or ``comfyui``, which most programs read.
        parts: of ``base``, see :func:`convert`. Where ``source`` is such a file, its other parts are the base's.

    Returns:
        how much of the difference is kept, and other remarks; for the user to read.

    Raises:
        UserError: where one of both is no model, they are not of one shape or do not differ, or ``target`` can't be
            written.
    """
    _check_target(target)
    _check_adapter_target(target)
    if rank < 1:
        raise UserError(f"--rank {rank}: the rank has to be at least 1")
    before = read_stored(_fetch(base), parts=_fetch(parts) if parts else None)
    facts = family_of(before.pipeline).facts
    path = _fetch(source)
    if find_denoiser(path):
        alone = read_stored(path, parts=_fetch(parts or base)).tensors[facts.denoiser]
        tuned = replace(before, name=source, tensors={**before.tensors, facts.denoiser: alone})
    else:
        tuned = read_stored(path)
    with tqdm(
        total=sum(len(before.tensors[part]) for part in adapted(before)), unit=" tensors", desc=target.name
    ) as bar:
        adapter, remarks = extract(tuned, before, rank, bar.update)
    _write_adapter(adapter, before.configs, target, layout or facts.adapters, source, precision)
    return tuple(remarks)


def _fetch(name: str) -> Path:
    return sources.fetch(sources.RENAMED.get(name, name))


def _check_target(target: Path) -> None:
    if os.path.lexists(target):
        raise UserError(f"{target} exists; name a new one")
    if target.suffix in (".ckpt", ".pt", ".bin"):
        raise UserError(f"{target}: pickles are read and never written; name a .safetensors file")


def _check_adapter_target(target: Path) -> None:
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: an adapter is one file; name one that ends in .safetensors")


def _adapter(source: str) -> Adapter:
    """Raises UserError where there is none."""
    path = sources.fetch(source)
    found = find_adapter(path)
    if found is None and path.is_dir():
        raise UserError(f"{source} holds no adapter, or several; name the file of a LoRA or of another adapter")
    return read_adapter(found or path)


def _left_out(adapter: Adapter, source: str, *, with_words: bool = False) -> tuple[str, ...]:
    """
    Args:
        with_words: whether its learned words are written.
    """
    told = []
    if adapter.words and not with_words:
        told.append(f"{source}: its learned words are left out: {', '.join(adapter.words)}")
    if adapter.unknown:
        count, first = len(adapter.unknown), adapter.unknown[0]
        told.append(f"{source}: {count} tensors are of no layer known here and are left out, such as {first}")
    return tuple(told)


def _merged(layer: Layer, weight: Stored, strength: float) -> Stored:
    """A weight with a layer in it, once it is read."""

    def piece(start: int, stop: int) -> torch.Tensor:
        return merged_weight(layer, weight.read(), strength).flatten()[start:stop]

    return weight.of_pieces(piece, in_pieces=False)


def _write_adapter(
    adapter: Adapter,
    configs: Configs | None,
    target: Path,
    layout: AdapterLayout,
    source: str,
    precision: FilePrecision,
) -> None:
    _check_adapter_target(target)
    notes = {key: value for key, value in adapter.notes.items() if not key.startswith(_OWN_NOTES)}
    facts = adapter.facts
    if layout not in ("diffusers", facts.adapters):
        raise UserError(f"--layout {layout} is not for {facts.title}: set it to diffusers or {facts.adapters}")
    if layout != "diffusers":
        check_carried(adapter, layout)
    dtype = EXPORT_DTYPES.get(precision)
    with _written(target, source):
        if layout == "kohya":
            write_kohya(target, adapter, configs or guessed_configs(adapter), dtype=dtype, notes=notes)
        elif layout == "comfyui":
            write_comfy(target, adapter, facts, dtype=dtype, notes=notes)
        else:
            write_peft(target, adapter, dtype=dtype, notes=notes)


def _write_model(model: StoredModel, target: Path, source: str, precision: FilePrecision) -> None:
    facts = family_of(model.pipeline).facts
    if target.suffix == ".safetensors" and not facts.has_single_file:
        raise UserError(f"{target}: {facts.title} models are written as directories; name one")
    dtype = EXPORT_DTYPES.get(precision)
    size = sum(
        tensor.numel * (dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype).itemsize
        for tensors in model.tensors.values()
        for tensor in tensors.values()
    )
    partial = target.with_name(target.name + ".partial")
    try:
        with _written(target, source), tqdm(total=size, unit="B", unit_scale=True, desc=target.name) as bar:
            if target.suffix == ".safetensors":
                write_single_file(model, target, dtype=dtype, progress=bar.update)
            else:
                write_directory(model, partial, dtype=dtype, progress=bar.update)
                partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _written(target: Path, source: str) -> Iterator[None]:
    """Makes the directory that a target goes into, and says what keeps it from being written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OutOfRange as error:
        advice = "take --precision bf16 or fp32" if error.finite else "the model is damaged"
        raise UserError(f"{source}: {error}; {advice}") from None
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror}") from None
