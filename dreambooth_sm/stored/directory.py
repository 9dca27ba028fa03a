"""diffusers pipeline directories."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dreambooth_sm.errors import Problems, UserError
from dreambooth_sm.families import FAMILIES
from dreambooth_sm.stored.configs import class_name, make, make_module, read_json, read_tokenizer_directory
from dreambooth_sm.stored.denoiser_file import other_parts, read_denoiser
from dreambooth_sm.stored.files import Stored, TensorFile, write_safetensors
from dreambooth_sm.stored.kept_in_fp32 import kept_in_fp32
from dreambooth_sm.stored.layout import PARTS, today
from dreambooth_sm.stored.locate import INDEX
from dreambooth_sm.stored.model import (
    CLASSES,
    USUAL,
    VAE_SCALES,
    Pipeline,
    StoredModel,
    StoredPart,
    WriteProgress,
    check_complete,
    class_of,
    make_pipeline,
    no_progress,
    rules_of,
    tokenizers_of,
)
from dreambooth_sm.stored.noise_schedule import check_flow, check_schedule, make_scheduler
from dreambooth_sm.stored.opening import open_tensors
from dreambooth_sm.stored.recognise import held_alone
from dreambooth_sm.stored.tokenizer import write_json, write_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor

# Transformers wrote and read this prefix until 5.6, and still reads it; with a projection it is there in all versions.
_TEXT_PREFIX = "text_model."
_TITLES = [family.facts.title for family in FAMILIES.values()]
# Of CLIP, in all of Stable Diffusion.
_POSITIONS = 77
# How the kinds end of language models that are a part of a larger one.
_WITHIN = "_text"
_WHOLES = {"Qwen3VLTextModel": "Qwen3VLModel"}
# Whoever loads such a whole makes what sees pictures at random: as little of it as there can be.
_NO_EYES = {
    "depth": 0,
    "deepstack_visual_indexes": [],
    **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size", "num_heads", "num_position_embeddings"), 1),
}
# How rotary positions are scaled, which alone says nothing where they are not.
_KINDS = {"rope_type", "type"}
# Of T5, which would take any number: those of the longest prompts that it was trained with.
_T5_POSITIONS = 512
# What whole CLIP models, language models that see pictures, and older versions of transformers have beside the text
# encoder's weights.
_KNOWN_OTHERS = re.compile(
    r"(text_model\.)?embeddings\.position_ids|logit_scale|(vision_model|visual_projection)\..*|"
    r"text_projection\.weight|lm_head\.weight|visual\..*"
)


def read_directory(
    directory: Path,
    *,
    variant: str | None = None,
    prediction_type: str | None = None,
    vae: StoredPart | None = None,
    denoiser: TensorFile | None = None,
) -> StoredModel:
    """Understands a pipeline directory without reading its weights.

    Args:
        variant: of the weights' files, such as ``fp16``; parts that do not have it are taken in full precision.
        prediction_type: ``epsilon`` or ``v_prediction``, in place of what the directory says.
        vae: takes the place of the directory's own, which may then be missing.
        denoiser: a file of the weights of one, which take the place of the directory's own. Of these, the
            configuration has to be there.

    Raises:
        UserError: where it is damaged, or of another kind.
    """
    index, names = check_parts(directory, with_vae=vae is None)
    kind = class_name(index)
    if denoiser and (facts := held_alone(denoiser)) and facts.pipeline != kind:
        raise UserError(
            f"{denoiser.path} is of {facts.article} {facts.short} model, and {directory} holds a {kind}; name parts of "
            "the same kind of model"
        )
    given = {name for name, other in (("vae", vae), (names[0], denoiser)) if other}
    own = [name for name in names if name not in given]
    scheduler_file = directory / "scheduler" / "scheduler_config.json"
    if vae:
        config_file = directory / "vae" / "config.json"
        vae.scale_like(read_json(config_file) if config_file.is_file() else VAE_SCALES["text_encoder_2" in names])
    problems = Problems()
    parts: dict[str, Any] = {}
    tensors: dict[str, dict[str, Stored]] = {}
    left_out: list[str] = []
    for part in names:
        with problems.collected():
            file = denoiser if part == names[0] else None
            read = vae if part == "vae" and vae else read_part(directory / part, part, variant, kind, file)
            parts[part], tensors[part] = read.module, read.tensors
            left_out += _left_out(directory / part, read)
            if rules_of(kind):  # of language models much may be left out
                layers = read.module.state_dict()
                tensors[part] = {key: tensor for key, tensor in read.tensors.items() if key in layers}
    if denoiser and (others := other_parts(denoiser)):
        left_out.append(
            f"{denoiser.path}: {len(others)} tensors of other parts are left out, such as {min(others)}; these parts "
            f"are those of {directory}"
        )
    with problems.collected():
        config = read_json(scheduler_file) | ({"prediction_type": prediction_type} if prediction_type else {})
        parts["scheduler"], remarks = make_scheduler(config, str(scheduler_file))
        check = check_flow if rules_of(kind) else check_schedule
        check(parts["scheduler"], str(scheduler_file))
    for name in tokenizers_of(names):
        with problems.collected():
            encoder = parts.get(name.replace("tokenizer", "text_encoder"))
            positions = getattr(encoder.config, "max_position_embeddings", _T5_POSITIONS) if encoder else _POSITIONS
            parts[name] = read_tokenizer_directory(directory / name, positions, class_of(kind, name))
    if not rules_of(kind):
        with problems.collected():
            parts["feature_extractor"] = _feature_extractor(directory / "feature_extractor")
    problems.raise_any()
    if variant and not any(find_files(directory / part, part, variant)[1] for part in own):
        raise UserError(f"variant={variant}: {directory} has no files of it; leave variant out")
    name = str(denoiser.path if denoiser else directory)
    return StoredModel(name, make_pipeline(parts, index), tensors, (*remarks, *left_out))


def check_parts(directory: Path, *, with_vae: bool = True) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads ``model_index.json``, and the names of the modules with weights.

    Args:
        with_vae: whether the directory has to have a VAE.

    Raises:
        UserError: where the pipeline is not one that can be trained, or a part of it is missing.
    """
    where = directory / INDEX
    index = read_json(where)
    name = class_name(index)
    if not name:
        raise UserError(f"{where} can't be read: it names no pipeline (_class_name); copy it again")
    if name not in PARTS:
        raise UserError(f"{directory} holds a {name}; this project takes base models of {', '.join(_TITLES)}")
    names = PARTS[name]
    wanted = {part: class_of(name, part) for part in names if part != "vae" or with_vae}
    wanted |= {part: class_of(name, part) for part in tokenizers_of(names)}
    problems = [
        f"{where}: its {part} is a {entry[1]}; this project takes a {kind} there"
        for part, kind in wanted.items()
        if isinstance(entry := index.get(part), list)
        and entry[1:] not in ([], [None], *([each] for each in _named(kind)))
    ]
    problems += [
        f"{directory / part} is missing; copy the whole pipeline directory"
        for part in (*wanted, "scheduler")
        if not (directory / part).is_dir()
    ]
    if problems:
        raise UserError(problems)
    return index, names


