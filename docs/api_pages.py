"""mkdocs' hooks: the API's pages, one for every public module, and docstrings' roles as plain code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("launcher", "dreambooth_sm")
# ``:func:`draw```, as Sphinx has it, in Markdown and in HTML: what is left is the name, as code.
_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|exc):(?=`|<code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    index = "# API\n\nAll modules, from their docstrings. `launcher` is what most programs need.\n"
    for package in PACKAGES:
        index += f"\n## {package}\n\n| module | |\n|---|---|\n"
        for name, summary in _modules(package):
            index += f"| [{name}]({name}.md) | {summary} |\n"
            files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n\n::: {name}\n"))
    files.append(File.generated(config, "api/index.md", content=index))
    return files


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub("", html)


def _modules(package: str) -> Iterator[tuple[str, str]]:
    """Dotted names, each with the first sentence of its docstring."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        sentence = re.split(r"(?<=[.:])\s", " ".join(text.split()), maxsplit=1)[0]
        yield name, _ROLE.sub("", sentence).replace("|", "\\|")
