"""The place of each tensor of a diffusers pipeline in a single file of the original layout, and back.

The names follow from the modules' configurations, so that one set of rules serves SD 1, SD 2, SDXL and models of other
sizes, and both directions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dreambooth_sm.families import FAMILIES
from dreambooth_sm.stored.files import Stored

# The modules with weights of each pipeline that is understood here. Each text encoder has a tokenizer of its own.
PARTS = {family.facts.pipeline: family.facts.parts for family in FAMILIES.values()}
UNET = "model.diffusion_model."
VAE = "first_stage_model."
# Text encoders: of SD 1, of SD 2, and the two of SDXL. Behind `transformer.` come the names of transformers, behind
# `model.` those of open_clip, which trained the encoder.
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
XL_CLIP = "conditioner.embedders.0.transformer."
XL_OPEN_CLIP = "conditioner.embedders.1.model."

# The same weight by the name of the encoder alone, and by that of all of T5.
_EMBEDDING_OF_T5 = ("encoder.embed_tokens.weight", "shared.weight")
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

Configs = Mapping[str, Mapping[str, Any]]

_RESNET_OF_UNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS_OF_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE_OF_UNET = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_MIDDLE_OF_VAE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
_ATTENTION_OF_VAE = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@dataclass(frozen=True)
class TensorPlace:
    """The place of a tensor in a single file.

    Attributes:
        third: which third of the rows, where queries, keys and values are one tensor.
        as_convolution: whether a linear layer's weight is stored as that of a 1x1 convolution.
        transposed: whether a matrix is stored with its inputs as rows.
    """

    key: str
    third: int | None = None
    as_convolution: bool = False
    transposed: bool = False


def places(part: str, names: Mapping[str, tuple[int, ...]], configs: Configs) -> dict[str, TensorPlace]:
    """The place of each tensor of a module.

    Args:
        part: one of those that ``PARTS`` names.
        names: the module's tensors, with their shapes.
        configs: of the pipeline's parts.
    """
    if part == "unet":
        layers = configs["unet"]["layers_per_block"]
        return {name: TensorPlace(UNET + _unet_key(name, layers, names)) for name in names}
    if part == "vae":
        levels = len(configs["vae"]["block_out_channels"])
        return {name: _vae_place(name, levels, shape) for name, shape in names.items()}
    prefix = text_prefix(part, configs)
    # A text encoder with a projection has the transformer as a module of its own.
    inner = {name: name.removeprefix("text_model.") for name in names}
    if prefix in (OPEN_CLIP, XL_OPEN_CLIP):
        return {name: _open_clip_place(prefix, inner[name]) for name in names}
    return {name: TensorPlace(f"{prefix}text_model.{inner[name]}") for name in names}


def today(name: str, part: str, known: Collection[str] = ()) -> str:
    """Renames a tensor that earlier versions of diffusers and transformers wrote as today's call it.

    Args:
        known: names in the module, which stay as they are.
    """
    if name == _EMBEDDING_OF_T5[0]:
        return _EMBEDDING_OF_T5[1]
    if name in known:
        return name
    if part == "text_encoder":
        # Of language models with their head, everything else is in a module of its own; of those that see pictures, in
        # one within it.
        return name.removeprefix("text_model.").removeprefix("model.").removeprefix("language_model.")
    if part == "vae" and ".attentions." in name:
        for old, new in _OLD_ATTENTION.items():
            name = name.replace(old, new)
    return name


def is_xl(configs: Configs) -> bool:
    """Whether the model is SDXL, which has two text encoders."""
    return "text_encoder_2" in configs


def parts_in(configs: Configs) -> tuple[str, ...]:
    """Names of the modules with weights of a pipeline with such configurations."""
    return PARTS["StableDiffusionXLPipeline" if is_xl(configs) else "StableDiffusionPipeline"]


def text_prefix(part: str, configs: Configs) -> str:
    """Returns what the names of a text encoder's tensors begin with: one of the four prefixes above."""
    if is_xl(configs):
        return XL_CLIP if part == "text_encoder" else XL_OPEN_CLIP
    return OPEN_CLIP if configs["unet"]["cross_attention_dim"] == 1024 else CLIP


