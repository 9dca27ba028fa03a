"""The tag of each build of the training image, and which code a build is of.

A tag is ``VERSION-gREVISION-CODE.BUILD``, such as ``0.1.0-g4b204ea1c2d3-1f2e3d4c5b6a.9a8b7c6d``. The revision is git's,
for people. CODE is a digest of ``dreambooth_sm/``, which the launcher has as well, however it was installed: by it the
launcher finds its image. BUILD is a digest of all else that makes an image: Dockerfile, locked packages, arguments.

build_and_push.sh runs this file by itself, with the Python 3.7 or newer that is there: it imports nothing of ours.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What the image is made of beside dreambooth_sm/, and names that are left out everywhere, as .dockerignore says.
REST = (
    ".dockerignore",
    "Dockerfile",
    "LICENSE",
    "container",
    "requirements/image.txt",
    "requirements/bitsandbytes.txt",
    "requirements/xformers.txt",
    "requirements/mlflow.txt",
    "requirements/wandb.txt",
)
LEFT_OUT = frozenset({"__pycache__", ".ipynb_checkpoints", ".DS_Store", "flow_base"})
_CODE_DIGITS, _BUILD_DIGITS = 12, 8


@lru_cache(maxsize=1)  # with parentheses: older Pythons build as well
def code_digest(package: Path = ROOT / "dreambooth_sm") -> str:
    """Digest of the names and contents of the package's files: the same in a checkout, a wheel and the image."""
    return _digest(_files(package, package.parent))[:_CODE_DIGITS]


def build_digest(arguments: Sequence[str] = (), root: Path = ROOT) -> str:
    """Digest of what makes an image beside the package.

    Args:
        arguments: of the build, as NAME=VALUE, in their order: the last of a name counts. Proxies make no difference.
        root: of a checkout.
    """
    values = [each.encode() for each in arguments if not each.partition("=")[0].lower().endswith("_proxy")]
    parts = (part for name in REST for part in _files(root / name, root))
    return _digest([*parts, *values])[:_BUILD_DIGITS]


def image_tag(version: str, revision: str, code: str, build: str) -> str:
    """The tag of a build.

    Args:
        version: of the project.
        revision: git's, if it is known.
        code, build: the digests.

    Examples:
        >>> image_tag("0.1.0", "4b204ea1c2d3", "1f2e3d4c5b6a", "9a8b7c6d")
        '0.1.0-g4b204ea1c2d3-1f2e3d4c5b6a.9a8b7c6d'
        >>> image_tag("0.1.0", "", "1f2e3d4c5b6a", "9a8b7c6d")
        '0.1.0-1f2e3d4c5b6a.9a8b7c6d'
    """
    return "-".join([version, *([f"g{revision}"] if revision else []), f"{code}.{build}"])


def is_of_code(tag: str, code: str) -> bool:
    """Whether a tag is that of a build of this code.

    Examples:
        >>> is_of_code("0.1.0-g4b204ea1c2d3-1f2e3d4c5b6a.9a8b7c6d", "1f2e3d4c5b6a")
        True
        >>> is_of_code("latest", "1f2e3d4c5b6a")
        False
    """
    return re.fullmatch(rf".+-{code}\.[0-9a-f]{{{_BUILD_DIGITS}}}", tag) is not None


def _files(path: Path, root: Path) -> Iterator[bytes]:
    """Names below ``root`` and contents of a file, or of all files of a directory, in the order of their names."""
    found = path.rglob("*") if path.is_dir() else [path]
    named = {os.fsencode(each.relative_to(root).as_posix()): each for each in found if each.is_file()}
    for name, file in sorted(named.items()):
        if not LEFT_OUT.intersection(file.relative_to(root).parts):
            yield name
            yield file.read_bytes()


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


if __name__ == "__main__":
    print(image_tag(sys.argv[1], sys.argv[2], code_digest(), build_digest(sys.argv[3:])))
