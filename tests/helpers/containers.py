"""The training image and jobs in it, on a Docker engine."""

from __future__ import annotations

import os
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from dreambooth_sm import __version__
from tests.helpers.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
DOCKER = os.environ.get("DOCKER", "docker")
BASE_IMAGE = os.environ.get("SUBSTITUTE_BASE_IMAGE", "")
# Checkouts that share an engine have an image each.
TAG = f"dreambooth-sm:test-{zlib.crc32(bytes(ROOT)):08x}"
STRICT = ["--read-only", "--user=1000:1000", "--cap-drop=ALL", "--network=none", "--memory=2g"]

needs_engine = pytest.mark.skipif(
    not (os.environ.get("DOCKER_HOST") and BASE_IMAGE),
    reason="needs a Docker engine: set DOCKER_HOST and SUBSTITUTE_BASE_IMAGE (an image with Python and torch)",
)


def docker(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"DOCKER_BUILDKIT": "1"}
    return subprocess.run([DOCKER, *command], env=env, capture_output=True, text=True, timeout=PATIENCE)


def build(
    *build_args: str, tag: str = TAG, options: Sequence[str] = (), context: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Builds the image; layers of an earlier build are used again."""
    settings = (f"BASE_IMAGE={BASE_IMAGE}", f"VERSION={__version__}", "WITH_BITSANDBYTES=0", *build_args)
    arguments = [f"--build-arg={setting}" for setting in settings]
    return docker("build", "--network=host", *arguments, *options, f"--tag={tag}", str(context))


def python_in(image: str, code: str) -> str:
    done = docker("run", "--rm", *STRICT, "--entrypoint", "python", image, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def mounts(tree: Path) -> list[str]:
    """Options that mount a tree as the platform does, each folder by itself; any user can use it."""
    folders = ("input", "model", "output", "checkpoints")
    for folder in folders:
        (tree / folder).mkdir(parents=True, exist_ok=True)
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    return [f"--volume={tree / folder}:/opt/ml/{folder}" for folder in folders]


@dataclass(frozen=True)
class Container:
    """A container, and the ``docker run`` that it is attached to, with its log as standard output."""

    name: str
    process: subprocess.Popen[str]


@contextmanager
def running(*options: str) -> Iterator[Container]:
    """``docker run`` with these options; the container is gone when the context ends."""
    name = f"dreambooth-sm-{os.urandom(4).hex()}"
    command = [DOCKER, "run", f"--name={name}", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield Container(name, process)
    finally:
        docker("rm", "--force", name)
        process.wait()
