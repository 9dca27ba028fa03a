"""Configurations of a pipeline's parts: read as people have them, and made into parts with an error that says what is
wrong with which value."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version
from torch import nn

from dreambooth_sm.errors import UserError
from dreambooth_sm.families.file_rules import is_number
from dreambooth_sm.stored.model import USUAL, class_of, empty_module, rules_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOM = b"\xef\xbb\xbf"
_COPY = "copy it again"
_VALUES = "its values have to be those that the model was trained with"
# Numbers that no model comes near: layers, of which each is made, and everything else.
_MANY = (
    "layers_per_block",
    "num_hidden_layers",
    "num_layers",
    "num_single_layers",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)
_MOST_LAYERS, _MOST = 1000, 1_000_000
# A wave length, of rotary positions.
_NO_COUNT = "rope_theta"
# A UNet that wants more than a picture, a time and a prompt can't be trained on pictures and prompts.
# Text encoders' own names of their kinds, by their classes.
_MODEL_TYPES = {
    "Qwen3Model": ("qwen3",),
    "Qwen2_5_VLTextModel": ("qwen2_5_vl", "qwen2_5_vl_text"),
    "Qwen3VLTextModel": ("qwen3_vl", "qwen3_vl_text"),
    "T5EncoderModel": ("t5",),
}
_CLIP_TYPES = ("clip_text_model", "clip")
_CONDITIONS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim", "time_cond_proj_dim")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, with or without a byte order mark.

    Raises:
        UserError: where the file is missing, damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error!s:.200}); {_COPY}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} can't be read: it holds {plainly(value)}, not a configuration; {_COPY}")
    return value


def plainly(value: Any) -> str:
    """A value as it stands in JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def class_name(config: Mapping[str, Any]) -> str:
    """The name of a configuration's class, which some have with its library before it; empty where it says none."""
    name = config.get("_class_name")
    if isinstance(name, list) and name:
        name = name[-1]
    return name if isinstance(name, str) else ""


def make(kind: Callable[..., Any], config: Mapping[str, Any], where: str, name: str, advice: str = _VALUES) -> Any:
    """Calls ``kind`` with a configuration.

    Raises:
        UserError: for whatever the libraries raise for values that they can't use.
    """
    try:
        return kind(dict(config))
    except Exception as error:  # wrong values make the libraries raise nearly anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        reason = f"{type(error).__name__}: {reason}"[:200]
        raise UserError(f"{where} makes no {name} ({reason}); {advice}") from None


def make_module(part: str, config: Mapping[str, Any], where: str, pipeline: str = USUAL) -> nn.Module:
    """A module of a pipeline with its weights on the meta device.

    Args:
        part: one of those that ``PARTS`` names.
        where: what messages call its configuration.
        pipeline: name of the pipeline's class.

    Raises:
        UserError: where the configuration is of another kind of module, or of none.
    """
    name = class_of(pipeline, part)
    said = class_name(config) or name
    if part.startswith("text_encoder"):
        types = _MODEL_TYPES.get(name, _CLIP_TYPES)
        model_type = config.get("model_type", types[0])
        said = name if model_type in types else f"{model_type} model"
        if isinstance(inner := config.get("text_config"), dict):  # of a model that sees pictures as well
            config = inner
    if said != name:
        raise UserError(f"{where} is of a {said}; this project takes a {name} there")
    if config.get("auto_map"):
        raise UserError(f"{where} brings code of its own (auto_map), which is never run; this project takes a {name}")
    problems = [
        f"{where}: {key} is {plainly(value)}, and models have at most {most:,}"
        for key, value in config.items()
        if key != _NO_COUNT and (most := _MOST_LAYERS if key in _MANY else _MOST) < _largest(value)
    ]
    if part == "unet":
        problems += [
            f"{where}: {key} is {plainly(config[key])}: its UNet takes more than pictures and prompts, or less; "
            "name a base model for text to image"
            for key in _CONDITIONS
            if config.get(key) is not None
        ]
        size = config.get("sample_size")  # it only says for which pictures the model is made
        pair = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
        if type(size) is not int and not pair:
            config = {**config, "sample_size": 128 if config.get("addition_embed_type") else 64}
    if rules := rules_of(pipeline):
        problems += rules.config_problems(part, config, where)
    elif part == "vae":
        problems += _vae_problems(config, where)
    if problems:
        raise UserError(problems)
    config = {**config, "_class_name": said} if "_class_name" in config else config
    if not _is_version(config.get("_diffusers_version")):  # pipelines compare it
        config = {key: value for key, value in config.items() if key != "_diffusers_version"}
    module: nn.Module = make(lambda values: empty_module(part, values, pipeline), config, where, name)
    return module


def _is_version(value: Any) -> bool:
    try:
        Version(value)
    except (InvalidVersion, TypeError):
        return False
    return True


def _largest(value: Any) -> float:
    if isinstance(value, list | tuple):
        return max((_largest(each) for each in value), default=0)
    return abs(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _vae_problems(config: Mapping[str, Any], where: str) -> list[str]:
    problems = []
    scale = config.get("scaling_factor", 0.18215)
    if not is_number(scale) or scale <= 0:
        problems.append(f"{where}: scaling_factor is {plainly(scale)} and should be a number such as 0.18215")
    problems += [
        f"{where}: {key} is {plainly(config[key])}: latents that are shifted are of other models than Stable Diffusion"
        for key in ("shift_factor", "latents_mean", "latents_std")
        if config.get(key)
    ]
    return problems


def read_tokenizer_directory(directory: Path, positions: int, name: str = "CLIPTokenizer") -> PreTrainedTokenizerBase:
    """A tokenizer whose prompts are no longer than its text encoder's positions, where it says nothing else.

    Args:
        positions: of the text encoder.
        name: of its class.

    Raises:
        UserError: where files are damaged or of another kind of tokenizer.
    """
    from dreambooth_sm.stored import classes

    kind: Any = classes.named(name)
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    length = config.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | float) or length < 3):
        raise UserError(f"{path}: model_max_length is {plainly(length)} and should be a number such as {positions}")
    with _without_marks(directory) as readable:
        tokenizer: PreTrainedTokenizerBase = make(
            lambda _: kind.from_pretrained(readable, local_files_only=True, trust_remote_code=False),
            config,
            str(directory),
            name,
            "copy the directory again",
        )
    tokenizer.model_max_length = int(min(length or positions, positions))
    return tokenizer


@contextmanager
def _without_marks(directory: Path) -> Iterator[Path]:
    """The directory, or where its files have byte order marks, which the libraries don't take, a copy without."""
    files = [path for path in directory.iterdir() if path.suffix in (".json", ".txt", ".jinja") and path.is_file()]
    marked = [path for path in files if path.read_bytes().startswith(_BOM)]
    if not marked:
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in files:
            Path(folder, path.name).write_bytes(path.read_bytes().removeprefix(_BOM))
        yield Path(folder)
