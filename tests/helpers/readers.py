"""ComfyUI's and WebUI's ways of reading adapters, written down from their published rules: which key means which module
(ComfyUI 0.3: ``comfy/lora.py``; WebUI 1.10: ``extensions-builtin/Lora/networks.py``), and what is added to its weight.

Both give the weights' changes by part and name in diffusers, and the keys that they take for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.helpers.original_names import clip_layers, open_clip_layers, unet_in_diffusers

Place = tuple[str, str]
Changes = dict[Place, Tensor]
_TEXT = "text_model."


def comfyui(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], encoders: Mapping[str, int]
) -> tuple[Changes, set[str]]:
    """
    Args:
        config: of diffusers' UNet.
        encoders: layers of each text encoder.
    """
    places: dict[str, Place] = {}
    for original, name in unet_in_diffusers(config).items():
        place = ("unet", name)
        places["lora_unet_" + original.replace(".", "_")] = place
        places["lora_unet_" + name.replace(".", "_")] = places["lycoris_" + name.replace(".", "_")] = place
        processor = name.replace(".to_", ".processor.to_").removesuffix(".0") if ".to_out" in name else name
        places[f"unet.{processor.replace('.to_', '.processor.to_')}"] = place
    first = [f"lora_te{n}_" for n in ("", "1")]
    for part, prefixes in (("text_encoder", first), ("text_encoder_2", ["lora_te2_"])):
        for name in clip_layers(encoders.get(part, 0)):
            for prefix in prefixes:
                places[prefix + name.replace(".", "_")] = (part, _name(part, name))
            places[f"{part}.{name}"] = (part, _name(part, name))
    found: dict[Place, dict[str, Tensor]] = {}
    left: set[str] = set()
    for key, value in tensors.items():
        stem = next(
            (key[: dot.start()] for dot in re.finditer(r"\.|_lora\.", key) if key[: dot.start()] in places), None
        )
        if stem is None:
            left.add(key)
        else:
            end = key[len(stem) :].lstrip("._").replace("lora.", "lora_")
            ends = {"lora_B.weight": "lora_up.weight", "lora_A.weight": "lora_down.weight"}
            found.setdefault(places[stem], {})[ends.get(end, end)] = value
    return _changes(found, left)


def webui(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], encoders: Mapping[str, int], *, open_clip: bool = False
) -> tuple[Changes, set[str]]:
    """
    Args:
        config, encoders: as of :func:`comfyui`.
        open_clip: whether the only text encoder is open_clip's: Stable Diffusion 2.
    """
    # The names of the model's modules, "_" for ".", and what diffusers calls them.
    modules: dict[str, Place | None] = {
        "diffusion_model_" + original.replace(".", "_"): ("unet", name)
        for original, name in unet_in_diffusers(config).items()
    }
    both = "text_encoder_2" in encoders
    for part, count in encoders.items():
        number = ("0_" if part == "text_encoder" else "1_") if both else ""
        if part == "text_encoder_2" or open_clip:
            layers = open_clip_layers(count)
        else:
            layers = {f"transformer.{name}": name for name in clip_layers(count)}
        for original, named in layers.items():
            modules[number + original.replace(".", "_")] = (part, _name(part, named)) if named else None
    found: dict[Place, dict[str, Tensor]] = {}
    left: set[str] = set()
    for key, value in tensors.items():
        stem, _, end = key.partition(".")
        name = _in_original(stem, open_clip)
        place = modules.get(name)
        projection = re.fullmatch(r"((1_)?model_transformer_resblocks_(\d+)_attn)_([qkv]_proj)", name)
        if projection and projection[1] in modules:  # one of three in open_clip's attention
            part = "text_encoder_2" if projection[2] else "text_encoder"
            place = (part, _name(part, f"text_model.encoder.layers.{projection[3]}.self_attn.{projection[4]}"))
        if place is None and "lora_unet" in stem:
            place = modules.get(stem.replace("lora_unet", "diffusion_model"))
        elif place is None and "lora_te1_text_model" in stem:
            place = modules.get(stem.replace("lora_te1_text_model", "0_transformer_text_model"))
            place = place or modules.get(stem.replace("lora_te1_text_model", "transformer_text_model"))
        if place is None:
            left.add(key)
        else:
            found.setdefault(place, {})[end] = value
    return _changes(found, left)


def _name(part: str, name: str) -> str:
    """Of a module in transformers 5."""
    return name.removeprefix(_TEXT) if part == "text_encoder" else name


def _in_original(stem: str, open_clip: bool) -> str:
    """WebUI's rule for the original name of what a file calls by diffusers' names: of three blocks a level."""
    inner = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
    numbers = [int(each) for each in re.findall(r"\d+", stem)]
    if stem == "lora_unet_conv_in":
        return "diffusion_model_input_blocks_0_0"
    if stem == "lora_unet_conv_out":
        return "diffusion_model_out_2"
    if stem.startswith("lora_unet_time_embedding_linear_"):
        return f"diffusion_model_time_embed_{2 * numbers[0] - 2}"
    if match := re.fullmatch(r"lora_unet_down_blocks_\d+_downsamplers_0_conv", stem):
        return f"diffusion_model_input_blocks_{3 + 3 * numbers[0]}_0_op"
    if match := re.fullmatch(r"lora_unet_up_blocks_\d+_upsamplers_0_conv", stem):
        return f"diffusion_model_output_blocks_{2 + 3 * numbers[0]}_{2 if numbers[0] else 1}_conv"
    if match := re.fullmatch(r"lora_unet_(down|up)_blocks_\d+_(attentions|resnets)_\d+_(.+)", stem):
        side, first = ("input", 1) if match[1] == "down" else ("output", 0)
        block = f"{side}_blocks_{first + 3 * numbers[0] + numbers[1]}_{1 if match[2] == 'attentions' else 0}"
        return f"diffusion_model_{block}_{inner.get(match[3], match[3]) if match[2] == 'resnets' else match[3]}"
    if match := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d)_(.+)", stem):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"diffusion_model_middle_block_{number}_{inner.get(match[3], match[3])}"
    if match := re.fullmatch(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", stem):
        if not match[1] and not open_clip:
            return f"transformer_text_model_encoder_layers_{match[2]}_{match[3]}"
        layer = match[3].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
        return f"{'1_' if match[1] else ''}model_transformer_resblocks_{match[2]}_{layer}"
    return stem


def _changes(found: Mapping[Place, Mapping[str, Tensor]], left: set[str]) -> tuple[Changes, set[str]]:
    changes: Changes = {}
    for place, tensors in found.items():
        added = _change(dict(tensors))
        if added is None:
            left |= {f"{place}: {end}" for end in tensors}
        else:
            changes[place] = added
    return changes, left


def _change(tensors: dict[str, Tensor]) -> Tensor | None:
    """What is added to a weight, kernels flat, of what both programs know of these keys; None where one is strange."""
    alpha = tensors.pop("alpha", None)

    def scaled(product: Tensor, rank: int) -> Tensor:
        return product * (1 if alpha is None else alpha.item() / rank)

    ends = set(tensors)
    if ends == {"lora_up.weight", "lora_down.weight"}:
        up, down = tensors["lora_up.weight"].float(), tensors["lora_down.weight"].float()
        return scaled(up.flatten(1) @ down.flatten(1), down.shape[0])
    if ends == {"lora_up.weight", "lora_mid.weight", "lora_down.weight"}:
        up, middle, down = (tensors[f"lora_{name}.weight"].float() for name in ("up", "mid", "down"))
        inner = torch.einsum("ab...,bi->ai...", middle, down.flatten(1))
        return scaled(up.flatten(1) @ inner.flatten(1), down.shape[0])
    pairs = [f"hada_w{n}_{end}" for n in (1, 2) for end in "ab"]
    if ends == set(pairs):
        one, two, three, four = (tensors[name].float() for name in pairs)
        return scaled((one @ two) * (three @ four), two.shape[0])
    if ends == {*pairs, "hada_t1", "hada_t2"}:
        one, two, three, four = (tensors[name].float() for name in pairs)
        kernels = [
            torch.einsum("ij...,jr,ip->pr...", tensors[core].float(), right, left)
            for core, left, right in (("hada_t1", one, two), ("hada_t2", three, four))
        ]
        return scaled((kernels[0] * kernels[1]).flatten(1), two.shape[0])
    if any(end.startswith("lokr_") for end in ends):
        rank = None
        factors = []
        for number in (1, 2):
            whole = tensors.pop(f"lokr_w{number}", None)
            if whole is None:
                left, right = tensors.pop(f"lokr_w{number}_a").float(), tensors.pop(f"lokr_w{number}_b").float()
                rank = right.shape[0]
                core = tensors.pop("lokr_t2", None) if number == 2 else None
                whole = left @ right if core is None else torch.einsum("ij...,jr,ip->pr...", core.float(), right, left)
            factors.append(whole.float())
        first, second = factors
        first = first.reshape(*first.shape, *[1] * (second.dim() - 2))
        product = torch.kron(first, second).flatten(1)
        return None if tensors else product if rank is None else scaled(product, rank)
    return None
