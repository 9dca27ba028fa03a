"""The modules of Stable Diffusion in its original code (CompVis's ldm, Stability's sgm, open_clip), by that code's
rules, and which ones of diffusers they are, by diffusers' own converter; and tensors of Z-Image by the names of its
makers. Nothing here is the project's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

_CLIP_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_OPEN_CLIP_LAYER = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def unet_modules(config: Mapping[str, Any]) -> list[str]:
    """Linear layers and convolutions in the order in which ldm's ``UNetModel`` makes them.

    Args:
        config: of diffusers' UNet.
    """
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    said = config["transformer_layers_per_block"]
    attention = ["Attn" in kind for kind in config["down_block_types"]]
    depths = [said] * len(widths) if isinstance(said, int) else list(said)
    names = ["time_embed.0", "time_embed.2"]
    names += ["label_emb.0.0", "label_emb.0.2"] if config["addition_embed_type"] else []

    def residual(place: str, before: int, after: int) -> list[str]:
        inner = ["in_layers.2", "emb_layers.1", "out_layers.3"] + ["skip_connection"] * (before != after)
        return [f"{place}.{each}" for each in inner]

    def transformer(place: str, depth: int) -> list[str]:
        block = [f"attn{n}.to_{each}" for n in (1, 2) for each in ("q", "k", "v", "out.0")]
        block += ["ff.net.0.proj", "ff.net.2"]
        blocks = [f"transformer_blocks.{number}.{each}" for number in range(depth) for each in block]
        return [f"{place}.{each}" for each in ("proj_in", *blocks, "proj_out")]

    names.append("input_blocks.0.0")
    number, width, widths_behind = 1, widths[0], [widths[0]]
    for level, after in enumerate(widths):
        for _ in range(layers):
            names += residual(f"input_blocks.{number}.0", width, after)
            if attention[level]:
                names += transformer(f"input_blocks.{number}.1", depths[level])
            width, number = after, number + 1
            widths_behind.append(width)
        if level < len(widths) - 1:
            names.append(f"input_blocks.{number}.0.op")
            number += 1
            widths_behind.append(width)
    names += residual("middle_block.0", width, width)
    names += transformer("middle_block.1", depths[-1]) + residual("middle_block.2", width, width)
    number = 0
    for level in reversed(range(len(widths))):
        for layer in range(layers + 1):
            names += residual(f"output_blocks.{number}.0", width + widths_behind.pop(), widths[level])
            width, last = widths[level], 0
            if attention[level]:
                names += transformer(f"output_blocks.{number}.1", depths[level])
                last = 1
            if level and layer == layers:
                names.append(f"output_blocks.{number}.{last + 1}.conv")
            number += 1
    return [*names, "out.2"]


def unet_in_diffusers(config: Mapping[str, Any]) -> dict[str, str]:
    """What diffusers calls each of these modules."""
    names = unet_modules(config)
    marked = {f"model.diffusion_model.{name}.weight": torch.tensor(n) for n, name in enumerate(names)}
    marked |= {f"{key.removesuffix('weight')}bias": torch.tensor(-1) for key in list(marked)}
    for name in _norms(names):  # the converter wants whole models
        marked |= {f"model.diffusion_model.{name}.{end}": torch.tensor(-1) for end in ("weight", "bias")}
    plain = {**config, "class_embed_type": None}
    found = convert_ldm_unet_checkpoint(dict(marked), plain)
    return {
        names[int(value)]: name.removesuffix(".weight")
        for name, value in found.items()
        if name.endswith(".weight") and value >= 0
    }


def _norms(names: list[str]) -> Iterator[str]:
    yield "out.0"
    for name in names:
        if name.endswith(".in_layers.2"):
            yield name[:-1] + "0"
        if name.endswith(".out_layers.3"):
            yield name[:-1] + "0"


def clip_layers(count: int) -> list[str]:
    """The modules of CLIP's transformer in transformers, until 5.6."""
    return [f"text_model.encoder.layers.{n}.{each}" for n in range(count) for each in _CLIP_LAYER]


