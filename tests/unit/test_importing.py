"""What is imported for a whole job."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

SCRIPT = """
import gc
from dreambooth_sm.importing import importing

with importing():
    import triton
assert gc.isenabled() and gc.get_freeze_count() > 10_000
"""


def test_is_never_garbage_and_leaves_without_a_word() -> None:
    """Libraries complain at the end of a process where what they made was not found again."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
