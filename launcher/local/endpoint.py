"""An endpoint on this machine: the image's server as a process, and a client of it."""

from __future__ import annotations

import atexit
import http.client
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from dreambooth_sm.errors import UserError
from dreambooth_sm.s3_uri import S3Uri
from dreambooth_sm.storage import download_directory
from launcher.endpoints.endpoint import Endpoint, EndpointFailed
from launcher.endpoints.models import Served, served_of
from launcher.local.environment import own_settings
from launcher.local.server_process import ServerProcess

_NEEDED = ("starlette", "torch", "uvicorn")
# As long as SageMaker lets an invocation take.
_PATIENCE = 60


class LocalEndpoint(Endpoint):
    """A server on this machine that draws with a trained model. It ends with :meth:`delete`, with the context that it
    is used as, and with this process.

    Args:
        served: directories of this machine, or ``s3://`` prefixes; the model's is downloaded first.
        settings: of the server, without ``SERVE_`` and in small letters.
        log: gets each line of its log.

    Attributes:
        port: of the loopback interface.

    Raises:
        UserError: where the model can't be read, or what serves it is not installed.
        EndpointFailed: with the end of the log, where the server ended for another reason.
    """

    def __init__(self, served: Served, settings: Mapping[str, object], log: Callable[[str], None]) -> None:
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise UserError(f"an endpoint on this machine needs {', '.join(missing)}: pip install -e '.[train,serve]'")
        self.name = "local"
        self._served, self._settings, self._log = served, dict(settings), log
        self._server, self._tree = self._start()
        atexit.register(self.delete)

    @property
    def port(self) -> int:
        return self._server.port

    def _start(self) -> tuple[ServerProcess, Path]:
        """A server that can draw, and the directory that it reads."""
        tree = Path(tempfile.mkdtemp(prefix="dreambooth-sm-endpoint-"))
        server: ServerProcess | None = None
        try:
            _mount(self._served.model, tree / "model")
            chosen = {"base_model": self._served.base_model, "adapters": self._served.adapters, **self._settings}
            variables = {f"SERVE_{name.upper()}": str(value) for name, value in chosen.items() if value is not None}
            server = ServerProcess(tree, {**own_settings(), **variables}, self._log)
            server.wait()
        except BaseException as error:
            if server:
                server.end()
            shutil.rmtree(tree, ignore_errors=True)
            if isinstance(error, UserError) and self._served.model is not None:  # by the name that the caller knows
                mounted = str(tree / "model")
                raise UserError(each.replace(mounted, self._served.model) for each in error.problems) from None
            raise
        return server, tree

    def invoke(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._answer(request, "application/json") as answer:
            return dict(json.loads(answer.read()))

    def invoke_lines(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with self._answer(request, "application/jsonlines") as answer:
            for line in answer:
                yield json.loads(line)

    @contextmanager
    def _answer(self, request: Mapping[str, Any], accept: str) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request that can be drawn."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        try:
            headers = {"Content-Type": "application/json", "Accept": accept}
            connection.request("POST", "/invocations", json.dumps(request).encode(), headers)
            answer = connection.getresponse()
            if answer.status == http.client.OK:
                yield answer
                return
            problems = json.loads(answer.read())["errors"]
        except (OSError, http.client.HTTPException) as error:
            raise EndpointFailed(f"the server does not answer ({error})") from error
        finally:
            connection.close()
        if answer.status < http.client.INTERNAL_SERVER_ERROR:
            raise UserError(problems)
        raise EndpointFailed("\n".join(problems))

    def wait(self) -> Self:
        self._server.wait()
        return self

    def update(self, model: Any = None, **changes: Any) -> Self:
        before = self._served, self._settings
        places = {name: changes.pop(name) for name in ("base_model", "adapters") if name in changes}
        self._served = served_of(model, **places) if model is not None else self._served.changed(**places)
        self._settings = {**self._settings, **changes}
        try:
            server, tree = self._start()
        except BaseException:
            self._served, self._settings = before
            raise
        self._end()
        self._server, self._tree = server, tree
        return self

    def delete(self) -> None:
        """Ends the server, once what it was asked for is drawn."""
        atexit.unregister(self.delete)
        self._end()

    def _end(self) -> None:
        self._server.end()
        shutil.rmtree(self._tree, ignore_errors=True)


def _mount(model: str | None, target: Path) -> None:
    """Puts a model where SageMaker mounts one."""
    if model is None:
        target.mkdir()
        return
    if model.startswith("s3://"):
        download_directory(S3Uri.parse(model), target)
        return
    path = Path(model.removeprefix("file://")).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"{model} is not a directory; name what a job left, or an s3:// prefix")
    target.symlink_to(path)
