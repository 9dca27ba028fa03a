"""Toys: what one is, what a photo of it shows, and what captions and classifiers say about it. Draws nothing.

A toy keeps its looks from photo to photo; place, size, pose and background belong to the scene.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from dreambooth_sm.toybox.labels import (
    BACKGROUNDS,
    BODIES,
    COLOURS,
    EARS,
    EYES,
    FEET,
    HATS,
    KINDS,
    LABELS,
    MOUTHS,
    PATTERNS,
)

# Parts that only held-out subjects have: a wizard hat and a scarf.
_RANDOM_HATS = tuple(hat for hat in HATS if hat != "wizard hat")
# Under a hat there is no room for tall ears.
_EARS_BESIDE_HATS = ("none", "round", "pointy")

# Creatures are what DreamBooth is shown on, and the only kind with parts of its own.
_CREATURE_SHARE = 0.35

_PLACES = {
    "meadow": "in the meadow",
    "beach": "on the beach",
    "snow": "in the snow",
    "street": "on the street",
    "room": "in a room",
    "table": "on a table",
    "night": "at night",
}
_EAR_WORDS = {
    "round": "round ears",
    "pointy": "pointy ears",
    "long": "long ears",
    "horns": "horns",
    "antennae": "antennae",
}
_OPENINGS = {"a photo of": 0.5, "photo of": 0.25, "a picture of": 0.15, "": 0.1}


@dataclass(frozen=True)
class Toy:
    """One individual: two photos of it differ in nothing that is named here.

    The fields from ``body`` on are those of creatures; other kinds leave them as they are.

    Attributes:
        kind: of ``KINDS``.
        colour: of ``COLOURS``; the colour that a caption names.
        pattern: of ``PATTERNS``.
        second_colour: of stripes, spots, and of trim such as a roof, a sail or shoes.
        seed: decides what has no name: the exact shades, the width of stripes, small differences in build.
        hat_colour, belly_colour, scarf_colour: of ``COLOURS``; mean nothing where there is no such part.
    """

    kind: str
    colour: str
    pattern: str = "plain"
    second_colour: str = "white"
    seed: int = 0
    body: str = "egg"
    ears: str = "none"
    eyes: int = 2
    mouth: str = "smile"
    feet: str = "feet"
    arms: bool = True
    hat: str = "none"
    hat_colour: str = "red"
    belly: bool = False
    belly_colour: str = "white"
    scarf: bool = False
    scarf_colour: str = "red"


@dataclass(frozen=True)
class Scene:
    """One photo of a toy. Lengths are shares of the picture's side, and the origin is its upper left corner.

    Attributes:
        background: of ``BACKGROUNDS``.
        x: centre of the toy, from the left.
        foot: where the toy stands, from the top.
        size: side of the square that the toy is drawn in, about its height: 0.62 to 0.84.
        tilt: radians, clockwise.
        mirrored: flipped from left to right.
        pose: from -1, arms and tails down, to 1, up.
        gaze: where the eyes look, right and down, each from -1 to 1.
        seed: of the background's details.
    """

    toy: Toy
    background: str
    x: float = 0.5
    foot: float = 0.92
    size: float = 0.76
    tilt: float = 0.0
    mirrored: bool = False
    pose: float = 0.0
    gaze: tuple[float, float] = (0.0, 0.0)
    seed: int = 0


HELD_OUT: Mapping[str, Toy] = {
    "teal_hatter": Toy(
        "creature",
        "teal",
        second_colour="orange",
        body="pear",
        mouth="teeth",
        hat="top hat",
        hat_colour="purple",
        belly=True,
        belly_colour="orange",
    ),
    "star_wizard": Toy(
        "creature",
        "pink",
        pattern="spotted",
        second_colour="purple",
        body="egg",
        feet="legs",
        hat="wizard hat",
        hat_colour="blue",
    ),
    "scarf_rabbit": Toy(
        "creature",
        "white",
        second_colour="pink",
        body="round",
        ears="long",
        mouth="open",
        scarf=True,
        scarf_colour="red",
    ),
    "tiger_cat": Toy("cat", "orange", pattern="striped", second_colour="black"),
    "bumblebee_car": Toy("car", "yellow", pattern="striped", second_colour="black"),
    "dotted_cup": Toy("cup", "blue", pattern="spotted", second_colour="yellow"),
}
# A toy that shares all of these with a subject would show it to the base model.
DISTINGUISHED_BY: Mapping[str, tuple[str, ...]] = {
    "teal_hatter": ("kind", "colour", "hat"),
    "star_wizard": ("hat",),
    "scarf_rabbit": ("scarf",),
    "tiger_cat": ("kind", "colour", "pattern"),
    "bumblebee_car": ("kind", "colour", "pattern"),
    "dotted_cup": ("kind", "colour", "pattern"),
}


def labels(scene: Scene) -> dict[str, int]:
    """For every head of ``LABELS``, the index of what the scene shows; -1 where the head does not apply.

    A creature's heads apply to creatures alone; ``hat_colour`` and ``belly_colour`` where there is a hat or a belly.
    """
    toy = scene.toy
    shown = {"kind": toy.kind, "colour": toy.colour, "pattern": toy.pattern, "background": scene.background}
    if toy.kind == "creature":
        shown |= {"body": toy.body, "hat": toy.hat, "ears": toy.ears, "eyes": str(toy.eyes), "mouth": toy.mouth}
        shown |= {"feet": toy.feet, "belly": "belly" if toy.belly else "none"}
        shown |= {"scarf": "scarf" if toy.scarf else "none"}
        if toy.hat != "none":
            shown["hat_colour"] = toy.hat_colour
        if toy.belly:
            shown["belly_colour"] = toy.belly_colour
    return {head: values.index(shown[head]) if head in shown else -1 for head, values in LABELS.items()}


def is_held_out(toy: Toy) -> bool:
    """Whether a toy has all that distinguishes one of the held-out subjects."""
    return any(
        all(getattr(toy, trait) == getattr(HELD_OUT[subject], trait) for trait in traits)
        for subject, traits in DISTINGUISHED_BY.items()
    )


def random_toy(rng: random.Random, kind: str | None = None) -> Toy:
    """A toy that the base model may see: never one of, or close to, the held-out subjects.

    Args:
        kind: of ``KINDS``; left out, a creature in 35 % of all cases, else one of the others.
    """
    if kind is None:
        kind = "creature" if rng.random() < _CREATURE_SHARE else rng.choice([k for k in KINDS if k != "creature"])
    while True:
        toy = _random_creature(rng) if kind == "creature" else _random_plain_toy(rng, kind)
        if not is_held_out(toy):
            return toy


def _random_plain_toy(rng: random.Random, kind: str) -> Toy:
    colour = rng.choice(tuple(COLOURS))
    return Toy(kind, colour, _random_pattern(rng), _contrasting_colour(rng, colour), seed=rng.getrandbits(32))


def _random_creature(rng: random.Random) -> Toy:
    colour = rng.choice(tuple(COLOURS))
    hat = rng.choice(_RANDOM_HATS[1:]) if rng.random() < 0.5 else "none"
    return Toy(
        "creature",
        colour,
        _random_pattern(rng),
        _contrasting_colour(rng, colour),
        seed=rng.getrandbits(32),
        body=rng.choice(BODIES),
        ears=rng.choice(EARS if hat == "none" else _EARS_BESIDE_HATS),
        eyes=rng.choices(EYES, (0.25, 0.55, 0.2))[0],
        mouth=rng.choice(MOUTHS),
        feet=rng.choice(FEET),
        arms=rng.random() < 0.8,
        hat=hat,
        hat_colour=_contrasting_colour(rng, colour),
        belly=rng.random() < 0.5,
        belly_colour=_contrasting_colour(rng, colour),
    )


def _random_pattern(rng: random.Random) -> str:
    return rng.choices(PATTERNS, (0.5, 0.25, 0.25))[0]


def _contrasting_colour(rng: random.Random, colour: str) -> str:
    """A colour that is told from another at a glance, by its brightness too."""
    base = COLOURS[colour]
    others = [
        name
        for name, other in COLOURS.items()
        if abs(_luma(other) - _luma(base)) > 35 and sum(abs(a - b) for a, b in zip(other, base, strict=True)) > 170
    ]
    return rng.choice(others)


def _luma(colour: tuple[int, int, int]) -> float:
    red, green, blue = colour
    return 0.3 * red + 0.59 * green + 0.11 * blue


def random_scene(rng: random.Random, toy: Toy | None = None, background: str | None = None) -> Scene:
    """A photo of a toy, or of a random one, on a background of ``BACKGROUNDS``, or on a random one."""
    size = rng.uniform(0.62, 0.84)
    reach = size / 2 + 0.06  # a tilt moves the corners outwards
    return Scene(
        toy=toy or random_toy(rng),
        background=background or rng.choice(BACKGROUNDS),
        x=rng.uniform(reach, 1 - reach),
        foot=rng.uniform(max(0.84, size + 0.07), 0.95),
        size=size,
        tilt=rng.uniform(-0.09, 0.09),
        mirrored=rng.random() < 0.5,
        pose=rng.uniform(-1, 1),
        gaze=(rng.uniform(-1, 1), rng.uniform(-1, 1)),
        seed=rng.getrandbits(32),
    )


def scenes_of(toy: Toy, count: int, seed: int) -> list[Scene]:
    """Photos of one toy; no background comes again before all had their turn. The same seed gives the same photos."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scenes += [random_scene(rng, toy, background) for background in rng.sample(BACKGROUNDS, len(BACKGROUNDS))]
    return scenes[:count]


