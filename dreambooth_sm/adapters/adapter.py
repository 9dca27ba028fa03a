"""An adapter in memory, whatever its file's layout was or will be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from dreambooth_sm.adapters.layers import Layer, LowRank
from dreambooth_sm.errors import UserError
from dreambooth_sm.families import DEFAULT, FAMILIES, Facts
from dreambooth_sm.stored.files import Stored

# Layers by the names that diffusers and transformers (5) give their modules, such as
# ``encoder.layers.0.self_attn.q_proj`` of a CLIPTextModel.
Layers: TypeAlias = Mapping[str, Layer]
_CLIP_LAYER = re.compile(r"((?:text_model\.)?encoder\.layers\.)(\d+)\.(?:self_attn\.[qkv]_proj|mlp\.fc[12])")


@dataclass(frozen=True)
class Adapter:
    """What was trained beside a model.

    Attributes:
        parts: by the pipeline's names of the modules: ``unet``, ``text_encoder``, ``text_encoder_2``, ``transformer``.
        notes: what the file says about itself.
        unknown: names of tensors in the file that are of no layer known here.
        layout: of the file.
        words: that were learned with it: ``(vectors, width)`` by word and text encoder.
        family: of its base model, where the names of its layers tell; empty for Stable Diffusion 1, 2 and XL.
    """

    parts: Mapping[str, Layers]
    notes: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    layout: str = ""
    words: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    family: str = ""

    @property
    def facts(self) -> Facts:
        """Of its base model's family; of the usual one where its layers don't tell."""
        return FAMILIES[self.family or DEFAULT].facts

    def __iter__(self) -> Iterator[tuple[str, str, Layer]]:
        """Each layer with its part and its name."""
        for part, layers in self.parts.items():
            for name, layer in layers.items():
                yield part, name, layer

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({layer.kind for _, _, layer in self}))

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({layer.rank for _, _, layer in self}))


def check_fit(adapter: Adapter, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], base: str) -> None:
    """Raises UserError where an adapter is for another model.

    Args:
        shapes: of the weights of each part of the base model.
        base: the base model's name.
    """
    problems: list[str] = []
    for part, layers in adapter.parts.items():
        if part not in shapes:
            problems.append(f"it has layers of {part}, which {base} has not")
            continue
        for name, layer in layers.items():
            shape = shapes[part].get(f"{name}.weight")
            if shape is None:
                problems.append(f"{base} has no {name} in its {part}")
            elif not layer.fits(shape):
                problems.append(f"{name} of {part} is {' x '.join(map(str, shape))} in {base}, and not in the adapter")
    if problems:
        more = f", and {len(problems) - 1} layers more" if len(problems) > 1 else ""
        raise UserError(f"the adapter is for another base model: {problems[0]}{more}")


def with_projections(layers: Layers) -> Layers:
    """A text encoder's LoRA with an output projection in every attention, of zeros where it has none. By them diffusers
    tells what it has before it: without them versions from 0.27 to 0.42 raise, or leave other layers out.

    Args:
        layers: of CLIP; those of other modules and kinds are left as they are.
    """
    more: dict[str, Layer] = {}
    for name, layer in layers.items():
        match = _CLIP_LAYER.fullmatch(name)
        if match and isinstance(layer, LowRank) and layer.magnitude is None:
            width = int(layer.up.shape[0] if name.endswith("fc2") else layer.down.shape[1])
            for number in range(int(match[2]) + 1):
                projection = f"{match[1]}{number}.self_attn.out_proj"
                if projection not in layers:
                    more[projection] = LowRank.zeros(layer.rank, width, layer.down.dtype)
    return {**layers, **more}


def merge(layers: Layers, weights: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """The weights of a module with an adapter in them, in their own precision; those without are shared.

    Args:
        layers: of this module.
        weights: of the module, by name, as its ``state_dict`` has them.
        strength: 0 leaves them as they are, 1 takes all of what was trained.
    """
    merged = dict(weights)
    for name, layer in layers.items():
        merged[f"{name}.weight"] = merged_weight(layer, weights[f"{name}.weight"], strength)
    return merged


def merge_stored(layers: Layers, weights: Mapping[str, Stored], strength: float = 1.0) -> dict[str, Stored]:
    """:func:`merge` for weights that are read when they are wanted: one layer at a time is in memory. Those with an
    adapter in them are float32."""

    def merged(layer: Layer, weight: Stored) -> Stored:
        def piece(start: int, stop: int) -> Tensor:
            return merged_weight(layer, weight.read().float(), strength).flatten()[start:stop]

        return weight.of_pieces(piece, dtype=torch.float32, in_pieces=False)

    found = {name.removesuffix(".weight"): name for name in weights}
    return {**weights, **{found[name]: merged(layer, weights[found[name]]) for name, layer in layers.items()}}


@torch.no_grad()
def merged_weight(layer: Layer, weight: Tensor, strength: float = 1.0) -> Tensor:
    """One weight with its layer in it, in its own precision."""
    return (weight.float() + strength * layer.change(weight)).to(weight.dtype)
