"""Python blocks of the documents; ``python readme_blocks.py`` runs those of the README that need the SageMaker SDK 2.

They run as they stand, with the services that the environment leads to.
"""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def blocks(kind: str) -> list[str]:
    return [block for block in python_blocks(README) if ("launcher.estimator(" in block) == (kind == "estimator")]


if __name__ == "__main__":
    for block in blocks("estimator"):
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