def caption(scene: Scene, rng: random.Random, name: str | None = None) -> str:
    """A true description of a scene, such as "a photo of a red striped cat toy on the beach".

    It always says "toy"; the opening varies, and colour, pattern, kind, parts and background are left out now and
    then, each by itself. Parts are said of a kind alone: a caption without one ends at "toy" and the background.

    Args:
        name: of the individual; stands in for all that the toy looks like: "a photo of qfx creature toy at night".
    """
    (opening,) = rng.choices(list(_OPENINGS), list(_OPENINGS.values()))
    says_kind = rng.random() < (0.8 if name is None else 0.4)
    noun = f"{scene.toy.kind} toy" if says_kind else "toy"
    subject = f"{name} {noun}" if name else _description(scene.toy, noun, says_kind, rng)
    place = _PLACES[scene.background] if rng.random() < 0.6 else ""
    return " ".join(part for part in (opening, subject, place) if part)


def _description(toy: Toy, noun: str, says_parts: bool, rng: random.Random) -> str:
    adjectives = []
    if rng.random() < 0.65:
        adjectives.append(toy.colour)
    if rng.random() < (0.08 if toy.pattern == "plain" else 0.6):
        adjectives.append(toy.pattern)
    described = _with_article(" ".join([*adjectives, noun]))
    parts = _parts(toy, rng) if says_parts and toy.kind == "creature" else []
    return f"{described} with {_listed(parts)}" if parts else described


