"""What an adapter's file tells of its base model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dreambooth_sm.adapters.adapter import Adapter
from dreambooth_sm.adapters.layers import Hadamard, Kronecker, Layer, LowRank, Rotation
from dreambooth_sm.adapters.names import LAYERS, LAYERS_FIELD

_SD1, _SD2, _XL = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL"
# By the widths of the text encoders' states, which go into cross attention.
_WIDTHS = {768: _SD1, 1024: _SD2, 2048: _XL}
_UP = {
    False: ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    True: [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
}


def base_model(adapter: Adapter) -> str | None:
    """The base model that an adapter is for, as far as its layers and its notes tell; None where they don't."""
    if adapter.family:
        return adapter.facts.title
    if "text_encoder_2" in adapter.parts:
        return _XL
    for part, name, layer in adapter:
        if part == "unet" and name.endswith((".attn2.to_k", ".attn2.to_v")) and (found := _WIDTHS.get(inputs(layer))):
            return found
    said = (adapter.notes.get("modelspec.architecture", ""), adapter.notes.get("ss_base_model_version", ""))
    for starts, title in ((("stable-diffusion-v1", "sd_v1"), _SD1), (("stable-diffusion-v2", "sd_v2"), _SD2)):
        if any(each.startswith(starts) for each in said):
            return title
    if any(each.startswith(("stable-diffusion-xl", "sdxl")) for each in said):
        return _XL
    # The text encoder of SD 2 is wider; that of SD 1 is one of XL's as well.
    first = next((layer for part, name, layer in adapter if part == "text_encoder" and "self_attn" in name), None)
    return _SD2 if first and inputs(first) == 1024 else None


def guessed_configs(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """As much of the configurations of an adapter's base model as names and metadata depend on. What tells nothing is
    taken for Stable Diffusion 1."""
    found = base_model(adapter)
    layers = adapter.notes.get(LAYERS_FIELD, "")
    velocity = adapter.notes.get("modelspec.prediction_type") == "v"
    unet = {
        "layers_per_block": int(layers) if layers.isdecimal() else LAYERS,
        "up_block_types": _UP[found == _XL],
        "cross_attention_dim": next(width for width, title in _WIDTHS.items() if title == (found or _SD1)),
    }
    scheduler = {"prediction_type": "v_prediction" if velocity else "epsilon"}
    return {"unet": unet, "scheduler": scheduler, **({"text_encoder_2": {}} if found == _XL else {})}


def inputs(layer: Layer) -> int:
    """How many numbers go into a layer; of a convolution, those of one point or of its kernel."""
    if isinstance(layer, LowRank):
        return int(layer.down.shape[1])
    if isinstance(layer, Hadamard):
        return int(layer.first[1].shape[1])
    if isinstance(layer, Kronecker):
        small, large = layer.sizes[1]
        return small * large
    assert isinstance(layer, Rotation)
    return layer.size * len(layer.angles)


def described(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """What an adapter is, in titles and words for people."""
    yield "kind", " and ".join(adapter.kinds)
    yield "layout", adapter.layout
    yield "base model", base_model(adapter) or "not told"
    yield "rank", _range([float(rank) for rank in adapter.ranks])
    yield "alpha", _range([getattr(layer, "scale", 1.0) * layer.rank for _, _, layer in adapter])
    for part, layers in adapter.parts.items():
        kinds = sorted({_short(name) for name in layers})
        yield part, f"{len(layers)} layers: {', '.join(kinds)}"
    if adapter.words:
        counts = {word: len(next(iter(vectors.values()))) for word, vectors in adapter.words.items()}
        yield "learned words", ", ".join(f"{word} ({count} vectors)" for word, count in counts.items())
    for title, field in (("title", "modelspec.title"), ("trigger phrase", "modelspec.trigger_phrase")):
        if said := adapter.notes.get(field):
            yield title, said
    if adapter.unknown:
        yield "not known", f"{len(adapter.unknown)} tensors, such as {adapter.unknown[0]}"


def _short(name: str) -> str:
    """What a layer is called in its block: ``attn1.to_q``."""
    words = [word for word in name.split(".") if not word.isdecimal()]
    return ".".join(words[-2:])


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
