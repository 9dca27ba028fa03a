"""Files of learned words, and learned words in an adapter's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import Stored, write_safetensors
from dreambooth_sm.stored.opening import open_tensors

# Names of the tensors in files for models with several text encoders, in their order.
KEYS = ("clip_l", "clip_g")
_PARTS = {"string_to_param.*": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|clip_[lg])")

# What each word means to each text encoder, ``(vectors, width)``.
Words = Mapping[str, Mapping[str, Tensor]]


def write_embedding(
    path: Path, word: str, vectors: Mapping[str, Tensor], *, dtype: torch.dtype | None, trigger: str
) -> None:
    """Writes a file that diffusers, WebUI and ComfyUI read.

    Args:
        path: ends in ``.safetensors``.
        vectors: of the word, by text encoder, in the pipeline's order.
        dtype: of the values; None leaves them as they are.
        trigger: a prompt that the word is in, for the header.

    Raises:
        OutOfRange: where values are too large for ``dtype``; nothing is written.
    """
    found = list(vectors.values())
    # The only tensor of a file may have any name: diffusers takes it for the word.
    named = {word: found[0]} if len(found) == 1 else dict(zip(KEYS, found, strict=True))
    tensors = {name: Stored.of(tensor) for name, tensor in named.items()}
    write_safetensors(path, tensors, dtype=dtype, notes={"modelspec.trigger_phrase": trigger})


def bundled(words: Words) -> dict[str, Tensor]:
    """Words as tensors beside those of an adapter, by the names that WebUI and ComfyUI know."""
    tensors: dict[str, Tensor] = {}
    for word, vectors in words.items():
        keys = KEYS if len(vectors) > 1 else ("string_to_param.*",)
        for key, tensor in zip(keys, vectors.values(), strict=True):
            tensors[f"bundle_emb.{word}.{key}"] = tensor
    return tensors


def split_bundle(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The words in an adapter's file, and its other tensors."""
    words: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _BUNDLED.fullmatch(name):
            words.setdefault(match[1], {})[_PARTS[match[2]]] = tensor
        else:
            others[name] = tensor
    return {word: dict(sorted(vectors.items())) for word, vectors in words.items()}, others


def read_embedding(path: Path) -> dict[str, Tensor]:
    """What :func:`write_embedding` wrote: a word's vectors by text encoder.

    Raises:
        UserError: where the file is damaged, or holds something else.
    """
    found = {name: stored.read() for name, stored in open_tensors(path).tensors.items()}
    vectors = {_PARTS.get(name, "text_encoder"): value for name, value in found.items()}
    if not 1 <= len(vectors) == len(found) <= len(KEYS) or any(value.dim() != 2 for value in vectors.values()):
        raise UserError(f"{path} does not hold the vectors of a word")
    return dict(sorted(vectors.items()))
