"""Runs Python blocks of the README as they stand, one after the other in one interpreter.

``python readme_blocks.py launcher``: those of the launcher, inside local services; ``... estimator``: those that need
the SageMaker SDK 2, with the services that the environment leads to.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def blocks(kind: str) -> list[str]:
    return [block for block in python_blocks(README) if ("launcher.estimator(" in block) == (kind == "estimator")]


def run(kind: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(kind):
        exec(compile(block, "README.md", "exec"), namespace)


if __name__ == "__main__":
    if sys.argv[1] == "estimator":
        run("estimator")
    else:
        import launcher

        with launcher.local_services():
            run("launcher")
