"""The Docker image: built on a CPU base and run as strictly as a container can be run."""

from __future__ import annotations

import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pip._internal.models.index import PyPI

from dreambooth_sm import __version__
from dreambooth_sm.errors import EXIT_BAD_INPUT
from tests.helpers.containers import BASE_IMAGE, STRICT, TAG, build, docker, mounts, needs_engine, python_in

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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "/opt/ml/input/config/hyperparameters.json is missing"),
        (["train"], "mount it as SageMaker does, or pass --name value options"),
        (["train", "extra"], "'extra'"),
        (["serve"], "/opt/ml/model does not exist"),
        (["bash"], "docker run --entrypoint bash IMAGE"),
        (["/bin/sh", "-c", "echo"], "docker run --entrypoint /bin/sh IMAGE"),
        (["python", "-c", "print(1)"], "docker run --entrypoint python IMAGE"),
    ],
)
def test_without_opt_ml_and_with_other_commands_there_is_one_clear_line(
    image: str, command: list[str], words: str
) -> None:
    done = docker("run", "--rm", *STRICT, image, *command)
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    (line,) = done.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["-h"], ["help"]])
def test_help_says_how_the_image_is_run(image: str, command: list[str]) -> None:
    done = docker("run", "--rm", *STRICT, image, *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("docker run IMAGE [train]")


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


class Mirror:
    """Sends each request on to where packages really are, and remembers it.

    Attributes:
        url: its address.
        asked: paths that were asked for, and what each request was authorised with.
    """

    def __init__(self, upstream: str) -> None:
        self.asked: dict[str, str | None] = {}
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked[self.path] = self.headers["Authorization"]
                self.send_response(302)
                self.send_header("Location", upstream + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_packages_come_from_the_mirrors_that_are_named() -> None:
    # Host names of their own, which the build can't find unless it's told; pip takes no plain HTTP from them untold.
    debian, index = Mirror("http://deb.debian.org"), Mirror("http://127.0.0.1:9")
    done = build(
        f"APT_MIRROR=http://mirror.test:{debian.server.server_port}",
        f"PIP_INDEX_URL=http://mirror.test:{index.server.server_port}/simple",
        f"PIP_TRUSTED_HOST=mirror.test:{index.server.server_port}",
        options=["--add-host=mirror.test:127.0.0.1"],
    )
    assert done.returncode != 0, "the index has nothing"
    assert any(path.startswith("/debian/pool/main/g/gcc") for path in debian.asked), done.stderr[-4000:]
    assert [path for path in index.asked if path.startswith("/simple/")]


def test_the_password_of_an_index_is_used_and_left_nowhere(tmp_path: Path) -> None:
    index = Mirror(PyPI.url.rstrip("/"))
    tag = f"{TAG}-secret"
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = {index.url.replace('://', '://user:swordfish@')}/simple\n"
    )
    # A secret alone makes no layer again; the host, with its new port, does. The layers that lie on top of these are
    # made without the secret.
    host = f"PIP_TRUSTED_HOST=127.0.0.1:{index.server.server_port}"
    secret = f"--secret=id=pip.conf,src={tmp_path}/pip.conf"
    done = build(host, tag=tag, options=[secret, "--target=dependencies"])
    assert done.returncode == 0, done.stderr[-4000:]
    assert {*index.asked.values()} == {f"Basic {b64encode(b'user:swordfish').decode()}"}
    history = docker("history", "--no-trunc", tag).stdout + docker("image", "inspect", tag).stdout
    left = docker(
        "run", "--rm", "--entrypoint", "grep", tag, "-rl", "swordfish", "/etc", "/root", "/opt", "/run", "/tmp"
    )
    docker("rmi", tag)
    assert "swordfish" not in history
    assert left.stdout == ""


def test_an_xformers_that_does_not_load_breaks_the_build() -> None:
    done = build("WITH_XFORMERS=1")
    assert done.returncode != 0
    assert "xformers/_C.so" in done.stderr or "libcudart" in done.stderr
