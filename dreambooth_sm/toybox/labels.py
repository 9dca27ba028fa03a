"""Labels of the toybox's pictures: all that they can show, in the words that its judge tells apart."""

from __future__ import annotations

from collections.abc import Mapping

KINDS = (
    "cat",
    "dog",
    "bird",
    "fish",
    "car",
    "plane",
    "boat",
    "house",
    "tree",
    "cup",
    "ball",
    "robot",
    "creature",
)
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (218, 48, 44),
    "orange": (243, 142, 38),
    "yellow": (250, 218, 62),
    "green": (66, 160, 66),
    "teal": (36, 178, 176),
    "blue": (50, 98, 214),
    "purple": (132, 68, 182),
    "pink": (247, 144, 184),
    "brown": (134, 86, 50),
    "white": (246, 244, 240),
    "black": (46, 44, 52),
    "grey": (152, 154, 160),
}
PATTERNS = ("plain", "striped", "spotted")
BACKGROUNDS = ("meadow", "beach", "snow", "street", "room", "table", "night")

BODIES = ("egg", "round", "box", "pear", "cone")
HATS = ("none", "cap", "party hat", "top hat", "crown", "wizard hat")
EARS = ("none", "round", "pointy", "long", "horns", "antennae")
EYES = (1, 2, 3)
MOUTHS = ("smile", "open", "teeth", "beak")
FEET = ("feet", "legs", "wheels")

# By the judge's heads.
LABELS: Mapping[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "background": BACKGROUNDS,
    "body": BODIES,
    "hat": HATS,
    "hat_colour": tuple(COLOURS),
    "ears": EARS,
    "eyes": tuple(str(count) for count in EYES),
    "mouth": MOUTHS,
    "feet": FEET,
    "belly": ("none", "belly"),
    "belly_colour": tuple(COLOURS),
    "scarf": ("none", "scarf"),
}
