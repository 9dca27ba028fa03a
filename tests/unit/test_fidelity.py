"""How faithful pictures are: the measures on encoders with known answers, the judge on painted toys, real encoders."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Model,
)

from dreambooth_sm.errors import UserError
from dreambooth_sm.fidelity import (
    Clip,
    Dino,
    Encoders,
    Fidelity,
    JudgeReader,
    load_encoders,
    measure,
    measure_real,
    score,
    verdict,
)
from dreambooth_sm.toybox.judge import Judge, load_judge
from tests.helpers.encoders import save_clip, save_dino
from tests.helpers.tiny import byte_tokenizer
from toybox.paint import paint
from toybox.toys import HELD_OUT, random_scene, scenes_of

RED, GREEN, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
COLOURS = st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(1, 255))
SIDE = 28


class ColourEncoder:
    """A picture's first pixel as a vector: red, green and blue are orthogonal."""

    def embed(self, pictures: Sequence[Image.Image]) -> Tensor:
        return F.normalize(torch.tensor([picture.getpixel((0, 0)) for picture in pictures]).float(), dim=1)


class LengthReader:
    """Agrees with prompts of more than five letters."""

    def agreement(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        return sum(len(prompt) > 5 for prompt in prompts) / len(pictures)


COLOUR = Encoders(ColourEncoder(), LengthReader())


def pictures_of(*colours: tuple[int, int, int]) -> list[Image.Image]:
    return [Image.new("RGB", (2, 2), colour) for colour in colours]


# The measures


def test_identical_pictures_are_as_near_as_can_be_and_have_no_diversity() -> None:
    found = measure(COLOUR, training=[RED] * 2, generated=[RED] * 3, class_pictures=[RED] * 4)
    assert found == Fidelity(subject=1, nearest=1, prompt=None, prior=1, diversity=0)


def test_orthogonal_pictures_have_nothing_in_common() -> None:
    found = measure(COLOUR, training=[RED], generated=[GREEN], class_pictures=[GREEN, BLUE])
    assert found == Fidelity(subject=0, nearest=0, prompt=None, prior=0, diversity=1)


def test_each_measure_is_a_mean_over_its_own_pictures() -> None:
    found = measure(COLOUR, training=[RED, GREEN], generated=[RED, BLUE], class_pictures=[RED, RED, BLUE, BLUE])
    assert found.subject == pytest.approx(1 / 4)
    assert found.nearest == pytest.approx(1 / 2)
    assert found.prior == pytest.approx(1 / 4)
    assert found.diversity == pytest.approx(1 - 1 / 3)


def test_prompts_are_measured_where_there_are_prompts_and_a_reader() -> None:
    prompts = ["short", "longer"]
    assert measure(COLOUR, training=[RED], generated=[RED, RED], prompts=prompts).prompt == 1 / 2
    without_reader = Encoders(ColourEncoder())
    assert measure(without_reader, training=[RED], generated=[RED, RED], prompts=prompts).prompt is None


def test_class_measures_need_class_pictures() -> None:
    assert measure(COLOUR, training=[RED], generated=[RED]).prior is None
    one = measure(COLOUR, training=[RED], generated=[RED], class_pictures=[RED])
    assert (one.prior, one.diversity) == (1, None)


def test_real_pictures_are_not_compared_with_themselves() -> None:
    assert measure_real(COLOUR, [RED, GREEN, BLUE]) == Fidelity(subject=0, nearest=0)
    found = measure_real(COLOUR, [RED, RED, BLUE])
    assert (found.subject, found.nearest) == pytest.approx((1 / 3, 2 / 3))


@given(
    st.lists(COLOURS, min_size=1, max_size=4),
    st.lists(COLOURS, min_size=1, max_size=4),
    st.lists(COLOURS, min_size=2, max_size=4),
    st.randoms(use_true_random=False),
)
def test_measures_are_bounded_and_do_not_depend_on_the_order(
    training: list[tuple[int, int, int]],
    generated: list[tuple[int, int, int]],
    classes: list[tuple[int, int, int]],
    rng: random.Random,
) -> None:
    def of(training: list, generated: list, classes: list) -> Fidelity:
        return measure(
            COLOUR,
            training=pictures_of(*training),
            generated=pictures_of(*generated),
            class_pictures=pictures_of(*classes),
        )

    found = of(training, generated, classes)
    shuffled = of(*(rng.sample(colours, len(colours)) for colours in (training, generated, classes)))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(shuffled), abs=1e-5)
    assert found.subject <= found.nearest + 1e-6
    assert all(-1e-5 <= value <= 1 + 1e-5 for value in dataclasses.astuple(found) if value is not None)


def test_what_can_not_be_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="training pictures"):
        measure(COLOUR, training=[], generated=[RED])
    with pytest.raises(ValueError, match="generated"):
        measure(COLOUR, training=[RED], generated=[])
    with pytest.raises(ValueError, match="2 generated pictures have 1 prompts"):
        measure(COLOUR, training=[RED], generated=[RED, RED], prompts=["one"])
    with pytest.raises(ValueError, match="fewer than two"):
        measure_real(COLOUR, [RED])


