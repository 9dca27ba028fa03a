"""Which part of the project may import which."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a job or a launcher runs; and what stays in the repository: no image and no wheel has it.
PRODUCTION = ("dreambooth_sm", "launcher", "container")
REPOSITORY = {"tests", "toybox", "benchmarks"}


def imported(path: Path) -> Iterator[str]:
    """The first name of every absolute import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", PRODUCTION)
def test_production_needs_nothing_that_stays_in_the_repository(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(path.relative_to(ROOT)): names for path in files if (names := REPOSITORY & set(imported(path)))}
    assert not wrong


def test_what_makes_the_base_model_needs_no_test_and_no_benchmark() -> None:
    for path in sorted((ROOT / "toybox").rglob("*.py")):
        assert not {"tests", "benchmarks", "launcher", "container"} & set(imported(path)), path


def test_the_image_holds_production_alone() -> None:
    taken = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert not REPOSITORY & {path.partition("/")[0] for path in taken}
    copied = [line.split() for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    assert not REPOSITORY & {word.strip("/") for words in copied for word in words}


def test_the_wheel_has_every_package_of_production() -> None:
    """Of what is installed; ``container`` goes into the image alone."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("dreambooth_sm", "launcher")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == there
