"""The layers of transformers in adapters' files: by the names of diffusers, or by those of the model's makers, which
diffusers' own converters translate."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache

import torch

from dreambooth_sm.adapters.layers import Layer, LowRank
from dreambooth_sm.families import FAMILIES, Facts
from dreambooth_sm.stored.denoiser_file import converted_names
from dreambooth_sm.stored.model import class_of, empty_module

# What stands before the names, by layout. Files of older programs have nothing there.
_DOTTED = {"transformer.": "diffusers", "diffusion_model.": "comfyui"}
# The header's field that says, where layers do not, what they are beside.
ARCHITECTURE_FIELD = "modelspec.architecture"
# Of sides that are a share of others.
_ROUNDING = 0.03
_FLAT = re.compile(r"(lora_unet|lycoris)_")


def families_of_transformers() -> Iterator[Facts]:
    """Those whose adapters are read by these names."""
    return (family.facts for family in FAMILIES.values() if family.facts.adapters == "comfyui")


def architecture(facts: Facts) -> str:
    """What adapters' files say there of a family."""
    return f"{facts.name.replace('_', '-')}/lora"


def layout_of(keys: Iterable[str]) -> str:
    """The layout of a file, by the names of its tensors."""
    for key in keys:
        if _FLAT.match(key):
            return "kohya"
        if layout := next((layout for prefix, layout in _DOTTED.items() if key.startswith(prefix)), None):
            return layout
    return "diffusers"


def dotted(key: str, facts: Facts) -> str:
    """The name of a tensor in its denoiser, with its ending, without what layouts put before it."""
    if flat := _FLAT.match(key):
        layer, _, end = key[flat.end() :].partition(".")
        _, words = _known(facts.name)
        return ".".join([*(match[0] for match in words.finditer(layer)), end])
    prefix = next((prefix for prefix in _DOTTED if key.startswith(prefix)), "")
    return key.removeprefix(prefix)


def unlikeness(layers: Mapping[str, Layer], facts: Facts) -> tuple[int, int, int]:
    """How little layers look like those of a family, where several have the same names: how many have other sides than
    its own, relative to each other; how many of other sides than in the size that is nearest; and how many kinds of
    layers of its attention are missing.

    Args:
        layers: by the names that diffusers gives them.
    """
    known, _ = _known(facts.name)
    sides = {
        name: (layer.up.shape[0], layer.down.shape[1])
        for name, layer in layers.items()
        if isinstance(layer, LowRank) and "#" in _numberless(name)
    }
    others = 0
    for name, (outputs, inputs) in sides.items():
        its = known[_numberless(name)]
        others += abs(outputs / inputs / (its[0] / its[1]) - 1) > _ROUNDING
    nearest = min(sum(size[_numberless(name)] != its for name, its in sides.items()) for size in _sizes(facts.name))
    ends = tuple({f".{_numberless(end)}" for end in facts.adapted["attention"].denoiser})
    attention = {name for name in known if f".{name}".endswith(ends)}
    return others, nearest, len(attention - set(map(_numberless, layers)))


def in_diffusers(layers: Mapping[str, Layer], facts: Facts) -> tuple[dict[str, Layer], list[str]]:
    """Layers by the names that diffusers gives them, and the names of those that it has not.

    A layer that lies beside several of diffusers' at once, such as queries, keys and values in one matrix, becomes one
    beside each. That is exact for LoRA alone; other kinds are of no layer then.
    """
    known, _ = _known(facts.name)
    found: dict[str, Layer] = {}
    unknown: list[str] = []
    for name, layer in layers.items():
        for new, rows in _places(name, layer, facts, known).items():
            part = layer if rows is None else _rows(layer, rows)
            if part is None or _numberless(new) not in known:
                unknown.append(name)
            else:
                found[new] = part
    return found, list(dict.fromkeys(unknown))


def _places(name: str, layer: Layer, facts: Facts, known: Collection[str]) -> dict[str, slice | None]:
    """The names of a layer in diffusers, and which of its outputs each has; None for all."""
    if _numberless(name) in known:
        return {name: None}
    # Of other kinds, it only counts whether they are divided.
    outputs, inputs = (layer.up.shape[0], layer.down.shape[1]) if isinstance(layer, LowRank) else (0, 1)
    ours = {new: each.rows for each in facts.makers_names if (new := each.in_ours(name))}
    if ours:
        return {new: rows and _slice(rows, outputs) for new, rows in ours.items()}
    outputs = outputs or 3
    weight = torch.empty(outputs, inputs, device="meta")
    try:
        made = converted_names({f"{name}.weight": weight}, class_of(facts.pipeline, facts.denoiser))
    except Exception:  # of names that it does not expect
        return {name: None}
    places: dict[str, slice | None] = {}
    for new, part in made.items():
        first = int(part.storage_offset()) // inputs
        whole = part.shape == weight.shape
        places[new.removesuffix(".weight")] = None if whole else slice(first, first + part.shape[0])
    return places


def _slice(rows: tuple[int, int, int], outputs: int) -> slice:
    first, count, of = rows
    return slice(first * outputs // of, (first + count) * outputs // of)


def _rows(layer: Layer, rows: slice) -> Layer | None:
    """What a LoRA adds to some of a layer's outputs."""
    if not isinstance(layer, LowRank) or layer.magnitude is not None:
        return None
    return replace(layer, up=layer.up[rows])


@cache
def _known(family: str) -> tuple[dict[str, tuple[int, int]], re.Pattern[str]]:
    """The names of the layers of a family's denoiser, whatever their numbers, with outputs and inputs by default;
    and a pattern for the words of these names and of the makers'."""
    facts = FAMILIES[family].facts
    sides = _sides(facts, facts.config)
    names = [*sides, *(known.theirs for known in facts.makers_names)]
    words = sorted({word for name in names for word in name.split(".") if "_" in word}, key=len, reverse=True)
    return sides, re.compile("|".join([*map(re.escape, words), "[^_]+"]))


@cache
def _sizes(family: str) -> list[dict[str, tuple[int, int]]]:
    """Outputs and inputs of the layers, whatever their numbers, in each of a family's sizes."""
    facts = FAMILIES[family].facts
    configs = [facts.config, *({**facts.config, **size.config} for size in facts.sizes)]
    return [_sides(facts, config) for config in configs]


def _sides(facts: Facts, config: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):  # some compute tables of positions for seconds
        weights = empty_module(facts.denoiser, dict(config), facts.pipeline).state_dict()
    return {
        _numberless(name.removesuffix(".weight")): (weight.shape[0], weight.shape[-1])
        for name, weight in weights.items()
        if name.endswith(".weight")
    }


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)
