"""The program of a job on this machine: the container's own program as a process, or an image with Docker."""

from __future__ import annotations

import os
from pathlib import Path

# InstanceType of a job that runs in a container; any other runs as a process.
CONTAINER = "local-container"
ENTRYPOINT = Path(__file__).parents[2] / "container" / "train.py"


def docker() -> str:
    """The Docker client."""
    return os.environ.get("DOCKER", "docker")
