"""Python blocks of the documents; ``python readme_blocks.py`` runs those of the README that need the SageMaker SDK 2.

They run as they stand, but for how much is trained and drawn, with the services that the environment leads to.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def blocks(kind: str) -> list[str]:
    return [block for block in python_blocks(README) if ("launcher.estimator(" in block) == (kind == "estimator")]


def run(sources: list[str], page: str) -> None:
    """Runs blocks one after the other, with one namespace, and jobs of four steps with as many class images."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in sources:
        quick = re.sub(r"""\b(max_train_steps|num_class_images)("?[:=] ?)\d+""", r"\1\g<2>4", block)
        exec(compile(quick, page, "exec"), namespace)


if __name__ == "__main__":
    # Beside this file: among what the SDK needs is another package of the name `tests`.
    from fast_clock import let_time_fly  # type: ignore[import-not-found]

    import_module("sagemaker.session")
    let_time_fly()
    run(blocks("estimator"), "README.md")