def open_clip_layers(count: int) -> dict[str, str | None]:
    """The modules of open_clip's transformer, and what transformers calls them; None for attention as a whole, which
    has queries, keys and values in one."""
    found: dict[str, str | None] = {}
    for number in range(count):
        found[f"model.transformer.resblocks.{number}.attn"] = None
        for ours, theirs in _OPEN_CLIP_LAYER.items():
            found[f"model.transformer.resblocks.{number}.{ours}"] = f"text_model.encoder.layers.{number}.{theirs}"
    return found


def z_image_name(name: str) -> str:
    """A name in Z-Image's transformer, but of queries, keys and values, as its makers gave it."""
    for ours, theirs in (
        (r"^all_(\w+)\.2-1\.", r"\1."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    ):
        name = re.sub(ours, theirs, name)
    return name


def z_image_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Z-Image's transformer as its makers have it: queries, keys and values are one matrix, and there is a norm that
    diffusers has not."""
    found = {"norm_final.weight": torch.ones(64)}
    for name, value in tensors.items():
        three = [name.replace(".to_q.", f".to_{each}.") for each in "qkv"]
        if ".to_q." in name:
            found[name.replace(".to_q.", ".qkv.")] = torch.cat([tensors[each] for each in three])
        elif ".to_k." not in name and ".to_v." not in name:
            found[z_image_name(name)] = value
    return found


_FLUX2 = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_FLUX2_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}
_FLUX2_FUSED = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
_FLUX2_NORMS = {"norm_q": "img", "norm_k": "img", "norm_added_q": "txt", "norm_added_k": "txt"}


def flux2_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FLUX.2's transformer as its makers name it: one matrix of queries, keys and values, the last modulation with its
    halves the other way round."""
    left, made = dict(tensors), {}
    for block in sorted({name.split(".")[1] for name in left if name.startswith("transformer_blocks.")}):
        for side, parts in _FLUX2_FUSED.items():
            rows = [left.pop(f"transformer_blocks.{block}.attn.{part}.weight") for part in parts]
            made[f"double_blocks.{block}.{side}_attn.qkv.weight"] = torch.cat(rows)
    for name, value in left.items():
        kind, _, rest = name.removesuffix(".weight").partition(".")
        if name == "norm_out.linear.weight":
            made["final_layer.adaLN_modulation.1.weight"] = torch.cat(value.chunk(2)[::-1])
        elif not kind.endswith("transformer_blocks"):
            made[f"{_FLUX2[name.removesuffix('.weight')]}.weight"] = value
        else:
            number, _, layer = rest.partition(".")
            norm, single = layer.removeprefix("attn."), kind.startswith("single")
            to = f"{'single' if single else 'double'}_blocks.{number}"
            if norm in _FLUX2_NORMS:
                place = "" if single else f"{_FLUX2_NORMS[norm]}_attn."
                made[f"{to}.{place}norm.{'query' if norm.endswith('q') else 'key'}_norm.scale"] = value
            else:
                made[f"{to}.{(_FLUX2_SINGLE if single else _FLUX2)[layer]}.weight"] = value
    return made


_FLUX1 = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_FLUX1_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
_FLUX1_FUSED = (
    ("transformer_blocks", "double_blocks.{}.img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("transformer_blocks", "double_blocks.{}.txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("single_transformer_blocks", "single_blocks.{}.linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
)


def flux1_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FLUX.1's transformer, or Chroma's, as its makers name it; of single blocks, the net's first layer is one with
    queries, keys and values."""
    left, made = dict(tensors), {}
    for kind, theirs, parts in _FLUX1_FUSED:
        for block in sorted({name.split(".")[1] for name in tensors if name.startswith(f"{kind}.")}):
            for end in ("weight", "bias"):
                rows = [left.pop(f"{kind}.{block}.{part}.{end}") for part in parts]
                made[f"{theirs.format(block)}.{end}"] = torch.cat(rows)
    for name, value in left.items():
        layer, _, end = name.rpartition(".")
        kind, _, rest = layer.partition(".")
        if layer == "norm_out.linear":
            made[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat(value.chunk(2)[::-1])
        elif kind == "distilled_guidance_layer":
            inner = rest.replace("linear_1", "in_layer").replace("linear_2", "out_layer")
            scale = inner.startswith("norms.")
            made[f"{kind}.{inner}.{'scale' if scale else end}"] = value
        elif not kind.endswith("transformer_blocks"):
            made[f"{_FLUX1[layer]}.{end}"] = value
        else:
            number, _, inner = rest.partition(".")
            norm, single = inner.removeprefix("attn."), kind.startswith("single")
            to = f"{'single' if single else 'double'}_blocks.{number}"
            if norm in _FLUX2_NORMS:
                place = "" if single else f"{_FLUX2_NORMS[norm]}_attn."
                made[f"{to}.{place}norm.{'query' if norm.endswith('q') else 'key'}_norm.scale"] = value
            else:
                made[f"{to}.{(_FLUX1_SINGLE if single else _FLUX1)[inner]}.{end}"] = value
    return made


_SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
_SD3_FUSED = (
    ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
)


def sd3_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stable Diffusion 3's transformer as its makers name it: one layer of queries, keys and values, and modulations
    whose scale comes last in the last ones."""
    left, made = dict(tensors), {}
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("transformer_blocks.")}
    for number in sorted(numbers):
        for theirs, parts in _SD3_FUSED:
            for end in ("weight", "bias"):
                names = [f"transformer_blocks.{number}.{part}.{end}" for part in parts]
                if names[0] in left:
                    made[f"joint_blocks.{number}.{theirs}.{end}"] = torch.cat([left.pop(name) for name in names])
    swapped = ("norm_out.linear", f"transformer_blocks.{max(numbers)}.norm1_context.linear")
    for name, value in left.items():
        layer, _, end = name.rpartition(".")
        value = torch.cat(value.chunk(2)[::-1]) if layer in swapped else value
        if layer == "norm_out.linear":
            made[f"final_layer.adaLN_modulation.1.{end}"] = value
        elif name in _SD3:
            made[_SD3[name]] = value
        elif layer.startswith("transformer_blocks."):
            _, number, inner = layer.split(".", 2)
            made[f"joint_blocks.{number}.{_SD3[inner]}.{end}"] = value
        else:
            made[f"{_SD3[layer]}.{end}"] = value
    return made


# Of Krea 2: parts of its names, the longest first, and what its makers call them.
_KREA2 = {
    "text_fusion.": "txtfusion.",
    "transformer_blocks.": "blocks.",
    "img_in.": "first.",
    "time_embed.linear_1.": "tmlp.0.",
    "time_embed.linear_2.": "tmlp.2.",
    "time_mod_proj.": "tproj.1.",
    "txt_in.norm.weight": "txtmlp.0.scale",
    "txt_in.linear_1.": "txtmlp.1.",
    "txt_in.linear_2.": "txtmlp.3.",
    "final_layer.scale_shift_table": "last.modulation.lin",
    "final_layer.norm.weight": "last.norm.scale",
    "final_layer.linear.": "last.linear.",
    ".scale_shift_table": ".mod.lin",
    ".norm1.weight": ".prenorm.scale",
    ".norm2.weight": ".postnorm.scale",
    ".attn.norm_q.weight": ".attn.qknorm.qnorm.scale",
    ".attn.norm_k.weight": ".attn.qknorm.knorm.scale",
    ".attn.to_gate.": ".attn.gate.",
    ".attn.to_out.0.": ".attn.wo.",
    ".attn.to_q.": ".attn.wq.",
    ".attn.to_k.": ".attn.wk.",
    ".attn.to_v.": ".attn.wv.",
    ".ff.": ".mlp.",
}


def krea2_original(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Krea 2's transformer as its makers name it, with the six modulations of a block in one row."""
    made = {}
    for name, value in tensors.items():
        for ours, theirs in _KREA2.items():
            name = name.replace(ours, theirs)
        made[name] = value.flatten() if name.endswith(".mod.lin") else value.contiguous()
    return made
