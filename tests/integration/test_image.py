"""The Docker image: built on a CPU base and run as strictly as a container can be run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreambooth_sm import __version__
from dreambooth_sm.errors import EXIT_BAD_INPUT
from tests.helpers.containers import BASE_IMAGE, STRICT, build, docker, mounts, needs_engine, python_in

pytestmark = needs_engine


@pytest.mark.parametrize("argument", [["train"], []], ids=["train", "no argument"])
def test_bad_input_ends_the_job_with_a_reason(image: str, tmp_path: Path, argument: list[str]) -> None:
    done = docker("run", "--rm", *STRICT, *mounts(tmp_path), image, *argument)
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    reason = (tmp_path / "output" / "failure").read_text()
    assert "hyperparameters.json" in reason
    assert len(reason.strip().splitlines()) == 1
    assert len(reason) <= 1024
    assert "Traceback" not in done.stderr


def test_torch_is_the_bases(image: str) -> None:
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    assert python_in(image, code) == python_in(BASE_IMAGE, code)


def test_the_job_can_write_to_tmp_and_to_nothing_else(image: str) -> None:
    code = "import os; print(*(p for p in ('/', '/opt', '/opt/dreambooth-sm', '/tmp') if os.access(p, os.W_OK)))"
    assert python_in(image, code) == "/tmp"


def test_a_user_without_an_account_has_a_name_and_a_home(image: str) -> None:
    code = "import getpass, pathlib; print(getpass.getuser(), pathlib.Path.home())"
    assert python_in(image, code) == "dreambooth /tmp"


def test_nothing_is_baked_into_opt_ml_and_nothing_private_is_in_the_image(image: str) -> None:
    code = """
import pathlib
print(pathlib.Path("/opt/ml").exists(), *sorted(p.name for p in pathlib.Path("/opt/dreambooth-sm").iterdir()))
"""
    assert python_in(image, code) == "False LICENSE container dreambooth_sm"


def test_our_code_comes_with_its_bytecode(image: str) -> None:
    code = """
import importlib.util, pathlib
sources = pathlib.Path("/opt/dreambooth-sm").rglob("*.py")
print(*(s for s in sources if not pathlib.Path(importlib.util.cache_from_source(str(s))).exists()))
"""
    assert python_in(image, code) == ""


def test_the_labels_say_what_it_is(image: str) -> None:
    label = '{{index .Config.Labels "org.opencontainers.image.%s"}}'
    templates = "|".join(label % name for name in ("version", "revision", "licenses"))
    done = docker("image", "inspect", "--format", templates, image)
    assert done.stdout.strip() == f"{__version__}|unknown|Apache-2.0"


def test_an_xformers_that_does_not_load_breaks_the_build() -> None:
    done = build("WITH_XFORMERS=1")
    assert done.returncode != 0
    assert "xformers/_C.so" in done.stderr or "libcudart" in done.stderr
