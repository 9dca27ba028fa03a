"""Presets: values in place of defaults, by what is taught. What is set always wins over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PresetValue:
    """A value of a preset.

    Attributes:
        name: of the knob.
        methods: that it is for.
        why: where it comes from.
        unless: knobs that decide on the same where they are set.
    """

    name: str
    value: object
    methods: tuple[str, ...]
    why: str
    unless: tuple[str, ...] = ()

    @property
    def setting(self) -> str:
        return f"{self.name}={self.value}"


# Those whose length others have reported; hypernetworks and words keep their own.
_LONG = ("full", "lora", "pivotal")
PRESETS: Mapping[str, tuple[PresetValue, ...]] = {
    "object": (
        PresetValue(
            "max_train_steps",
            400,
            _LONG,
            "what others report of objects, at a batch of one; not measured on large models here",
            unless=("num_train_epochs",),
        ),
    ),
    "face": (
        PresetValue(
            "max_train_steps",
            1000,
            _LONG,
            "others report 800 to 1,200 for faces, at the usual rate and with class images; not measured here",
            unless=("num_train_epochs",),
        ),
    ),
    "style": (
        PresetValue(
            "prior",
            "output",
            ("lora",),
            "measured on the toybox: keeps most of what the model knew, learns as much, and needs no class images",
            unless=("num_class_images", "class_data_dir", "class_cache", "sample_guidance_scale"),
        ),
    ),
}
PRESET_KNOBS = tuple(dict.fromkeys(each.name for values in PRESETS.values() for each in values))


def described() -> str:
    """All presets, for a help text."""
    return "; ".join(f"{name}: {', '.join(map(_described, values))}" for name, values in PRESETS.items())


def _described(value: PresetValue) -> str:
    *others, last = value.methods
    return f"{value.setting} with method={' or '.join([', '.join(others), last] if others else [last])}"