def _named(kind: str) -> tuple[str, ...]:
    """What indices call a class: fast tokenizers have a name of their own, and language models one with their head, or
    with what lets them see pictures."""
    heads = kind.removesuffix("Model") + "ForCausalLM", kind.removesuffix("TextModel") + "ForConditionalGeneration"
    return kind, f"{kind}Fast", kind.replace("VLTextModel", "VLModel"), *heads


def read_part(
    directory: Path, part: str, variant: str | None = None, pipeline: str = USUAL, file: TensorFile | None = None
) -> StoredPart:
    """A module's directory, without reading its weights.

    Args:
        part: one of those that ``PARTS`` names.
        pipeline: name of the pipeline's class.
        file: has the weights of a denoiser, in place of the directory.

    Raises:
        UserError: where it is damaged, or of another kind of module.
    """
    path = directory / "config.json"
    module = make_module(part, read_json(path), str(path), pipeline)
    if file:
        return StoredPart(module, read_denoiser(file, part, module))
    files, _ = find_files(directory, part, variant)
    found = {name: tensor for file in files for name, tensor in open_tensors(file).tensors.items()}
    known = module.state_dict().keys()
    tensors = {today(name, part, known): tensor for name, tensor in found.items()}
    check_complete(str(directory), part, module, tensors)
    return StoredPart(module, tensors)


def _left_out(directory: Path, part: StoredPart) -> list[str]:
    others = [key for key in part.tensors.keys() - part.module.state_dict() if not _KNOWN_OTHERS.fullmatch(key)]
    if not others:
        return []
    return [
        f"{directory}: {len(others)} tensors are of no layer that its configuration names and are left out, such as "
        f"{min(others)}"
    ]


