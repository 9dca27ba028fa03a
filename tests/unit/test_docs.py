"""The documents: what they link to is there. ``make docs`` builds the site of docs/ and checks the same of the API."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def prose(page: Path) -> str:
    """Without what stands in blocks and spans of code."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors(page: Path) -> set[str]:
    """Of its headings, as both GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def test_every_page_is_in_the_site() -> None:
    """A page of its own in the menu, or a line of the decisions' index."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    decisions = (ROOT / "docs" / "decisions" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"[ :]{re.escape(page.name)}$", menu, re.MULTILINE), page.name
    for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        assert f"({page.name})" in decisions, page.name


@pytest.mark.parametrize("package", ["dreambooth_sm", "launcher", "toybox"])
def test_docstrings_have_headings_that_the_reference_knows(package: str) -> None:
    strange = re.compile(r"^ *(Example|Arg|Arguments|Params?|Parameters|Return|Raise|Yield|Notes?):$", re.MULTILINE)
    for path in (ROOT / package).rglob("*.py"):
        assert not strange.search(path.read_text(encoding="utf-8")), path