def _parts(toy: Toy, rng: random.Random) -> list[str]:
    """Some of a creature's parts, in words."""
    parts = []
    if toy.hat != "none" and rng.random() < 0.6:
        parts.append(_coloured(toy.hat, toy.hat_colour, rng))
    if toy.ears != "none" and rng.random() < 0.3:
        parts.append(_EAR_WORDS[toy.ears])
    if toy.eyes != 2 and rng.random() < 0.3:
        parts.append("one eye" if toy.eyes == 1 else "three eyes")
    if toy.scarf and rng.random() < 0.6:
        parts.append(_coloured("scarf", toy.scarf_colour, rng))
    if toy.belly and rng.random() < 0.5:
        parts.append(_coloured("belly", toy.belly_colour, rng))
    if toy.feet == "wheels" and rng.random() < 0.3:
        parts.append("wheels")
    return parts


def _coloured(part: str, colour: str, rng: random.Random) -> str:
    return _with_article(f"{colour} {part}" if rng.random() < 0.8 else part)


def _listed(parts: list[str]) -> str:
    *firsts, last = parts
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _named_toys() -> dict[str, Toy]:
    """Names of three consonants, which are not words, and are left free of those that DreamBooth prompts use."""
    rng = random.Random(200)
    named: dict[str, Toy] = {}
    while len(named) < 200:
        name = "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=3))
        if name not in named and name not in ("zwx", "sks"):
            named[name] = random_toy(rng, "creature")
    return named


NAMED: Mapping[str, Toy] = _named_toys()