# Scores and verdicts

BASE = Fidelity(subject=0.0, nearest=0.1, prompt=1.0, prior=0.0, diversity=0.96)
REAL = Fidelity(subject=0.96, nearest=0.97)
GOOD = Fidelity(subject=0.9, nearest=0.95, prompt=0.98, prior=0.1, diversity=0.88)


def test_the_base_scores_its_own_subject_fidelity() -> None:
    assert score(BASE, BASE) == BASE.subject


@pytest.mark.parametrize("worse", [{"subject": 0.5}, {"diversity": 0.4}, {"prior": 0.7}, {"prompt": 0.5}])
def test_every_loss_lowers_the_score(worse: dict[str, float]) -> None:
    assert score(dataclasses.replace(GOOD, **worse), BASE) < score(GOOD, BASE)


def test_a_collapsed_class_is_not_paid_for_by_the_last_of_subject_fidelity() -> None:
    collapsed = dataclasses.replace(GOOD, subject=0.96, prior=0.74, diversity=0.4)
    assert score(collapsed, BASE) < score(GOOD, BASE)


def test_better_than_the_base_earns_nothing() -> None:
    assert score(dataclasses.replace(BASE, diversity=1.0, prior=-0.2), BASE) == score(BASE, BASE)


def test_missing_measures_do_not_count() -> None:
    assert score(Fidelity(subject=0.8, nearest=0.9), BASE) == 0.8
    assert score(GOOD, Fidelity(subject=0.0, nearest=0.0)) == GOOD.subject


@pytest.mark.parametrize(
    ("changed", "word", "reason"),
    [
        ({}, "good", "94% of the way"),
        ({"subject": 0.3}, "underfit", "31% of the way to the real ones"),
        ({"diversity": 0.4}, "overfit", "42% of their diversity"),
        ({"prior": 0.6}, "overfit", "62% of the way to the subject"),
        ({"prompt": 0.4}, "overfit", "40% as much of their prompts"),
        ({"nearest": 0.999}, "overfit", "copies"),
        ({"prompt": None, "prior": None, "diversity": None}, "good", "94%"),
    ],
)
def test_verdicts(changed: dict[str, float | None], word: str, reason: str) -> None:
    found = verdict(dataclasses.replace(GOOD, **changed), BASE, REAL)
    assert found.word == word
    assert reason in found.reason
    assert "\n" not in found.reason


def test_a_subject_that_the_base_knows_already_is_learned() -> None:
    known = dataclasses.replace(BASE, subject=0.97)
    assert verdict(known, known, REAL).word == "good"


# The judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def photos(subject: str, count: int, seed: int) -> list[Image.Image]:
    return [paint(scene) for scene in scenes_of(HELD_OUT[subject], count, seed)]


@pytest.mark.slow
def test_the_judge_tells_a_subject_from_all_others() -> None:
    encoders = load_encoders("judge")
    training = photos("teal_hatter", 5, 0)
    of_subject = measure(encoders, training=training, generated=photos("teal_hatter", 4, 1)).subject
    of_others = [measure(encoders, training=training, generated=photos(s, 2, 1)).subject for s in HELD_OUT][1:]
    assert of_subject > 0.9
    assert of_subject > max(of_others) + 0.5
    assert of_subject == pytest.approx(measure_real(encoders, training).subject, abs=0.05)


def test_mixed_toys_are_more_diverse_than_photos_of_one() -> None:
    rng = random.Random(0)
    mixed = [paint(random_scene(rng)) for _ in range(10)]
    one = photos("tiger_cat", 10, 0)
    encoders = load_encoders()
    of_mixed = measure(encoders, training=one, generated=one, class_pictures=mixed)
    of_one = measure(encoders, training=one, generated=one, class_pictures=one)
    assert of_mixed.diversity is not None
    assert of_one.diversity is not None
    assert of_mixed.diversity > 0.8 > 0.2 > of_one.diversity


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        ("a photo of an orange striped cat toy", 1),
        ("a photo of an orange striped dog toy", 2 / 3),
        ("A picture of a blue boat toy.", 0),
        ("photo of zwx toy", None),
        # Colours of parts say nothing of the toy's own.
        ("photo of a cat toy with a blue hat", 1),
    ],
)
def test_the_share_of_named_attributes_that_a_picture_shows(judge: Judge, prompt: str, share: float | None) -> None:
    assert JudgeReader(judge).agreement(photos("tiger_cat", 1, 0), [prompt]) == share


def test_the_judge_reads_the_background_wherever_it_is_named(judge: Judge) -> None:
    scenes = scenes_of(HELD_OUT["tiger_cat"], 7, 0)
    pictures = [paint(scene) for scene in scenes]
    agreement = JudgeReader(judge).agreement
    true_prompts = [f"photo of zwx toy with a hat at the {scene.background}" for scene in scenes]
    assert agreement(pictures, true_prompts) == 1
    assert agreement(pictures, [*true_prompts[1:], true_prompts[0]]) == 0


