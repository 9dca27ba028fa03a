"""What has to be set before libraries are loaded is set by whatever of ours is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "own", "seen"),
    [
        ("import launcher", {}, "2000"),
        ("from dreambooth_sm.sampling import draw", {}, "2000"),
        ("import container.train", {}, "2000"),
        ("import container.train", {"GOMP_SPINCOUNT": "77"}, "77"),
    ],
)
def test_waiting_threads_let_others_work(first: str, own: dict[str, str], seen: str) -> None:
    """As OpenMP itself has read it; the notebook imports the launcher first, a job its entrypoint."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", f"{first}\nimport torch; torch.ones(1)"]
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT), **own}
    said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this torch does not use GNU's OpenMP")
    assert f"GOMP_SPINCOUNT = '{seen}'" in said
