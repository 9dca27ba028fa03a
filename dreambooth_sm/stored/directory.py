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
    Pipeline,
    Progress,
    StoredModel,
    check_complete,
    empty_module,
    make_pipeline,
    no_progress,
    tokenizers_of,
)
from dreambooth_sm.stored.tokenizer import write_json, write_tokenizer

# Transformers wrote and read this prefix until 5.6, and still reads it; with a projection it is there in all versions.
_TEXT_PREFIX = "text_model."
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_ADVICE = "copy the directory again"


def read_directory(directory: Path) -> StoredModel:
    """Understands a pipeline directory without reading its weights; full-precision files are preferred.

    Raises:
        UserError: where it is damaged.
    """
    try:
        index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
        names = PARTS[index["_class_name"]]
        modules = {part: empty_module(part, read_config(directory / part)) for part in names}
        extractor = directory / "feature_extractor"
        parts: dict[str, Any] = {
            **modules,
            **{name: CLIPTokenizer.from_pretrained(directory / name) for name in tokenizers_of(names)},
            "scheduler": _scheduler(directory / "scheduler"),
            "feature_extractor": CLIPImageProcessor.from_pretrained(extractor) if extractor.is_dir() else None,
        }
        pipeline = make_pipeline(parts, index)
        tensors = {part: find_weights(directory / part, part) for part in names}
    except UserError:
        raise
    except Exception as error:  # a damaged directory makes the libraries raise nearly anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{directory} can't be loaded ({reason}); copy the whole directory again") from None
    for part, module in modules.items():
        check_complete(str(directory), part, module, tensors[part], _ADVICE)
    return StoredModel(str(directory), pipeline, tensors)


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
        part: one of those that ``PARTS`` names.
    """
    stem = _weights_name(part)
    for suffix, name in (("safetensors", stem), ("bin", "pytorch_model" if stem == "model" else stem)):
        variants: dict[str, list[Path]] = {}
        for path in sorted(directory.iterdir()):
            if match := re.fullmatch(rf"{name}(?:\.(\w+))?(-\d+-of-\d+)?\.{suffix}", path.name):
                variants.setdefault(match[1] or "", []).append(path)
        if variants:
            # Full precision first, where there is a choice.
            files = variants.get("") or variants.get("fp16") or next(iter(variants.values()))
            return {_today(name, part): tensor for file in files for name, tensor in open_tensors(file).tensors.items()}
    raise UserError(f"{directory} holds no weights such as {stem}.safetensors; {_ADVICE}")


def _weights_name(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


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
    """Writes a pipeline directory that diffusers reads with transformers 4 and 5, with and without a ``dtype``.

    Args:
        dtype: of the weights; None keeps each as it is.
        progress: is called with the bytes of each tensor once they are written.
    """
    pipeline = model.pipeline
    directory.mkdir(parents=True, exist_ok=True)
    for part, stored in model.tensors.items():
        folder = directory / part
        folder.mkdir(exist_ok=True)
        if part.startswith("text_encoder"):
            write_json(folder / "config.json", _text_config(getattr(pipeline, part)))
        else:
            getattr(pipeline, part).save_config(folder)
        prefix = _TEXT_PREFIX if part == "text_encoder" else ""
        tensors = {prefix + name: tensor for name, tensor in stored.items()}
        write_safetensors(folder / f"{_weights_name(part)}.safetensors", tensors, dtype=dtype, progress=progress)
    for name in tokenizers_of(model.tensors):
        write_tokenizer(getattr(pipeline, name), directory / name)
    for name in ("scheduler", "feature_extractor"):
        if (part_of := getattr(pipeline, name)) is not None:
            part_of.save_pretrained(directory / name)
    _write_index(pipeline, directory)


def _write_index(pipeline: Pipeline, directory: Path) -> None:
    pipeline.save_config(directory)
    if pipeline.feature_extractor is not None:
        # Where torchvision is missing, transformers 5 calls its class by a name that transformers 4 does not know.
        path = directory / "model_index.json"
        index = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, index | {"feature_extractor": ["transformers", "CLIPImageProcessor"]})


def _text_config(text_encoder: Any) -> dict[str, Any]:
    """What the libraries load the text encoder as when they are told no type: diffusers loads its own modules in
    float32 then, and transformers 5 in the type that the configuration names (4 calls it ``torch_dtype``)."""
    values = {**text_encoder.config.to_dict(), "architectures": [type(text_encoder).__name__]}
    said: dict[str, Any] = json.loads(CLIPTextConfig.from_dict(values).to_json_string())
    return said | {"dtype": "float32"}
