"""The model that an endpoint draws with: what a job left at its output prefix, as SageMaker mounts it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth_sm import sources
from dreambooth_sm.adapters.adapter import Adapter, check_fit, merge_stored
from dreambooth_sm.adapters.embedding_file import read_embedding
from dreambooth_sm.adapters.read import find_adapter, read_adapter
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods.lora import FILE
from dreambooth_sm.models import PretrainedModel, open_base, read_stored
from dreambooth_sm.serving.report import REPORT, trained_with
from dreambooth_sm.sources import is_local
from dreambooth_sm.stored.locate import INDEX
from dreambooth_sm.stored.model import MAKING

# Where SageMaker puts AdditionalModelDataSources, by the names of their channels.
ADDITIONAL = Path("/opt/ml/additional-model-data-sources")
# What a job with an upload of its own leaves in SageMaker's archive: where its model is.
_POINTER = "model_location.txt"


@dataclass(frozen=True)
class ServedModel:
    """A model, with what its job said of it.

    Attributes:
        prompts: of its subjects, by the names that requests may call them by.
        resolution: side of the pictures that it was trained on, in pixels; None where nobody says.
    """

    model: PretrainedModel
    prompts: Mapping[str, str] = field(default_factory=dict)
    resolution: int | None = None


def open_served(directory: Path, base: str | None) -> ServedModel:
    """Opens what a job left; no weights are read yet.

    Args:
        directory: holds a whole model, or an adapter or learned words, which go into their base model.
        base: the model that these lie beside; None: the one that the job's report names.

    Raises:
        UserError: where the model can't be found.
    """
    directory = _place_of(directory)
    report = read_report(directory)
    h = trained_with(report)
    file, words = None, {}
    if holds_model(directory) and not (directory / INDEX).is_file():
        file = adapter_file(directory)
        words = learned_words(directory, report)
    if file or words:
        model = open_beside(base, h, str(directory))
        if file:
            model = merged(model, read_adapter(file))
    elif base and not holds_model(directory):
        model = _open(base)
    else:
        model = PretrainedModel.of(str(directory), read_stored(directory))
    # What is trained beside a model that is exported as a whole lies beside it as well.
    words = words or learned_words(directory, report)
    return ServedModel(with_words(model, words), subject_prompts(report), h.resolution if h else None)


def _place_of(directory: Path) -> Path:
    """The directory itself, or what the pointer in it leads to."""
    if not directory.is_dir():
        return directory
    pointer = directory / _POINTER
    return sources.fetch(pointer.read_text(encoding="utf-8").strip()) if pointer.is_file() else directory


def holds_model(directory: Path) -> bool:
    """Whether a model's directory is there, and holds anything but folders of adapters."""
    return directory.is_dir() and any(
        path.is_file() and path.name != REPORT and not path.name.startswith(".") for path in directory.iterdir()
    )


def read_report(directory: Path) -> Mapping[str, Any]:
    """A job's report; empty where there is none, or something else by its name."""
    try:
        found = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def subject_prompts(report: Mapping[str, Any]) -> dict[str, str]:
    """The instance prompt of each subject, by the words that its class prompt does not have, and by the model's name
    where it knows one subject."""
    found: dict[str, str] = {}
    subjects = [each for each in report.get("subjects", ()) if isinstance(each, dict) and each.get("instance_prompt")]
    for subject in subjects:
        prompt = str(subject["instance_prompt"])
        own = {*prompt.split()} - {*str(subject.get("class_prompt") or "").split()}
        found |= dict.fromkeys(sorted(own), prompt)
    if len(subjects) == 1 and report.get("model_name"):
        found[str(report["model_name"])] = str(subjects[0]["instance_prompt"])
    return found


def open_beside(base: str | None, h: Hyperparameters | None, whose: str) -> PretrainedModel:
    """Opens the base model of what was trained beside one.

    Args:
        base: see :func:`open_served`.
        h: hyperparameters of the job.
        whose: what messages call what was trained.

    Raises:
        UserError: where it is not here.
    """
    if base:
        return _open(base)
    name = h.pretrained_model_name_or_path if h else None
    known = name and sources.RENAMED.get(name, name)
    if h is None or not known or (is_local(known) and not Path(known).exists()):
        said = f"{name}, which is not here" if name else "a model that nothing names"
        raise UserError(
            f"{whose} lies beside {said}; set SERVE_BASE_MODEL to it: a path, such as a channel {ADDITIONAL}/base of "
            "AdditionalModelDataSources, an s3:// location or a hub id"
        )
    return open_base(h)


def _open(name: str) -> PretrainedModel:
    return PretrainedModel.of(name, read_stored(sources.fetch(sources.RENAMED.get(name, name))))


def merged(base: PretrainedModel, adapter: Adapter) -> PretrainedModel:
    """A base model with an adapter in its weights, of whatever kind, once they are read; and with its learned words.

    Raises:
        UserError: where the adapter is for another model.
    """
    weights = {part: base.weights(part) for part in base.modules}
    shapes = {part: {name: each.shape for name, each in found.items()} for part, found in weights.items()}
    check_fit(adapter, shapes, base.name)
    changed = {part: merge_stored(layers, weights[part]) for part, layers in adapter.parts.items()}
    return with_words(base.with_weights(changed), adapter.words)


def with_words(model: PretrainedModel, words: Mapping[str, Mapping[str, Any]]) -> PretrainedModel:
    """A model that knows some words more.

    Args:
        words: ``(vectors, width)`` of each, by word and text encoder.
    """
    if not words:
        return model
    import torch

    from dreambooth_sm.adapters.learned_words import LearnedWords

    vectors = {
        part: {
            word: torch.nn.Parameter(of_parts[part].float(), requires_grad=False) for word, of_parts in words.items()
        }
        for part in model.text_parts
    }
    with MAKING:
        return LearnedWords(model, vectors).model


def adapter_file(directory: Path) -> Path | None:
    """The file of an adapter in a directory that a job left, or that holds one alone.

    Raises:
        UserError: where a file is damaged.
    """
    return directory / FILE if (directory / FILE).is_file() else find_adapter(directory)


def learned_words(directory: Path, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The words that a job learned, ``(vectors, width)`` by word and text encoder, from their files."""
    h = trained_with(report)
    files = {word: directory / f"{word}.safetensors" for word in (h.placeholders if h else ())}
    return {word: read_embedding(path) for word, path in files.items() if path.is_file()}
