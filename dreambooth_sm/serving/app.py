"""What an endpoint answers: ``GET /ping``, ``POST /invocations``, and SageMaker's protocol of adapters."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dreambooth_sm.errors import UserError
from dreambooth_sm.s3 import TransferError
from dreambooth_sm.serving.answers import answer, answer_line, line_of
from dreambooth_sm.serving.broken import show
from dreambooth_sm.serving.log import RequestLine
from dreambooth_sm.serving.output_places import OutputPlaces
from dreambooth_sm.serving.refusal import Refusal
from dreambooth_sm.serving.requests import LINES, read_addition, read_request
from dreambooth_sm.serving.settings import LARGEST_BODY

if TYPE_CHECKING:
    from dreambooth_sm.serving.engine import Engine
    from dreambooth_sm.serving.orders import Order, Shown

# SageMaker's name for the adapter of a request, and for a request.
_ADAPTER = "X-Amzn-SageMaker-Adapter-Identifier"
_IDS = ("X-Amzn-SageMaker-Inference-Id", "X-Request-Id")
_LONGEST_ID = 100
_GONE = 499
# Seconds that a body may take to come.
_PATIENCE = 30


class Service:
    """The server's part of an endpoint.

    Attributes:
        engine: draws; None: it can't draw yet.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._places = OutputPlaces()

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/ping", self._ping, methods=["GET"]),
                Route("/invocations", self._invocations, methods=["POST"]),
                Route("/adapters", self._adapters, methods=["GET", "POST"]),
                Route("/adapters/{name}", self._remove, methods=["DELETE"]),
            ],
            exception_handlers={404: _no_such_path, 405: _no_such_path},
        )

    async def _ping(self, request: Request) -> Response:
        can_draw = self.engine is not None and self.engine.is_alive
        return Response(status_code=200 if can_draw else 503)

    async def _invocations(self, request: Request) -> Response:
        line = RequestLine(_identity(request))
        shown: asyncio.Queue[Shown | None] = asyncio.Queue()
        headers = {"X-Request-Id": line.identity}
        try:
            order = await self._taken(request, line, shown)
            if order.request.manner == "lines":
                return StreamingResponse(_lines(order, shown, line, self._places), 200, headers, media_type=LINES)
            pictures = await _drawn(request, order)
            body, kind = await run_in_threadpool(answer, order.request, pictures, self._places)
            status = 200
        except Exception as error:
            status, problems = _why(error)
            body, kind = _problems(problems)
        line.write(status)
        return Response(body, status, headers, media_type=kind)

    async def _taken(self, request: Request, line: RequestLine, shown: asyncio.Queue[Shown | None]) -> Order:
        """The order of a request; what its pictures look like is put into a queue, and None at their end."""
        engine, loop = self._ready(), asyncio.get_running_loop()
        asked = await run_in_threadpool(
            read_request,
            await _body(request),
            engine.offer,
            content_type=request.headers.get("Content-Type", ""),
            accept=request.headers.get("Accept", ""),
            adapter=request.headers.get(_ADAPTER),
            check_output=self._places.check,
        )

        def tell(picture: Shown | None) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(shown.put_nowait, picture)

        order = await run_in_threadpool(engine.submit, asked, tell if asked.manner == "lines" else None)
        order.pictures.add_done_callback(lambda _: tell(None))
        line.tell(order, engine)
        return order

    async def _adapters(self, request: Request) -> Response:
        """Lists adapters, or is told where one lies."""
        try:
            store = self._ready().store
            if request.method == "GET":
                return JSONResponse({"adapters": store.names})
            added = read_addition(await _body(request))
            await run_in_threadpool(store.add, added.name, added.source, added.preload, added.pin)
        except (Refusal, TransferError) as error:
            return _refused(error)
        return JSONResponse({"name": added.name, "src": added.source})

    async def _remove(self, request: Request) -> Response:
        """Forgets an adapter."""
        try:
            self._ready().store.remove(request.path_params["name"])
        except Refusal as refusal:
            return _refused(refusal)
        return JSONResponse({"name": request.path_params["name"]})

    def _ready(self) -> Engine:
        if self.engine is None:
            raise Refusal("the model is not read yet; ask again when /ping answers 200", 503)
        return self.engine


async def _lines(
    order: Order, shown: asyncio.Queue[Shown | None], line: RequestLine, places: OutputPlaces
) -> AsyncIterator[bytes]:
    """An answer that comes bit by bit; what is wrong comes last, since its status is sent already."""
    status = _GONE
    try:
        while (picture := await shown.get()) is not None:
            yield await run_in_threadpool(answer_line, order.request, picture, places)
        order.pictures.result()
        status = 200
    except Exception as error:
        status, problems = _why(error)
        yield line_of({"errors": problems})
    finally:  # also where whoever asked has gone
        order.give_up()
        line.write(status)


def _why(error: Exception) -> tuple[int, list[str]]:
    """The status of an answer without pictures, and what it says."""
    match error:
        case Refusal():
            return error.status, error.problems
        case ClientDisconnect():
            return _GONE, ["whoever asked has gone"]
        case UserError():  # where the pictures were to go to
            return 400, error.problems
        case TransferError():
            return 502, [str(error)]
    show(error)
    return 500, [f"the pictures could not be drawn ({type(error).__name__}); the log says more"]


def _refused(error: Refusal | TransferError) -> Response:
    status, problems = _why(error)
    body, kind = _problems(problems)
    return Response(body, status, media_type=kind)


async def _body(request: Request) -> bytes:
    """A request's body; what is larger than SageMaker sends is not read to its end."""
    content = bytearray()
    try:
        async with asyncio.timeout(_PATIENCE):
            async for chunk in request.stream():
                content += chunk
                if len(content) > LARGEST_BODY:
                    raise Refusal(f"the body has more than {LARGEST_BODY:,} bytes", 413)
    except TimeoutError:
        raise Refusal(f"the body did not come in {_PATIENCE} seconds", 408) from None
    return bytes(content)


async def _drawn(request: Request, order: Order) -> Any:
    """The pictures of an order; where nobody waits for them any more it is given up."""
    pictures = asyncio.wrap_future(order.pictures)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((pictures, gone), return_when=asyncio.FIRST_COMPLETED)
        if not pictures.done():
            raise ClientDisconnect
        return pictures.result()
    finally:
        order.give_up()
        gone.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _problems(problems: Iterable[str]) -> tuple[bytes, str]:
    return json.dumps({"errors": [*problems]}, ensure_ascii=False).encode(), "application/json"


async def _no_such_path(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    body, kind = _problems([f"{request.method} {request.url.path} is not answered here; docs/serving.md says what is"])
    return Response(body, status, media_type=kind)


def _identity(request: Request) -> str:
    """What the log calls a request: its own name, where it has one that can be shown."""
    said = next((value for name in _IDS if (value := request.headers.get(name))), "")
    return said if said.isascii() and said.isprintable() and len(said) <= _LONGEST_ID and said else str(uuid.uuid4())
