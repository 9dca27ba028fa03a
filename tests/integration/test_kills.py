"""A handful of the kills of `benchmarks/kills.py`, which looks at S3 after each and at the weights in the end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.helpers.patience import PATIENCE


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark forks its jobs")
def test_killed_jobs_end_with_the_weights_of_an_undisturbed_one() -> None:
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "6", "--seed", "1", "--steps", "8"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])
    assert told["kills"] >= 6
    assert told["all_weights_equal"]
