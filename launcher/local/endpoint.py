"""An endpoint on this machine: the image's server as a process, and a client of it."""

from __future__ import annotations

import atexit
import base64
import http.client
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreambooth_sm.errors import EXIT_BAD_INPUT, UserError
from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.storage import download_directory
from launcher.local.environment import inherited, own_settings
from launcher.local.program import ENTRYPOINT

if TYPE_CHECKING:
    from PIL.Image import Image

_NEEDED = ("starlette", "torch", "uvicorn")
# As long as SageMaker lets an invocation take, and a process end.
_PATIENCE, _GRACE = 60, 30
_LINES = 40


class EndpointFailed(Exception):  # noqa: N818 - what it means is said best like this
    """An endpoint ended, or could not draw."""


class Endpoint:
    """A server on this machine that draws with a trained model. It ends with :meth:`delete`, with the context that it
    is used as, and with this process.

    Args:
        model: a directory that a job's output lies in, or an ``s3://`` prefix, which is downloaded first.
        settings: variables of the server's environment.
        log: gets each line of its log.

    Attributes:
        port: of the loopback interface.

    Raises:
        UserError: where the model can't be read, or what serves it is not installed.
        EndpointFailed: with the end of the log, where the server ended for another reason.
    """

    def __init__(self, model: str, settings: Mapping[str, str], log: Callable[[str], None]) -> None:
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise UserError(f"an endpoint on this machine needs {', '.join(missing)}: pip install -e '.[train,serve]'")
        self._tree = Path(tempfile.mkdtemp(prefix="dreambooth-sm-endpoint-"))
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._log, self._ready = log, threading.Event()
        self.port = 0
        try:
            _mount(model, self._tree / "model")
            self._process = self._start(settings)
        except BaseException:
            shutil.rmtree(self._tree, ignore_errors=True)
            raise
        atexit.register(self.delete)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait()
        if self._process.poll() is not None or not self.port:
            self._raise_end()

    def _start(self, settings: Mapping[str, str]) -> subprocess.Popen[str]:
        own = {"SAGEMAKER_BASE_DIR": str(self._tree), "SAGEMAKER_BIND_TO_PORT": "0", "SERVE_HOST": "127.0.0.1"}
        return subprocess.Popen(
            [sys.executable, "-u", str(ENTRYPOINT), "serve"],
            env={**inherited(), **own_settings(), **own, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip("\n"))
            self._log(self._lines[-1])
            if found := re.fullmatch(r"listening: port=(\d+)\n", line):
                self.port = int(found[1])
            if line.startswith("ready: "):
                self._ready.set()
        self._process.wait()
        self._ready.set()

    def _raise_end(self) -> None:
        code = self._process.wait()
        self._reader.join()
        errors = [line.removeprefix("error: ") for line in self._lines if line.startswith("error: ")]
        lines = list(self._lines)
        self.delete()
        if code == EXIT_BAD_INPUT and errors:
            raise UserError(errors)
        raise EndpointFailed("\n".join([f"the server ended with exit code {code}", *lines]))

    def draw(self, prompt: str | None = None, **options: Any) -> list[Image]:
        """Draws pictures.

        Args:
            options: fields of the request, such as ``number``, ``steps``, ``seed``, ``subject``, ``adapters``.

        Returns:
            the pictures, in the order of the answer.

        Raises:
            UserError: with everything that is wrong with the request.
            EndpointFailed: where the server could not draw.
        """
        from PIL import Image

        answer = self.invoke({"prompt": prompt, **options})
        return [Image.open(io.BytesIO(base64.b64decode(each["picture"]))) for each in answer["pictures"]]

    def invoke(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request as it is, and returns the answer; raises what :meth:`draw` raises."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        try:
            body = json.dumps(request).encode()
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
        except (OSError, http.client.HTTPException) as error:
            raise EndpointFailed(f"the server does not answer ({error})") from error
        finally:
            connection.close()
        if answer.status == http.client.OK:
            return dict(content)
        if answer.status < http.client.INTERNAL_SERVER_ERROR:
            raise UserError(content["errors"])
        raise EndpointFailed("\n".join(content["errors"]))

    def delete(self) -> None:
        """Ends the server, once what it was asked for is drawn."""
        atexit.unregister(self.delete)
        self._process.terminate()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._tree, ignore_errors=True)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.delete()


def _mount(model: str, target: Path) -> None:
    """Puts a model where SageMaker mounts one."""
    if model.startswith("s3://"):
        download_directory(S3Uri.parse(model), target)
        return
    path = Path(model.removeprefix("file://")).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"{model} is not a directory; name what a job left, or an s3:// prefix")
    target.symlink_to(path)
