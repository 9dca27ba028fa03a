"""The model card and the page, whatever names and prompts hold."""

from __future__ import annotations

import ast
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from dreambooth_sm.data.concepts import Subject
from dreambooth_sm.families import DEFAULT, FAMILIES
from dreambooth_sm.gallery import SUBJECT_FILE, write_subjects
from dreambooth_sm.hyperparameters import Hyperparameters
from dreambooth_sm.methods import METHODS
from dreambooth_sm.results import model_card, page
from tests.helpers.marks import slow_except

WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
MARKED = st.text(st.sampled_from("#-+=*_`~|<>&;[]()!\\.1$:'\"{} \nab🦆"), min_size=1).filter(str.strip)


def facts(text: str, method: str = "full", export: str = "diffusers") -> dict[str, Any]:
    attempt = {"started": "2026-11-28T10:00:00", "first_step": 1, "last_step": 2, "seconds": {}}
    return {
        "model_name": text,
        "finished": "2026-11-28T10:00:00",
        "base_model": text,
        "base_architecture": "sd",
        "base_model_licence": None,
        "subjects": [{"instance_prompt": text, "class_prompt": text, "pictures": 2, "class_pictures": 2}],
        "hyperparameters": {
            **{name: field.default for name, field in Hyperparameters.model_fields.items()},
            **{"export": export, "placeholder_token": "zwx"},
            **FAMILIES[DEFAULT].facts.methods[method],
            **{"instance_prompt": text, "model_name": text, "method": method},
        },
        "plan": {},
        "plan_notes": [],
        "attempts": [{**attempt, "peak_host_memory_gb": 1.0}],
        "phases_seconds": {"train": 1.0},
        "peak_vram_gb": 0.0,
        "peak_host_memory_gb": 1.0,
        "steps": [{"step": 1, "loss": 0.5, "lr": 1e-4}, {"step": 2, "loss": 0.25, "lr": 1e-4}],
        "candidates": [],
        "verdicts": [text],
        "class_files": [],
        "samples": [{"step": step, "prompt": text, "seed": 1, "file": f"samples/{step}.png"} for step in (0, 2)],
        "versions": {},
    }


class Reader(HTMLParser):
    """What a page shows, by the element that it is in."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self._open = [""]
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("img", "meta", "link"):
            self._open.append(tag)
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        if self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self.texts and self.texts[-1][0] == self._open[-1]:
            self.texts[-1] = (self._open[-1], self.texts[-1][1] + data)

    def of(self, tag: str) -> list[str]:
        return [" ".join(text.split()) for name, text in self.texts if name == tag]


def rendered(text: str, method: str, export: str = "diffusers") -> Reader:
    """The model card of a job with this name, prompts and verdict, without its front matter."""
    _, _, markdown = model_card(facts(text, method, export)).split("---\n", 2)
    return Reader(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


PLAIN = {method: rendered("toy", method).tags for method in METHODS}


@pytest.mark.parametrize("method", slow_except(["full"], METHODS))
@given(WORDS | MARKED)
@example("photo of 🦆 toy: #1")
@example("---\nlicense: mit")
@example("- 1. # &lt;b&gt; | <script> ![x](y) **a** ~~b~~ \\|")
@example("\x85\u2028\ufeff\x7f\t")
def test_a_model_card_says_any_text_as_it_is(method: str, text: str) -> None:
    _, front, _ = model_card(facts(text)).split("---\n", 2)
    assert yaml.safe_load(front)["instance_prompt"] == text
    if text.isprintable():
        assert text.replace("\\", "\\\\").replace('"', '\\"') in front
    shown = rendered(text, method)
    wanted = " ".join(text.split())
    assert shown.of("h1") == [wanted]
    assert shown.of("li") == [wanted]
    assert wanted in shown.of("td")
    assert shown.tags == PLAIN[method]
    assert text in code(shown)


def code(card: Reader) -> set[object]:
    """Constants of the Python code that a card shows."""
    (block,) = (text for name, text in card.texts if name == "code" and "import" in text)
    return {node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)}


def test_a_model_card_reads_what_was_exported() -> None:
    assert code(rendered("zwx", "full")) == {".", "zwx", 0}
    assert code(rendered("zwx", "full", "both")) == {".", "zwx", 0}
    assert code(rendered("zwx", "full", "single_file")) == {"zwx.safetensors", "zwx", 0}
    assert code(rendered("zwx", "hypernetwork")) == {"the-base-model", "zwx.safetensors", "zwx", 0}


def test_the_base_model_is_named_to_the_hub_where_it_is_on_the_hub() -> None:
    for name, said in (("a/b-v1.5", "a/b-v1.5"), ("/opt/ml/input/data/model", None), ("toybox", None)):
        front = yaml.safe_load(model_card(facts(name)).split("---\n")[1])
        assert front.get("base_model") == said
        assert ("the-base-model" in code(rendered(name, "hypernetwork"))) == (said is None)


@given(WORDS | MARKED)
@example("<script>alert(1)</script>")
def test_a_page_says_any_text_as_it_is(text: str) -> None:
    values = facts(text) | {"samples": []}
    shown = Reader(page(values, Path("/nowhere")))
    assert shown.tags == Reader(page(facts("toy") | {"samples": []}, Path("/nowhere"))).tags
    assert shown.of("h1") == [" ".join(text.split())]


@pytest.mark.parametrize("missing", [False, True])
def test_the_subjects_are_shown_a_row_each(missing: bool, tmp_path: Path) -> None:
    paths = []
    for number, colour in enumerate(["red", "lime", "blue"]):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (80, 60), colour).save(paths[-1])
    subjects = [
        Subject(tuple(paths[:2]), "one", None, tmp_path, ()),
        Subject(tuple(paths[2:]), "two", None, tmp_path, ()),
    ]
    if missing:
        paths[1].unlink()
    write_subjects(subjects, tmp_path)
    with Image.open(tmp_path / SUBJECT_FILE) as sheet:
        assert sheet.size == (2 * 192 + 4, 2 * 192 + 4)
        colours = [sheet.getpixel(place) for place in ((96, 96), (292, 96), (96, 292), (292, 292))]
    for found, wanted in zip(
        colours, [(255, 0, 0), (255,) * 3 if missing else (0, 255, 0), (0, 0, 255), (255,) * 3], strict=True
    ):
        assert isinstance(found, tuple)
        assert all(abs(one - other) < 4 for one, other in zip(found, wanted, strict=True))
