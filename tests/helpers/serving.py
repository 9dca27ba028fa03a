"""Engines and servers in this process, and requests to them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from diffusers import DiffusionPipeline
from PIL.Image import Image

from dreambooth_sm.serving.app import Service
from dreambooth_sm.serving.engine import Engine
from dreambooth_sm.serving.orders import Order
from dreambooth_sm.serving.requests import PictureRequest, read_request
from dreambooth_sm.serving.served_model import open_served
from dreambooth_sm.serving.settings import ServingSettings
from tests.helpers.patience import PATIENCE


@contextmanager
def engine_of(directory: Path, base: str | None = None, **settings: Any) -> Iterator[Engine]:
    engine = Engine(open_served(directory, base), ServingSettings(**settings))
    try:
        yield engine
    finally:
        engine.close()


def request(engine: Engine, **values: Any) -> PictureRequest:
    values = {"prompt": "photo of a toy", "width": 32, "height": 32, "steps": 3, "seed": 5, **values}
    return read_request(json.dumps(values).encode(), engine.offer)


def pictures(order: Order) -> list[Image]:
    return order.pictures.result(PATIENCE)


def draw(engine: Engine, **values: Any) -> Image:
    return pictures(engine.submit(request(engine, **values)))[0]


def difference(one: Image, other: Image) -> int:
    """The largest of any pixel, of 255."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.002)


@cache
def opened(directory: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