def find_files(directory: Path, part: str, variant: str | None = None) -> tuple[list[Path], bool]:
    """The files of a module's weights, and whether they are of the variant that was asked for. Full precision comes
    before other variants, and safetensors before pickles.

    Raises:
        UserError: where there are none.
    """
    stem = _weights_name(part)
    for suffix, name in (("safetensors", stem), ("bin", "pytorch_model" if stem == "model" else stem)):
        variants: dict[str, list[Path]] = {}
        for path in sorted(directory.iterdir()):
            if match := re.fullmatch(rf"{name}(?:\.(\w+))?(-\d+-of-\d+)?\.{suffix}", path.name, re.IGNORECASE):
                variants.setdefault(match[1] or "", []).append(path)
        if variant and variant in variants:
            return variants[variant], True
        if variants:
            return variants.get("") or variants.get("fp16") or next(iter(variants.values())), False
    raise UserError(f"{directory} holds no weights such as {stem}.safetensors; copy the directory again")


def _weights_name(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def _feature_extractor(directory: Path) -> CLIPImageProcessor | None:
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return None
    from dreambooth_sm.stored.classes import CLIPImageProcessor

    made: CLIPImageProcessor = make(CLIPImageProcessor.from_dict, read_json(path), str(path), "CLIPImageProcessor")
    return made


def write_directory(
    model: StoredModel,
    directory: Path,
    *,
    dtype: torch.dtype | None = torch.float16,
    progress: WriteProgress = no_progress,
) -> None:
    """Writes a pipeline directory that diffusers reads with transformers 4 and 5, with and without a ``dtype``.

    Args:
        dtype: of the weights; None keeps each as it is.
        progress: is called with the bytes of each tensor once they are written.
    """
    pipeline = model.pipeline
    directory.mkdir(parents=True, exist_ok=True)
    for part, stored in model.tensors.items():
        folder, module = directory / part, getattr(pipeline, part)
        folder.mkdir(exist_ok=True)
        if part.startswith("text_encoder"):
            write_json(folder / "config.json", _text_config(module))
        else:
            module.save_config(folder)
        tensors = {_prefix(module) + name: tensor for name, tensor in stored.items()}
        kept = [_prefix(module) + name for name in kept_in_fp32(module, stored, None)]
        path = folder / f"{_weights_name(part)}.safetensors"
        write_safetensors(path, tensors, dtype=dtype, kept=kept, progress=progress)
    for name in tokenizers_of(model.tensors):
        write_tokenizer(getattr(pipeline, name), directory / name)
    for name in ("scheduler", "feature_extractor"):
        if (part_of := getattr(pipeline, name, None)) is not None:
            part_of.save_pretrained(directory / name)
    _write_index(pipeline, directory)


def _write_index(pipeline: Pipeline, directory: Path) -> None:
    pipeline.save_config(directory)
    named = {}
    if getattr(pipeline, "feature_extractor", None) is not None:
        # Where torchvision is missing, transformers 5 calls its class by a name that transformers 4 does not know.
        named["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    if whole := _whole_class(pipeline.text_encoder):
        named["text_encoder"] = ["transformers", whole]
    if named:
        path = directory / INDEX
        write_json(path, json.loads(path.read_text(encoding="utf-8")) | named)


def _prefix(module: Any) -> str:
    """What stands before the names of a module's tensors in its file."""
    if type(module).__name__ == CLASSES["text_encoder"]:
        return _TEXT_PREFIX
    if _is_within(module):
        return "language_model." if _whole_class(module) else "model."
    return ""


def _is_within(module: Any) -> bool:
    """Whether a language model is a part of one that sees pictures, which other programs look for."""
    return str(getattr(module.config, "model_type", "")).endswith(_WITHIN)


def _whole_class(module: Any) -> str | None:
    """The class of the model that sees pictures, by which files of its language model are read where the language
    model's own class does not read them; None elsewhere."""
    return _WHOLES.get(type(module).__name__)


def _text_config(text_encoder: Any) -> dict[str, Any]:
    """Returns a configuration by which the text encoder is loaded as the rest is where no type is asked for: diffusers
    loads its own modules in float32, and transformers 5 in the type named there (4 calls it ``torch_dtype``)."""
    kind = type(text_encoder.config)
    values = {**text_encoder.config.to_dict(), "architectures": [type(text_encoder).__name__], "dtype": "float32"}
    said: dict[str, Any] = json.loads(kind.from_dict(values).to_json_string())
    said |= _rotations_of_old(said.get("rope_parameters") or {})
    if not _is_within(text_encoder):
        return said
    name = type(text_encoder).__name__
    whole = _whole_class(text_encoder)
    return {
        "model_type": said["model_type"].removesuffix(_WITHIN),
        "architectures": [whole or name.replace("TextModel", "ForConditionalGeneration")],
        "dtype": "float32",
        "text_config": said,
        "vision_config": _NO_EYES if whole else {"depth": 0},  # what sees pictures is not here
    }


def _rotations_of_old(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 calls a configuration's rotary positions; it takes its own for what it does not find."""
    if "rope_theta" not in parameters:
        return {}
    others = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": others if others.keys() - _KINDS else None}
