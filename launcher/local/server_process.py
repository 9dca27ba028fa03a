"""The image's server as a process of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from dreambooth_sm.errors import EXIT_BAD_INPUT, UserError
from launcher.endpoints.endpoint import EndpointFailed
from launcher.local.environment import inherited
from launcher.local.program import ENTRYPOINT

# Seconds from SIGTERM to SIGKILL, as SageMaker has it.
_GRACE = 30
_LINES = 40


class ServerProcess:
    """A server on a free port of the loopback interface.

    Args:
        tree: holds ``model``, as SageMaker's ``/opt/ml`` does.
        environment: of the server, besides what programs of this machine need.
        log: gets each line of its log.

    Attributes:
        port: that it listens at, once it does.
    """

    def __init__(
        self, tree: Path, environment: Mapping[str, str], log: Callable[[str], None] = lambda line: None
    ) -> None:
        self.port = 0
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._log, self._ready = log, threading.Event()
        own = {"SAGEMAKER_BASE_DIR": str(tree), "SAGEMAKER_BIND_TO_PORT": "0", "SERVE_HOST": "127.0.0.1"}
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(ENTRYPOINT), "serve"],
            env={**inherited(), **environment, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process, as the system knows it."""
        return self._process.pid

    def kill(self) -> None:
        """Ends it at once, whatever it does."""
        self._process.kill()

    def wait(self) -> None:
        """Waits until it can draw.

        Raises:
            UserError: where the model can't be read, or a setting is not one.
            EndpointFailed: with the end of the log, where it ended for another reason.
        """
        self._ready.wait()
        if (code := self._process.poll()) is None:
            return
        self._reader.join()
        errors = [line.removeprefix("error: ") for line in self._lines if line.startswith("error: ")]
        if code == EXIT_BAD_INPUT and errors:
            raise UserError(errors)
        raise EndpointFailed("\n".join([f"the server ended with exit code {code}", *self._lines]))

    def end(self) -> None:
        """Ends it, once what it was asked for is drawn."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()

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