# DINOv2 and CLIP


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def test_both_encoders_by_one_spec(dino: Path, clip: Path) -> None:
    encoders = load_encoders(f"dino={dino} clip={clip}")
    assert isinstance(encoders.pictures, Dino)
    assert isinstance(encoders.prompts, Clip)
    found = measure(encoders, training=[RED, GREEN], generated=[RED], prompts=["photo of a toy"], class_pictures=[BLUE])
    assert found.nearest == pytest.approx(1)
    assert found.prompt is not None
    assert -1 <= found.prompt <= 1


def test_one_encoder_alone(dino: Path, clip: Path) -> None:
    assert load_encoders(f"dino={dino}").prompts is None
    alone = load_encoders(f"clip={clip}")
    assert alone.pictures is alone.prompts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino", "clip"])
def test_embeddings_are_of_length_one_and_do_not_depend_on_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    encoder = load_encoders(f"{name}={request.getfixturevalue(name)}").pictures
    pictures = [*photos("dotted_cup", 33, 0)[:32], RED.convert("RGBA")]
    together = encoder.embed(pictures)
    assert together.dtype == torch.float32
    assert torch.allclose(together.norm(dim=1), torch.ones(33))
    assert torch.allclose(together[-1], encoder.embed(pictures[-1:])[0], atol=1e-5)
    assert torch.equal(together, encoder.embed(pictures))


def test_dino_is_the_class_token_and_clip_the_projections_of_transformers(dino: Path, clip: Path) -> None:
    picture = photos("dotted_cup", 1, 0)
    pixels = BitImageProcessorPil.from_pretrained(dino)(images=picture, return_tensors="pt").pixel_values
    token = Dinov2Model.from_pretrained(dino)(pixels).last_hidden_state[:, 0]
    assert torch.allclose(Dino(str(dino)).embed(picture), F.normalize(token, dim=1), atol=1e-5)

    tokens = byte_tokenizer()(["a toy"], padding="max_length", max_length=32, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=picture, return_tensors="pt").pixel_values
    output = CLIPModel.from_pretrained(clip)(input_ids=tokens.input_ids, pixel_values=pixels)
    encoder = Clip(str(clip))
    assert torch.allclose(encoder.embed(picture), output.image_embeds, atol=1e-5)
    similarity = (output.image_embeds * output.text_embeds).sum().item()
    assert encoder.agreement(picture, ["a toy"]) == pytest.approx(similarity, abs=1e-5)


def test_a_prompt_that_is_too_long_is_cut(clip: Path) -> None:
    assert -1 <= Clip(str(clip)).agreement([RED], ["zwx " * 100]) <= 1


# Specs and models that can't be used


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no encoder"),
        ("judges", "can't understand 'judges'"),
        ("judge dino=a", "can't understand 'judge'"),
        ("dino=", "can't understand 'dino='"),
        ("vgg=net", "can't understand 'vgg=net'"),
        ("clip=a clip=b", "clip is named twice"),
        ("dino=/no/such/place", "no such directory"),
    ],
)
def test_specs_that_can_not_be_used(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^fidelity_encoders: .*{message}"):
        load_encoders(spec)


def test_a_model_of_another_kind(dino: Path, clip: Path) -> None:
    with pytest.raises(UserError, match=r"clip=.* is a dinov2 model; name a clip model"):
        load_encoders(f"clip={dino}")
    with pytest.raises(UserError, match=r"dino=.* is a clip model; name a dinov2 model"):
        load_encoders(f"dino={clip}")


def test_damaged_models(dino: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        for path in dino.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        return target

    empty = tmp_path / "empty"
    empty.mkdir()
    cut = copied("cut")
    (cut / "model.safetensors").write_bytes(b"\0" * 100)
    deeper = copied("deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    blind = copied("blind")
    (blind / "preprocessor_config.json").unlink()
    for directory, message in ((empty, "can't be loaded"), (cut, "can't be loaded"), (blind, "can't be loaded")):
        with pytest.raises(UserError, match=message) as caught:
            load_encoders(f"dino={directory}")
        assert len(caught.value.problems) == 1
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"lacks encoder\.layer\.2"):
        load_encoders(f"dino={deeper}")


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}),
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "own.Own"}, "image_processor_type": "Own"}),
    ],
)
def test_code_that_comes_with_an_encoder_is_never_run(
    file: str, changed: dict[str, Any], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(clip, tmp_path / "clip"))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    (directory / file).write_text(json.dumps(json.loads((directory / file).read_text()) | changed))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    with pytest.raises(UserError, match=r"clip=.* brings code of its own \(auto_map"):
        load_encoders(f"clip={directory}")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_of_transformers_own_class(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Path(shutil.copytree(clip, tmp_path / "clip"))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    ours, theirs = (load_encoders(f"clip={each}").prompts for each in (directory, clip))
    assert ours
    assert theirs
    pictures = pictures_of((255, 0, 0))
    assert ours.agreement(pictures, ["a toy"]) == theirs.agreement(pictures, ["a toy"])
    assert not (tmp_path / "run").exists()
