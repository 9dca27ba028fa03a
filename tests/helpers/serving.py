"""A server in this process, on a port of its own, and requests to it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn

from dreambooth_sm.serving.app import Service
from tests.helpers.patience import PATIENCE

if TYPE_CHECKING:
    from dreambooth_sm.serving.engine import Engine


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Asks a server.

    Attributes:
        port: of the loopback interface.
    """

    port: int

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body or None, named)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()

    def draw(self, values: Any, **headers: str) -> Answer:
        """Sends JSON to ``/invocations``."""
        headers = {"Content_Type": "application/json", **headers}
        return self.send("POST", "/invocations", json.dumps(values).encode(), **headers)


@contextmanager
def served(engine: Engine | None) -> Iterator[tuple[Client, Service]]:
    """A server that draws with an engine; None: whose model is not read yet."""
    service = Service()
    service.engine = engine
    config = uvicorn.Config(service.app(), host="127.0.0.1", port=0, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Client(server.servers[0].sockets[0].getsockname()[1]), service
    finally:
        server.should_exit = True
        thread.join()
