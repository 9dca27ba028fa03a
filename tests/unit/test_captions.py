"""Captions beside pictures, and the prompts that are made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreambooth_sm.data.captions import fill, read_captions, read_dataset_info, words_of
from dreambooth_sm.errors import UserError
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.knobs.escapes import unescape_prompt
from dreambooth_sm.knobs.pictures import FILEWORDS

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30).map(unescape_prompt)
parts = st.lists(words.filter(lambda text: FILEWORDS not in text), min_size=1, max_size=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them in a folder of its own; what they show is not looked at."""
    for name in ("a.jpg", "b.png", "deep/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def captions(folder: Path) -> dict[str, str]:
    pictures = sorted(p for p in folder.rglob("*") if p.suffix in (".jpg", ".png"))
    return {p.relative_to(folder).as_posix(): text for p, text in read_captions(folder, pictures).items()}


def test_a_text_beside_each_picture(folder: Path) -> None:
    (folder / "a.txt").write_text("a duck\n  on a table \n", encoding="utf-8")
    (folder / "deep" / "c.txt").write_bytes("\ufeffеще утка\r\n".encode())
    (folder / "b.txt").write_text(" \n")
    (folder / "notes.txt").write_text("remember the milk")
    assert captions(folder) == {"a.jpg": "a duck on a table", "b.png": "", "deep/c.jpg": "еще утка"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_an_imagefolder(folder: Path, kind: str) -> None:
    rows = [{"file_name": "a.jpg", "text": 'a "duck", alone', "id": 3}, {"file_name": "deep/c.jpg", "text": "鸭子"}]
    if kind == "jsonl":
        text = "\n\n".join(map(json.dumps, rows))
    else:
        text = 'file_name,text\na.jpg,"a ""duck"", alone"\ndeep/c.jpg,鸭子\n'
    (folder / f"metadata.{kind}").write_text(text, encoding="utf-8")
    assert captions(folder) == {"a.jpg": 'a "duck", alone', "deep/c.jpg": "鸭子"}


def test_what_is_nearer_to_the_picture_wins(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": n, "text": "far"}) + "\n" for n in ("a.jpg", "b.png", "deep/c.jpg"))
    )
    (folder / "deep" / "metadata.jsonl").write_text(json.dumps({"file_name": "c.jpg", "text": "near"}))
    (folder / "a.txt").write_text("beside")
    assert captions(folder) == {"a.jpg": "beside", "b.png": "far", "deep/c.jpg": "near"}


def test_everything_that_is_wrong_is_told_at_once(folder: Path) -> None:
    (folder / "a.txt").write_bytes("Ente für Käthe".encode("latin-1"))
    (folder / "b.txt").write_bytes(b"a\0duck")
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.jpg", "text": "x"}\n{"file_name": "a.jpg"}\n')
    (folder / "metadata.csv").write_text("name,caption\na.jpg,duck\n")
    (folder / "deep" / "metadata.jsonl").write_text("[1]")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    with (folder / "metadata.jsonl").open("a") as table:
        table.write('{"file_name": "notes.pdf", "text": "x"}\n')
    with pytest.raises(UserError) as caught:
        captions(folder)
    told = caught.value.problems
    for said in (
        "a.txt can't be read as UTF-8",
        "b.png holds a NUL",
        "gone.jpg does not exist",
        "notes.pdf is not among the pictures that are read",
        "metadata.jsonl: {'file_name': 'a.jpg'} names no",
        "metadata.csv: {'name': 'a.jpg'",
        "deep/metadata.jsonl can't be read: line 1 is not a JSON object",
    ):
        assert sum(said in line for line in told) == 1, (said, told)
    assert len(told) == 7


# Templates


@given(parts, words.filter(bool))
def test_the_caption_stands_where_the_template_says(around: list[str], caption: str) -> None:
    template = f" {FILEWORDS} ".join(around)
    filled = fill(template, caption)
    if len(around) == 1:
        assert filled == template
    else:
        assert filled == " ".join(f" {caption} ".join(around).split())
        assert filled.count(caption) >= len(around) - 1


@given(parts)
def test_without_words_nothing_is_left_of_the_place(around: list[str]) -> None:
    template = f", {FILEWORDS}, ".join(around)
    filled = fill(template, "")
    if len(around) > 1:
        assert FILEWORDS not in filled
        assert filled == ", ".join(filled.split(", "))
        assert not filled.startswith((",", " "))
        assert not filled.endswith((",", " "))
        assert ", ," not in filled


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red-toy_on a table (2).jpg", "red toy on a table"),
        ("IMG_2041.HEIC", ""),
        ("PXL_20240501_101112345.MP.jpg", "MP"),
        ("00.jpg", ""),
        ("zwx.duck+outdoors.png", "zwx duck outdoors"),
        ("утка на столе 3.webp", "утка на столе"),
        ("黄色鸭子_01.jpg", "黄色鸭子"),
        ("गुड़िया.jpg", "गुड़िया"),
        ("\udcffduck.jpg", "duck"),
    ],
)
def test_the_words_of_a_name(name: str, expected: str) -> None:
    assert words_of(Path(name)) == expected


# dataset_info.json


def test_prompts_beside_the_pictures(tmp_path: Path) -> None:
    assert read_dataset_info(tmp_path) == read_dataset_info(tmp_path / "missing") == {}
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps({"instance_prompt": r"photo\ of zwx  toy", "class_prompt": None, "version": 2}))
    assert read_dataset_info(tmp_path) == {"instance_prompt": "photo of zwx toy"}
    for broken, said in (
        ("{", "can't be read as JSON"),
        ("[]", "not an object"),
        ('{"class_prompt": 3}', "not an object"),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=said):
            read_dataset_info(tmp_path)


def test_they_serve_where_the_hyperparameters_name_none() -> None:
    asked: list[str] = []

    def beside(directory: str) -> dict[str, str]:
        asked.append(directory)
        return {"instance_prompt": "photo of zwx toy", "class_prompt": "photo of a toy"}

    h = Hyperparameters.parse({"instance_data_dir": '"/data/duck"', "class_prompt": "a duck"}, dataset_info=beside)
    assert asked == ["/data/duck"]
    assert (h.instance_prompt, h.class_prompt, h.prior_preservation) == ("photo of zwx toy", "a duck", True)
    with pytest.raises(UserError, match="instance_prompt is missing"):
        Hyperparameters.parse({"instance_prompt": "None"}, dataset_info=lambda directory: {})
    assert Hyperparameters.parse({"instance_prompt": ""}, dataset_info=beside).instance_prompt == "photo of zwx toy"
