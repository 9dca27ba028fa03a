"""The names of layers in kohya's flat layout, and back: SD 1 and 2 as diffusers has them, SDXL's UNet as the original
code has it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dreambooth_sm.stored.layout import UNET, Configs, is_xl, places

UNET_PREFIX, TEXT_PREFIX, TEXT_PREFIXES = "lora_unet_", "lora_te_", ("lora_te1_", "lora_te2_")
_CLIP = "text_model."
# Layers of each level of the UNets of all Stable Diffusion models.
LAYERS = 2
# The header's field that says it where they are not as many.
LAYERS_FIELD = "dreambooth_sm.layers_per_block"
# Words with "_" in the names of modules; all else between two "_" is a word of its own.
_WORDS = re.compile(
    "|".join(
        (
            "(down|up)_blocks|mid_block|transformer_blocks|conv_(in|out|shortcut|norm_out)|(time|add)_embedding",
            r"time_emb_proj|linear_\d|proj_(in|out)|to_(q|k|v|out)|text_(model|projection)|self_attn|[qkv]_proj|out_proj",
            r"layer_norm\d|final_layer_norm|(token|position)_embedding|group_norm|[^_]+",
        )
    )
)
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def flat_names(part: str, names: Iterable[str], configs: Configs) -> dict[str, str]:
    """The flat name of each layer of a part, with its prefix.

    Args:
        configs: of the base model's parts.
    """
    names = list(names)
    if part != "unet":
        prefix = TEXT_PREFIXES[part == "text_encoder_2"] if is_xl(configs) else TEXT_PREFIX
        return {name: (prefix + _full(name)).replace(".", "_") for name in names}
    original = _original(names, configs["unet"]) if is_xl(configs) else {name: name for name in names}
    return {name: UNET_PREFIX + original[name].replace(".", "_") for name in names}


def _full(name: str) -> str:
    """A name in CLIP with a projection, as transformers until 5.6 had them in CLIP without one as well."""
    return name if name.startswith((_CLIP, "text_projection")) else _CLIP + name


def _original(names: Iterable[str], unet: Mapping[str, Any]) -> dict[str, str]:
    weights = {name: f"{name}.weight" for name in names}
    # Where there is attention on the way up decides where upsamplers stand.
    attention = [
        f"up_blocks.{n}.attentions.0.norm.weight" for n, kind in enumerate(unet["up_block_types"]) if "Attn" in kind
    ]
    found = places("unet", dict.fromkeys([*weights.values(), *attention], ()), {"unet": unet})
    return {name: found[key].key.removeprefix(UNET).removesuffix(".weight") for name, key in weights.items()}


def find_layer(flat: str, layers: int = LAYERS) -> tuple[str, str] | None:
    """The part and the name of a layer, from its flat name; None where it is of no layer known here.

    Args:
        layers: of each level of the UNet.
    """
    prefixes = {
        TEXT_PREFIX: "text_encoder",
        **dict(zip(TEXT_PREFIXES, ("text_encoder", "text_encoder_2"), strict=True)),
    }
    for prefix, part in prefixes.items():
        if flat.startswith(prefix):
            name = _dotted(flat.removeprefix(prefix)).removeprefix(_CLIP)
            return part, name if part == "text_encoder" else _full(name)
    for prefix in (UNET_PREFIX, "lycoris_unet_", "lycoris_"):
        if flat.startswith(prefix):
            found = _unet_name(flat.removeprefix(prefix), layers)
            return ("unet", found) if found else None
    return None


def _dotted(flat: str) -> str:
    return ".".join(match[0] for match in _WORDS.finditer(flat))


def _unet_name(flat: str, layers: int) -> str | None:
    """A name of diffusers, from one of diffusers or of the original code, both flat."""
    if flat in _ENDS:
        return _ENDS[flat]
    if match := re.fullmatch(r"middle_block_([012])_(.+)", flat):
        place = _MIDDLE[match[1]]
        return f"mid_block.{place}.{_inner(place, match[2])}"
    match = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", flat)
    if match is None:
        known = re.match(r"(down_blocks|up_blocks)_\d|mid_block_|(time|add)_embedding_linear_|conv_(in|out)$", flat)
        return _dotted(flat) if known else None
    side, number, place, rest = match[1], int(match[2]), match[3], match[4]
    level, layer = divmod(number - (side == "input"), layers + 1)
    if rest == "op":
        return f"down_blocks.{level}.downsamplers.0.conv"
    if rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv"
    kind = f"{'attentions' if place == '1' else 'resnets'}.{layer}"
    return f"{'down' if side == 'input' else 'up'}_blocks.{level}.{kind}.{_inner(kind, rest)}"


def _inner(place: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if place.startswith("resnets") else _dotted(rest)
