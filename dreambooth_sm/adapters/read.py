"""Reads adapters' files, in all layouts that people have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.denoiser_names import (
    ARCHITECTURE_FIELD,
    dotted,
    families_of_transformers,
    in_diffusers,
    layout_of,
    unlikeness,
)
from dreambooth_sm.adapters.embedding_file import split_bundle
from dreambooth_sm.adapters.kohya_file import from_kohya
from dreambooth_sm.adapters.layers import Layer
from dreambooth_sm.adapters.peft_file import CONFIG_FIELD, from_peft
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import Facts
from dreambooth_sm.stored.files import TensorFile
from dreambooth_sm.stored.locate import PICKLE, SAFETENSORS, find_kind, look_for_model
from dreambooth_sm.stored.opening import open_tensors
from dreambooth_sm.stored.recognise import kind_of

_CLIP = "text_model."
_FLAT = re.compile(r"(lora_(unet|te[12]?)|lycoris)_\w+(\.|$)")
_ENDS = re.compile(
    r"\.(lora_[AB]|lora[._](up|down)|lora_linear_layer|hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_R)\b|_lora\.(up|down)\."
)
_PART = re.compile(r"(unet|text_encoder|text_encoder_2)\.")
# Kinds of adapters that people have and that are not known here, by a name that only they hold.
_FOREIGN = (
    (r"\.(oft_blocks|oft_diag)$", "an OFT or BOFT of LyCORIS"),
    (r"\.on_input$", "an (IA)^3"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.diff(_b)?$", "whole differences of weights, not of low rank"),
    (
        r"(^|\.)(transformer|diffusion_model|double_blocks|single_blocks|joint_blocks|transformer_blocks\.\d+\.attn)\.",
        "an adapter of a transformer, such as Flux",
    ),
)


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter: of PEFT and diffusers (old and new names), kohya's and LyCORIS's flat ones (with the
    denoiser's names of diffusers and of the original code), ComfyUI's; a pickle as well, without running it.

    Raises:
        UserError: where it is damaged, or something else; what, it says in one line.
    """
    file = open_tensors(path)
    tensors = {key: value.read() for key, value in file.tensors.items()} if is_adapter(file) else {}
    if not tensors:
        raise UserError(f"{path} is {kind_of(file)}; name the file of a LoRA or of another adapter")
    words, tensors = split_bundle(tensors)
    family = ""
    try:
        if any(_FLAT.match(key) for key in tensors):
            parts, unknown = from_kohya(tensors, file.notes)
            layout = "kohya"
        else:
            parts, unknown = _from_dotted(file, tensors, _place)
            layout = "diffusers"
        # Text encoders alone may belong to a transformer.
        read = [] if "unet" in parts else [(_of_transformer(file, tensors, f), f) for f in families_of_transformers()]
        fits = [(found, others, facts) for (found, others), facts in read if found]
        if fits:
            said = f"{file.notes.get(ARCHITECTURE_FIELD)} {file.notes.get('ss_base_model_version')}"
            found, unknown, facts = min(
                fits,
                key=lambda fit: (len(fit[1]), unlikeness(fit[0], fit[2]), not re.search(fit[2].names or "$^", said)),
            )
            parts, layout, family = {facts.denoiser: found}, layout_of(tensors), facts.name
    except (
        ValueError,
        TypeError,
        IndexError,
        RuntimeError,
        KeyError,
        AttributeError,
        ZeroDivisionError,
        re.error,
    ) as error:
        raise UserError(f"{path}: its tensors make no adapter ({error!r:.200}); copy it again") from None
    if not parts:
        kind = next((words for pattern, words in _FOREIGN if any(re.search(pattern, key) for key in tensors)), None)
        raise UserError(f"{path} is {kind or 'an adapter'}, of a kind that is not known here, with {min(tensors)}")
    notes = {key: str(value) for key, value in file.notes.items()}
    return Adapter(parts, notes, tuple(sorted(unknown)), layout, words, family)


