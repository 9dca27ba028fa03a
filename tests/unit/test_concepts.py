"""The subjects of a job: where their pictures and prompts come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreambooth_sm.data.concepts import find_subjects
from dreambooth_sm.errors import UserError
from tests.helpers.training import hyperparameters, paint_pictures


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Three pictures of a subject and two of its class."""
    paint_pictures(tmp_path / "images", 3)
    paint_pictures(tmp_path / "class_images", 2, seed=5)
    return {"instance_data_dir": str(tmp_path / "images"), "class_data_dir": str(tmp_path / "class_images")}


def test_one_subject(folders: dict[str, str], tmp_path: Path) -> None:
    h = hyperparameters(**folders, class_prompt="photo of a toy", with_prior_preservation=True)
    (subject,) = find_subjects(h)
    assert [path.name for path in subject.pictures] == ["00.png", "01.png", "02.png"]
    assert (subject.prompt, subject.class_prompt) == ("photo of zwx toy", "photo of a toy")
    assert subject.class_directory == tmp_path / "class_images"
    assert [path.name for path in subject.class_pictures] == ["00.png", "01.png"]


def test_no_more_class_pictures_than_are_wanted(folders: dict[str, str]) -> None:
    values = {**folders, "class_prompt": "photo of a toy", "with_prior_preservation": True}
    (subject,) = find_subjects(hyperparameters(**values, num_class_images=1))
    assert [path.name for path in subject.class_pictures] == ["00.png"]


def test_without_prior_preservation_class_pictures_are_not_even_looked_at(folders: dict[str, str]) -> None:
    Path(folders["class_data_dir"], "00.png").write_text("no picture")
    (subject,) = find_subjects(hyperparameters(**folders, class_prompt="photo of a toy"))
    assert subject.class_prompt is None
    assert subject.class_pictures == ()


def test_a_class_folder_that_is_not_there_yet_is_no_problem(folders: dict[str, str], tmp_path: Path) -> None:
    values = {**folders, "class_data_dir": str(tmp_path / "none"), "class_prompt": "a toy"}
    (subject,) = find_subjects(hyperparameters(**values, with_prior_preservation=True))
    assert subject.class_pictures == ()


@pytest.mark.parametrize("as_file", [False, True])
def test_several_concepts(tmp_path: Path, as_file: bool) -> None:
    paint_pictures(tmp_path / "duck", 2)
    paint_pictures(tmp_path / "cup", 1)
    concepts = [
        {"instance_data_dir": str(tmp_path / "duck"), "instance_prompt": r"photo\ of\ zwx\ duck"},
        {"instance_data_dir": str(tmp_path / "cup"), "instance_prompt": "photo of qqz cup", "class_prompt": "a cup"},
    ]
    given = json.dumps(concepts)
    if as_file:
        path = tmp_path / "concepts.json"
        path.write_text(given, encoding="utf-8")
        given = str(path)
    values = {"class_prompt": "photo of a toy", "with_prior_preservation": True, "class_data_dir": str(tmp_path / "no")}
    duck, cup = find_subjects(hyperparameters(concepts_list=given, **values))
    assert (duck.prompt, duck.class_prompt, len(duck.pictures)) == ("photo of zwx duck", "photo of a toy", 2)
    assert (cup.prompt, cup.class_prompt, len(cup.pictures)) == ("photo of qqz cup", "a cup", 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("[{", "can't be read as JSON"),
        ("{}", "concepts_list"),
        ('[{"instance_promt": "a"}]', "'instance_promt' is not a key of a concept"),
        ("[]", "concepts_list is empty"),
    ],
)
def test_a_broken_concepts_file_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "concepts.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="concepts_list") as caught:
        find_subjects(hyperparameters(concepts_list=str(path)))
    assert said in str(caught.value)


def test_a_missing_channel_is_told_from_a_missing_folder(tmp_path: Path) -> None:
    for folder, said in (("data/images", "the job has no channel 'images'"), ("mine", "name the directory")):
        with pytest.raises(UserError, match=said):
            find_subjects(hyperparameters(instance_data_dir=str(tmp_path / folder)))


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    for name in ("notes.txt", ".DS_Store"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"holds no pictures \(2 other files\)"):
        find_subjects(hyperparameters(instance_data_dir=str(tmp_path)))


