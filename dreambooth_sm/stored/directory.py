"""diffusers pipeline directories."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTokenizer

from dreambooth_sm.errors import UserError
from dreambooth_sm.stored.files import Stored, open_tensors, write_safetensors
from dreambooth_sm.stored.layout import PARTS
from dreambooth_sm.stored.model import (
    Progress,
    StoredModel,
    check_complete,
    empty_module,
    make_pipeline,
    no_progress,
)

_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# Transformers wrote and read this prefix until 5.6, and still reads it.
_TEXT_PREFIX = "text_model."
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_ADVICE = "copy the directory again"


def read_directory(directory: Path) -> StoredModel:
    """Understands a pipeline directory without reading its weights; full-precision files are preferred.

    Raises:
        UserError: where it is damaged.
    """
    try:
        modules = {part: empty_module(part, read_config(directory / part)) for part in PARTS}
        tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer")
        scheduler = _scheduler(directory / "scheduler")
        extractor = directory / "feature_extractor"
        parts: dict[str, Any] = {
            **modules,
            "tokenizer": tokenizer,
            "scheduler": scheduler,
            "feature_extractor": CLIPImageProcessor.from_pretrained(extractor) if extractor.is_dir() else None,
        }
        tensors = {part: find_weights(directory / part, part) for part in PARTS}
    except UserError:
        raise
    except Exception as error:  # a damaged directory makes the libraries raise nearly anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{directory} can't be loaded ({reason}); copy the whole directory again") from None
    for part, module in modules.items():
        check_complete(str(directory), part, module, tensors[part], _ADVICE)
    return StoredModel(str(directory), make_pipeline(parts), tensors)


def read_config(directory: Path) -> dict[str, Any]:
    """A module's ``config.json``."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); {_ADVICE}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no configuration; {_ADVICE}")
    return config


def find_weights(directory: Path, part: str) -> dict[str, Stored]:
    """The tensors of a module's directory, under the names of today's diffusers and transformers.

    Args:
        part: one of ``PARTS``.
    """
    stem = _WEIGHTS[part]
    for suffix, name in (("safetensors", stem), ("bin", "pytorch_model" if part == "text_encoder" else stem)):
        variants: dict[str, list[Path]] = {}
        for path in sorted(directory.iterdir()):
            if match := re.fullmatch(rf"{name}(?:\.(\w+))?(-\d+-of-\d+)?\.{suffix}", path.name):
                variants.setdefault(match[1] or "", []).append(path)
        if variants:
            # Full precision first, where there is a choice.
            files = variants.get("") or variants.get("fp16") or next(iter(variants.values()))
            return {_today(name, part): tensor for file in files for name, tensor in open_tensors(file).tensors.items()}
    raise UserError(f"{directory} holds no weights such as {stem}.safetensors; {_ADVICE}")


def _today(name: str, part: str) -> str:
    if part == "text_encoder":
        return name.removeprefix(_TEXT_PREFIX)
    if part == "vae" and ".attentions." in name:
        for old, new in _OLD_ATTENTION.items():
            name = name.replace(old, new)
    return name


def _scheduler(directory: Path) -> SchedulerMixin:
    name = json.loads((directory / "scheduler_config.json").read_text(encoding="utf-8")).get("_class_name", "")
    kind: Any = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise UserError(f"{directory}: {name!r} is no scheduler of diffusers {diffusers.__version__}; {_ADVICE}")
    scheduler: SchedulerMixin = kind.from_pretrained(directory)  # type: ignore[attr-defined]
    return scheduler


def write_directory(
    model: StoredModel,
    directory: Path,
    *,
    dtype: torch.dtype | None = torch.float16,
    progress: Progress = no_progress,
) -> None:
    """Writes a pipeline directory that every version of diffusers and transformers reads.

    Args:
        dtype: of the weights; None keeps each as it is.
        progress: is called with the bytes of each tensor once they are written.
    """
    pipeline = model.pipeline
    directory.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        folder = directory / part
        folder.mkdir(exist_ok=True)
        if part == "text_encoder":
            _text_config(pipeline.text_encoder.config, dtype).save_pretrained(folder)
        else:
            getattr(pipeline, part).save_config(folder)
        prefix = _TEXT_PREFIX if part == "text_encoder" else ""
        tensors = {prefix + name: tensor for name, tensor in model.tensors[part].items()}
        write_safetensors(folder / f"{_WEIGHTS[part]}.safetensors", tensors, dtype=dtype, progress=progress)
    for name in ("tokenizer", "scheduler", "feature_extractor"):
        if (part_of := getattr(pipeline, name)) is not None:
            part_of.save_pretrained(directory / name)
    pipeline.save_config(directory)


def _text_config(config: CLIPTextConfig, dtype: torch.dtype | None) -> CLIPTextConfig:
    values = {**config.to_dict(), "architectures": ["CLIPTextModel"]}
    if dtype is not None:
        values["dtype"] = str(dtype).removeprefix("torch.")
    return CLIPTextConfig.from_dict(values)
