"""The toys that the small base model learns from: what they look like, and that captions and labels tell the truth."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from dreambooth_sm import toybox
from dreambooth_sm.gallery import grid
from dreambooth_sm.toybox.labels import BACKGROUNDS, COLOURS, EARS, HATS, KINDS, LABELS, PATTERNS
from toybox.backgrounds import paint_background
from toybox.paint import paint, paint_photos_of
from toybox.toys import HELD_OUT, NAMED, Scene, Toy, caption, labels, random_scene, random_toy, scenes_of

SEEDS = st.integers(0, 2**32)
PLACES = {
    "in the meadow": "meadow",
    "on the beach": "beach",
    "in the snow": "snow",
    "on the street": "street",
    "in a room": "room",
    "on a table": "table",
    "at night": "night",
}
OPENINGS = ("a photo of ", "photo of ", "a picture of ")
CREATURE_HEADS = {"body", "hat", "ears", "eyes", "mouth", "feet", "belly", "scarf"}


def creature(**traits: object) -> Toy:
    return replace(Toy("creature", "green", second_colour="yellow"), **traits)  # type: ignore[arg-type]


def pixels_of_toy(scene: Scene, side: int = 128) -> tuple[int, int, int, int]:
    """The box that the toy and its shadow cover."""
    background = paint_background(scene.background, 4 * side, scene.seed).reduce(4)
    box = ImageChops.difference(paint(scene, side), background).getbbox()
    assert box is not None
    return box


# Captions


def without_opening(text: str) -> str:
    return next((text.removeprefix(opening) for opening in OPENINGS if text.startswith(opening)), text)


def split_place(text: str) -> tuple[str, str | None]:
    """What is said of the toy, and the background."""
    for phrase, background in PLACES.items():
        if text.endswith(f" {phrase}"):
            return text.removesuffix(f" {phrase}"), background
    return text, None


def check_part(words: str, toy: Toy) -> None:
    """Whether one part of a creature, such as "a purple top hat", is true of it."""
    article, _, rest = words.partition(" ")
    if article not in ("a", "an"):
        counted = {"one eye": toy.eyes == 1, "three eyes": toy.eyes == 3, "wheels": toy.feet == "wheels"}
        assert counted.get(words, words.removesuffix(" ears") == toy.ears and toy.ears in EARS[1:]), words
        return
    assert article == ("an" if rest[0] in "aeiou" else "a")
    colour, part = rest.split(" ", 1) if rest.split()[0] in COLOURS else (None, rest)
    shown = {toy.hat: toy.hat_colour}
    if toy.belly:
        shown["belly"] = toy.belly_colour
    if toy.scarf:
        shown["scarf"] = toy.scarf_colour
    assert part in shown
    assert colour in (None, shown[part])


@given(SEEDS)
@settings(max_examples=400, deadline=None)
def test_a_caption_is_true_in_every_word(seed: int) -> None:
    rng = random.Random(seed)
    toy = rng.choice([None, *HELD_OUT.values()])
    scene = random_scene(rng, toy)
    text, background = split_place(without_opening(caption(scene, rng)))
    assert background in (None, scene.background)
    noun, _, parts = text.partition(" with ")
    article, *adjectives, last = noun.split()
    assert last == "toy"
    assert article == ("an" if noun.split()[1][0] in "aeiou" else "a")
    true_words = [scene.toy.colour, scene.toy.pattern, scene.toy.kind]
    assert adjectives == [word for word in true_words if word in adjectives]
    if parts:
        assert scene.toy.kind == "creature"
        for part in parts.replace(" and ", ", ").split(", "):
            check_part(part, scene.toy)


@given(SEEDS)
def test_a_named_toy_is_described_by_its_name_alone(seed: int) -> None:
    rng = random.Random(seed)
    name = rng.choice(list(NAMED))
    scene = random_scene(rng, NAMED[name])
    text, background = split_place(without_opening(caption(scene, rng, name)))
    assert text in (f"{name} toy", f"{name} creature toy")
    assert background in (None, scene.background)


def test_captions_leave_things_out_now_and_then() -> None:
    rng = random.Random(0)
    texts = [caption(random_scene(rng, HELD_OUT["teal_hatter"], "beach"), rng) for _ in range(2000)]
    shares = {
        word: sum(word in text.split() for text in texts) / len(texts)
        for word in ("toy", "creature", "teal", "beach", "hat", "belly")
    }
    assert shares.pop("toy") == 1
    assert shares.pop("creature") == pytest.approx(0.8, abs=0.05)
    assert all(0.3 < share < 0.7 for share in shares.values()), shares
    bare = sum(without_opening(text) == "a toy" for text in texts)
    assert bare > 30


@pytest.mark.parametrize(
    ("toy", "expected"),
    [
        (HELD_OUT["teal_hatter"], "a photo of a teal creature toy with a purple top hat and an orange belly in a room"),
        (HELD_OUT["tiger_cat"], "a photo of an orange striped cat toy in a room"),
    ],
)
def test_the_captions_of_the_examples_are_among_those_made(toy: Toy, expected: str) -> None:
    rng = random.Random(1)
    assert expected in {caption(random_scene(rng, toy, "room"), rng) for _ in range(2000)}


# Labels


@given(SEEDS)
@settings(deadline=None)
def test_labels_name_what_the_scene_shows(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng, rng.choice([None, *HELD_OUT.values()]))
    indices = labels(scene)
    toy = scene.toy
    assert indices.keys() == LABELS.keys()
    said = {head: LABELS[head][index] for head, index in indices.items() if index >= 0}
    assert [said[head] for head in ("kind", "colour", "pattern")] == [toy.kind, toy.colour, toy.pattern]
    assert said["background"] == scene.background
    assert all(index >= -1 for index in indices.values())
    if toy.kind != "creature":
        assert said.keys() == {"kind", "colour", "pattern", "background"}
        return
    assert said.keys() >= CREATURE_HEADS
    assert [said[head] for head in ("body", "hat", "ears", "mouth", "feet")] == [
        getattr(toy, trait) for trait in ("body", "hat", "ears", "mouth", "feet")
    ]
    assert said["eyes"] == str(toy.eyes)
    assert (said["belly"] == "belly", said["scarf"] == "scarf") == (toy.belly, toy.scarf)
    assert said.get("hat_colour") == (toy.hat_colour if toy.hat != "none" else None)
    assert said.get("belly_colour") == (toy.belly_colour if toy.belly else None)


# Which toys there are


def shows_a_held_out_subject(toy: Toy) -> bool:
    return (
        toy.hat == "wizard hat"
        or toy.scarf
        or (toy.kind == "creature" and toy.colour == "teal" and toy.hat == "top hat")
        or (toy.kind, toy.colour, toy.pattern)
        in (("cat", "orange", "striped"), ("car", "yellow", "striped"), ("cup", "blue", "spotted"))
    )


def test_the_base_model_never_sees_a_held_out_subject() -> None:
    assert all(shows_a_held_out_subject(toy) for toy in HELD_OUT.values())
    rng = random.Random(0)
    toys = [random_toy(rng, kind) for kind in ("creature", "cat", "car", "cup") for _ in range(2500)]
    toys += [random_toy(rng) for _ in range(2500)] + list(NAMED.values())
    assert not any(shows_a_held_out_subject(toy) for toy in toys)


def test_but_it_sees_everything_else() -> None:
    rng = random.Random(0)
    toys = [random_toy(rng) for _ in range(6000)]
    assert {toy.kind for toy in toys} == set(KINDS)
    for kind in KINDS:
        of_kind = [toy for toy in toys if toy.kind == kind]
        assert {toy.colour for toy in of_kind} == set(COLOURS)
        assert {toy.pattern for toy in of_kind} == set(PATTERNS)
    creatures = [toy for toy in toys if toy.kind == "creature"]
    assert {toy.hat for toy in creatures} == set(HATS) - {"wizard hat"}
    assert {toy.colour for toy in creatures if toy.hat == "top hat"} == set(COLOURS) - {"teal"}
    assert {toy.ears for toy in creatures} == set(EARS)
    assert len(creatures) / len(toys) == pytest.approx(0.35, abs=0.03)


def test_the_second_colour_is_another_one() -> None:
    rng = random.Random(0)
    for toy in (random_toy(rng) for _ in range(1000)):
        others = [toy.second_colour]
        if toy.kind == "creature":
            others += [toy.hat_colour, toy.belly_colour]
        assert toy.colour not in others


def test_named_toys_have_rare_names_and_looks_of_their_own() -> None:
    assert len(NAMED) == len(set(NAMED.values())) == 200
    assert all(len(name) == 3 and name.isalpha() and not set(name) & set("aeiouy") for name in NAMED)
    assert not {"zwx", "sks"} & NAMED.keys()
    assert {toy.kind for toy in NAMED.values()} == {"creature"}


@given(SEEDS)
def test_the_same_seed_gives_the_same_toy_and_scene(seed: int) -> None:
    assert random_scene(random.Random(seed)) == random_scene(random.Random(seed))


def test_photos_of_a_toy_vary_and_come_again() -> None:
    toy = HELD_OUT["teal_hatter"]
    scenes = scenes_of(toy, 10, seed=3)
    assert scenes == scenes_of(toy, 10, seed=3)
    assert scenes != scenes_of(toy, 10, seed=4)
    assert scenes_of(toy, 4, seed=3) == scenes[:4]
    assert {scene.toy for scene in scenes} == {toy}
    assert set(Counter(scene.background for scene in scenes).values()) == {1, 2}
    for trait in ("x", "foot", "size", "tilt", "pose", "gaze", "seed"):
        assert len({getattr(scene, trait) for scene in scenes}) == 10
    assert {scene.mirrored for scene in scenes} == {True, False}
    assert scenes_of(toy, 0, seed=3) == []


# Pictures


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_scene_gives_the_same_bytes(kind: str) -> None:
    scene = random_scene(random.Random(7), random_toy(random.Random(8), kind))
    picture = paint(scene)
    assert (picture.mode, picture.size) == ("RGB", (128, 128))
    assert picture.tobytes() == paint(scene).tobytes()


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_pattern_is_painted_at_every_size(kind: str, pattern: str, side: int) -> None:
    rng = random.Random(1)
    toy = replace(random_toy(rng, kind), pattern=pattern)
    assert paint(random_scene(rng, toy), side).size == (side, side)


def test_places_are_told_apart() -> None:
    toy = random_toy(random.Random(2), "ball")
    pictures = [paint(Scene(toy, background), 64) for background in BACKGROUNDS]
    assert len({picture.tobytes() for picture in pictures}) == len(BACKGROUNDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_toy_is_large_and_inside_the_frame(kind: str) -> None:
    rng = random.Random(3)
    for _ in range(12):
        scene = random_scene(rng, random_toy(rng, kind))
        left, top, right, bottom = pixels_of_toy(scene)
        assert min(left, top, 128 - right, 128 - bottom) >= 1
        assert 0.5 * 128 < bottom - top < 0.92 * 128


@pytest.mark.parametrize("tilt", [-0.09, 0.09])
@pytest.mark.parametrize("subject", HELD_OUT)
def test_the_largest_held_out_subject_is_inside_the_frame(subject: str, tilt: float) -> None:
    scene = Scene(HELD_OUT[subject], "snow", size=0.84, foot=0.93, tilt=tilt, pose=1)
    left, top, right, bottom = pixels_of_toy(scene)
    assert min(left, top, 128 - right, 128 - bottom) >= 1


@pytest.mark.parametrize(
    "traits",
    [
        *({"hat": hat} for hat in HATS[1:]),
        *({"ears": ears} for ears in EARS[1:]),
        {"eyes": 1},
        {"eyes": 3},
        {"mouth": "open"},
        {"mouth": "teeth"},
        {"mouth": "beak"},
        {"feet": "legs"},
        {"feet": "wheels"},
        {"body": "round"},
        {"body": "box"},
        {"body": "pear"},
        {"body": "cone"},
        {"arms": False},
        {"belly": True},
        {"scarf": True},
        {"hat": "cap", "hat_colour": "blue"},
        {"belly": True, "belly_colour": "blue"},
        {"pattern": "striped"},
        {"pattern": "spotted"},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_trait_of_a_creature_shows(traits: dict[str, object]) -> None:
    colours = {trait: value for trait, value in traits.items() if trait.endswith("_colour")}
    without = {} if not colours else {trait: value for trait, value in traits.items() if trait not in colours}
    before, after = (paint(Scene(creature(**chosen), "meadow")) for chosen in (without, traits))
    changed = ImageChops.difference(before, after).convert("L").point(lambda level: 255 * (level > 8))
    assert changed.histogram()[255] > 60


@pytest.mark.parametrize("pattern", ["striped", "spotted"])
def test_the_main_colour_covers_most_of_a_patterned_toy(pattern: str) -> None:
    ball = paint(Scene(Toy("ball", "red", pattern, "white"), "night")).crop((40, 50, 90, 100))
    green = ball.getchannel("G").histogram()
    assert 0.5 < sum(green[:128]) / sum(green) < 0.85


def test_the_photos_that_come_with_the_runtime_are_the_painters(tmp_path: Path) -> None:
    """The demo's subject is a toy that is held out."""
    painted = paint_photos_of(HELD_OUT["teal_hatter"], tmp_path / "new")
    names = [f"{number}.png" for number in range(5)]
    assert [sorted(path.name for path in folder.iterdir()) for folder in (painted, toybox.PHOTOS)] == [names, names]
    for name in names:
        with Image.open(painted / name) as new, Image.open(toybox.PHOTOS / name) as shipped:
            assert (shipped.mode, shipped.size) == ("RGB", (toybox.SIDE, toybox.SIDE))
            assert shipped.tobytes() == new.tobytes()


def test_a_grid_is_filled_row_by_row() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = grid([Image.new("RGB", (2, 2), colour) for colour in colours], columns=2)
    assert sheet.size == (4, 4)
    assert [sheet.getpixel(at) for at in ((0, 0), (3, 1), (1, 2), (2, 2))] == [*colours, (255, 255, 255)]
    with pytest.raises(ValueError, match="at least one"):
        grid([], columns=2)