def find_adapter(path: Path) -> Path | None:
    """The file of an adapter at a path, or in a directory that holds no other model; None where there is none.

    Raises:
        UserError: where a file is damaged.
    """
    file = look_for_model(path)
    if file is None or file.is_dir() or find_kind(file) not in (SAFETENSORS, PICKLE):
        return None
    return file if is_adapter(open_tensors(file)) else None


def is_adapter(file: TensorFile) -> bool:
    """Whether a file has the names of an adapter's tensors, and is not a whole model."""
    whole = any(key.startswith("model.diffusion_model.") for key in file.tensors)
    return not whole and any(_FLAT.match(key) or _ENDS.search(key) for key in file.tensors)


def _of_transformer(
    file: TensorFile, tensors: Mapping[str, Tensor], facts: Facts
) -> tuple[dict[str, Layer], list[str]]:
    """The layers of a family's denoiser by name, and the names of tensors and layers that are of none."""

    def place(key: str) -> tuple[str, str]:
        return facts.denoiser, _today(dotted(key.removeprefix("base_model.model."), facts))

    parts, unknown = _from_dotted(file, tensors, place)
    layers, others = in_diffusers(parts.get(facts.denoiser, {}), facts)
    return layers, [*unknown, *others]


def _from_dotted(
    file: TensorFile, tensors: Mapping[str, Tensor], find_place: Callable[[str], tuple[str, str] | None]
) -> tuple[dict[str, dict[str, Layer]], list[str]]:
    configs: dict[str, Any] = json.loads(file.notes.get(CONFIG_FIELD) or "{}")
    if not isinstance(configs, dict):
        raise ValueError(f"its {CONFIG_FIELD} is not a mapping")
    states: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, dict[str, float]] = {}
    names: dict[tuple[str, str], str] = {}
    unknown: list[str] = []
    for key, value in tensors.items():
        place = find_place(key)
        if place is None:
            unknown.append(key)
        elif place[1].endswith(".alpha"):
            alphas.setdefault(place[0], {})[place[1].removesuffix(".alpha")] = float(value)
        else:
            states.setdefault(place[0], {})[place[1]] = value
            names[place] = key
    parts: dict[str, dict[str, Layer]] = {}
    for part, state in states.items():
        config = {key.removeprefix(f"{part}."): each for key, each in configs.items() if key.startswith(f"{part}.")}
        if said := alphas.get(part):
            config |= {"alpha_pattern": {f"^{re.escape(name)}": alpha for name, alpha in said.items()}}
        layers, strange = from_peft(state, config)
        unknown += [names.get((part, name), name) for name in strange]
        if layers:
            parts[part] = layers
    return parts, unknown


def _place(key: str) -> tuple[str, str] | None:
    """The part of a tensor, and its name in it as PEFT has it today; None where it is of no part known here."""
    name = key.removeprefix("base_model.model.")
    if match := _PART.match(name):
        part, name = match[1], name[match.end() :]
    elif re.match(r"(text_model\.)?encoder\.layers\.\d", name):
        part = "text_encoder"
    elif re.match(r"(down_blocks|up_blocks)\.\d|mid_block\.|conv_(in|out)\.|(time|add)_embedding\.", name):
        part = "unet"
    else:
        return None
    name = name.removeprefix("base_model.model.")
    # Attention processors of diffusers until 0.20 had the matrices of all four layers.
    name = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora\.", r".\1.lora.", name).replace(
        ".to_out.lora.", ".to_out.0.lora."
    )
    name = _today(name)
    inner = name.removeprefix(_CLIP)
    if part == "text_encoder":
        return part, inner
    return part, name if part == "unet" or name.startswith("text_projection") else _CLIP + inner


def _today(name: str) -> str:
    """The name of a tensor with the ending that PEFT gives it today."""
    for old, new in (
        ("lora.down", "lora_A"),
        ("lora.up", "lora_B"),
        ("lora_linear_layer.down", "lora_A"),
        ("lora_linear_layer.up", "lora_B"),
        ("lora_down", "lora_A"),
        ("lora_up", "lora_B"),
    ):
        name = name.replace(f".{old}.weight", f".{new}.weight")
    return name