def to_diffusers(
    part: str, names: Mapping[str, tuple[int, ...]], configs: Configs, found: Mapping[str, Stored]
) -> dict:
    """The tensors of a module, from those of a single file; those that are not in it are left out."""
    result: dict[str, Stored] = {}
    for name, place in places(part, names, configs).items():
        if place.key in found:
            tensor = found[place.key]
            if place.third is not None:
                tensor = tensor.third(place.third)
            if place.as_convolution and tensor.shape[2:] == (1, 1):
                tensor = tensor.reshaped(tensor.shape[:2])
            if place.transposed:
                tensor = tensor.transposed()
            result[name] = tensor
    return result


def to_original(part: str, tensors: Mapping[str, Stored], configs: Configs) -> dict[str, Stored]:
    """The tensors of a single file, from those of a module."""
    result: dict[str, Stored] = {}
    thirds: dict[str, list[Stored]] = {}
    for name, place in sorted(
        places(part, {name: tensor.shape for name, tensor in tensors.items()}, configs).items(),
        key=lambda item: item[1].third or 0,
    ):
        tensor = tensors[name]
        if place.as_convolution:
            tensor = tensor.reshaped((*tensor.shape, 1, 1))
        if place.transposed:
            tensor = tensor.transposed()
        if place.third is None:
            result[place.key] = tensor
        else:
            thirds.setdefault(place.key, []).append(tensor)
    return result | {key: Stored.stacked(parts) for key, parts in thirds.items()}


def _unet_key(name: str, layers: int, names: Mapping[str, Any]) -> str:
    for ours, theirs in _ENDS_OF_UNET.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.*)", name):
        kind, rest = match.groups()
        return f"middle_block.{_MIDDLE_OF_UNET[kind]}.{_in_unet(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    assert match, name
    direction, level, kind, number, rest = match.groups()
    first = int(level) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        after_attention = any(other.startswith(f"up_blocks.{level}.attentions.") for other in names)
        return f"output_blocks.{first + layers}.{2 if after_attention else 1}.{rest}"
    block = f"input_blocks.{first + int(number) + 1}" if direction == "down" else f"output_blocks.{first + int(number)}"
    return f"{block}.{1 if kind == 'attentions' else 0}.{_in_unet(kind, rest)}"


def _in_unet(kind: str, rest: str) -> str:
    if not kind.startswith("resnets"):
        return rest
    layer, _, leaf = rest.rpartition(".")
    return f"{_RESNET_OF_UNET[layer]}.{leaf}"


def _vae_place(name: str, levels: int, shape: tuple[int, ...]) -> TensorPlace:
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(\w+\.\d+)\.(.*)\.(\w+)", name):
        side, kind, layer, leaf = match.groups()
        if kind == "attentions.0":
            key = f"{VAE}{side}.mid.attn_1.{_ATTENTION_OF_VAE[layer]}.{leaf}"
            return TensorPlace(key, as_convolution=leaf == "weight" and len(shape) == 2)
        return TensorPlace(
            f"{VAE}{side}.mid.{_MIDDLE_OF_VAE[kind]}.{layer.replace('conv_shortcut', 'nin_shortcut')}.{leaf}"
        )
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
        side, direction, level, kind, number, rest = match.groups()
        level = level if direction == "down" else str(levels - 1 - int(level))  # the original counts from the pixels
        where = f"block.{number}" if kind == "resnets" else f"{direction}sample"
        return TensorPlace(f"{VAE}{side}.{direction}.{level}.{where}.{rest.replace('conv_shortcut', 'nin_shortcut')}")
    return TensorPlace(VAE + name.replace("conv_norm_out", "norm_out"))


def _open_clip_place(prefix: str, name: str) -> TensorPlace:
    if name in _OPEN_CLIP_ENDS:
        return TensorPlace(prefix + _OPEN_CLIP_ENDS[name])
    if name == "text_projection.weight":
        return TensorPlace(f"{prefix}text_projection", transposed=True)
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(\w+)", name)
    assert match, name
    number, layer, leaf = match.groups()
    block = f"{prefix}transformer.resblocks.{number}"
    if projection := re.fullmatch(r"self_attn\.([qkv])_proj", layer):
        return TensorPlace(f"{block}.attn.in_proj_{leaf}", third="qkv".index(projection.group(1)))
    return TensorPlace(f"{block}.{_OPEN_CLIP_LAYER[layer]}.{leaf}")
