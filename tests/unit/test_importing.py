"""What is imported for a whole job, and its end."""

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


LEAVING = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from dreambooth_sm.importing import leave

atexit.register(print, "at the end")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
ThreadPoolExecutor().submit(print, "a pool")
print("a word", file=sys.stderr)
leave(3)
"""


def test_leaving_waits_for_threads_and_says_all() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (3, "a word\n")
    assert ended.stdout == "a pool\na thread\nat the end\n"


def test_leaving_does_not_mind_that_nobody_reads() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from dreambooth_sm.importing import leave\nimport sys\nsys.stdout.close()\nleave(0)"],
        check=False,
    )
    assert ended.returncode == 0
