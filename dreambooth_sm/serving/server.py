"""The server's process: it listens at once, reads the model, and ends when it is asked to."""

from __future__ import annotations

import asyncio
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from dreambooth_sm.errors import EXIT_FAILURE, EXIT_OK, UserError
from dreambooth_sm.importing import importing
from dreambooth_sm.printing import safe
from dreambooth_sm.serving.app import Service
from dreambooth_sm.serving.broken import show
from dreambooth_sm.serving.settings import ServingSettings

if TYPE_CHECKING:
    from dreambooth_sm.serving.engine import Engine

# SageMaker kills 30 s after it has asked.
_GRACE = 25


class _Server(uvicorn.Server):
    """Ends with an error where the model can't be read."""

    def __init__(self, config: uvicorn.Config, service: Service, settings: ServingSettings, model: Path) -> None:
        super().__init__(config)
        self._service, self._settings, self._model = service, settings, model
        self.error: Exception | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        for server in self.servers if self.started else ():
            print(f"listening: port={server.sockets[0].getsockname()[1]}", flush=True)
        loop = asyncio.get_running_loop()
        # Not one of the loop's own threads, which the process would wait for at its end.
        threading.Thread(target=self._read, args=(loop,), name="read", daemon=True).start()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._service.engine = open_engine(self._model, self._settings)
            print("ready: pictures can be drawn", flush=True)
        except Exception as error:
            self.error = error
            loop.call_soon_threadsafe(setattr, self, "should_exit", True)


def open_engine(model: Path, settings: ServingSettings) -> Engine:
    """Reads the model that lies in a directory, ready to draw.

    Raises:
        UserError: where there is none.
    """
    with importing():
        import torch

        from dreambooth_sm.serving.engine import Engine
        from dreambooth_sm.serving.served_model import ADDITIONAL, holds_model, open_served

    base = settings.base_model or _additional(ADDITIONAL / "base")
    adapters = settings.adapters or _additional(ADDITIONAL / "adapters")
    if adapters is None and base and model.is_dir() and not holds_model(model):
        adapters = str(model)
    settings = replace(settings, adapters=adapters)
    served = open_served(model, base)
    for remark in served.model.remarks:
        print(f"warning: {safe(remark)}", flush=True)
    with torch.no_grad():
        return Engine(served, settings)


def _additional(channel: Path) -> str | None:
    return str(channel) if channel.is_dir() else None


def serve(model: Path, settings: ServingSettings, *, port: int) -> int:
    """Serves until SIGTERM or SIGINT; then what is asked for already is drawn, for as long as SageMaker waits.

    Args:
        model: directory that a job's output lies in.
        port: 0 takes a free one, and says which.

    Returns:
        the exit code.

    Raises:
        UserError: where the model can't be read.
    """
    service = Service()
    config = uvicorn.Config(
        service.app(),
        host=settings.host,
        port=port,
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    server = _Server(config, service, settings, model)
    # uvicorn raises the signal again at its end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run()
    if service.engine:
        service.engine.close()
    if isinstance(server.error, UserError):
        raise server.error
    if server.error:
        show(server.error)
        return EXIT_FAILURE
    return EXIT_OK