def test_everything_that_is_wrong_is_told_at_once_and_only_once(folders: dict[str, str], tmp_path: Path) -> None:
    Path(folders["instance_data_dir"], "01.png").write_text("text")
    Path(folders["class_data_dir"], "00.png").write_bytes(b"")
    concepts = [{}, {}, {"instance_data_dir": str(tmp_path / "gone")}]
    values = {**folders, "class_prompt": "a toy", "with_prior_preservation": True}
    with pytest.raises(UserError) as caught:
        find_subjects(hyperparameters(concepts_list=concepts, **values))
    told = caught.value.problems
    assert [any(name in line for line in told) for name in ("images/01.png", "class_images/00.png", "gone")] == [
        True
    ] * 3
    assert len(told) == 3


# Class folders that concepts share


def two_classes(tmp_path: Path, *prompts: str) -> dict[str, object]:
    paint_pictures(tmp_path / "duck", 2)
    paint_pictures(tmp_path / "cup", 2, seed=3)
    concepts = [
        {"instance_data_dir": str(tmp_path / name), "class_prompt": prompt}
        for name, prompt in zip(("duck", "cup"), prompts, strict=True)
    ]
    return {
        "concepts_list": concepts,
        "class_data_dir": str(tmp_path / "class_images"),
        "with_prior_preservation": True,
    }


def test_concepts_of_different_classes_have_folders_of_their_own(tmp_path: Path) -> None:
    h = hyperparameters(**two_classes(tmp_path, "photo of a toy", "фото чашки!"))
    folders = [tmp_path / "class_images" / name for name in ("photo-of-a-toy", "фото-чашки")]
    assert [subject.class_directory for subject in find_subjects(h)] == folders
    for folder, count in zip(folders, (1, 2), strict=True):
        paint_pictures(folder, count, seed=7)
    found = find_subjects(h)
    assert [len(subject.class_pictures) for subject in found] == [1, 2]
    assert all(path.parent == s.class_directory for s in found for path in s.class_pictures)
    paint_pictures(tmp_path / "class_images", 1)
    with pytest.raises(UserError, match="'photo of a toy' to photo-of-a-toy, those of 'фото чашки!' to фото-чашки"):
        find_subjects(h)


def test_prompts_that_would_have_one_folder_have_two(tmp_path: Path) -> None:
    first, second = find_subjects(hyperparameters(**two_classes(tmp_path, "a toy", "a toy!")))
    assert first.class_directory != second.class_directory


def test_concepts_of_one_class_share_their_folder(tmp_path: Path) -> None:
    paint_pictures(tmp_path / "class_images", 2)
    found = find_subjects(hyperparameters(**two_classes(tmp_path, "a toy", "a toy")))
    assert [subject.class_directory for subject in found] == [tmp_path / "class_images"] * 2
    assert [len(subject.class_pictures) for subject in found] == [2, 2]


# Findings on the way


def test_captions_and_findings(folders: dict[str, str]) -> None:
    directory = Path(folders["instance_data_dir"])
    (directory / "00.txt").write_text("on a table, at night")
    (directory / "bad.png").write_text("text")
    Path(folders["class_data_dir"], "00.png").write_text("text")
    told: list[str] = []
    h = hyperparameters(
        **folders,
        instance_prompt="photo of zwx toy, [filewords]",
        class_prompt="photo of a toy",
        with_prior_preservation=True,
        on_bad_image="skip",
    )
    (subject,) = find_subjects(h, told.append)
    assert subject.prompt == "photo of zwx toy"
    assert subject.prompts == ("photo of zwx toy, on a table, at night", "photo of zwx toy", "photo of zwx toy")
    assert [path.name for path in subject.pictures] == ["00.png", "01.png", "02.png"]
    assert [path.name for path in subject.class_pictures] == ["01.png"]
    said = ["images/bad.png is not a picture", "class_images/00.png is not a picture", "3 pictures in"]
    assert [sum(words in line for line in told) for words in said] == [1, 1, 1]


def test_a_prompt_of_captions_alone(folders: dict[str, str]) -> None:
    for number in range(3):
        Path(folders["instance_data_dir"], f"0{number}.txt").write_text(f"zwx toy, view {number}")
    (subject,) = find_subjects(hyperparameters(**folders, instance_prompt="[filewords]"))
    assert subject.prompts == ("zwx toy, view 0", "zwx toy, view 1", "zwx toy, view 2")
    assert subject.prompt == "zwx toy, view 0"
