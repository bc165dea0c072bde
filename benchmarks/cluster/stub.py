"""A replica without an engine, to measure the way to it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from service.cluster import exchange
from service.cluster.exchange import Part, Request

CHUNKS, INTERVAL = 100, 0.01  # of a stream; seconds
STEP = 0.1  # seconds of the engine for one request
_EVENT = b'data: {"delta": " word"}\n\n'


@serve.deployment
@serve.ingress()
class Stub:
    """Answers `POST /` at once, `/stream` in chunks, and `/step` one request after the other."""

    def __init__(self) -> None:
        self._engine = asyncio.Semaphore(1)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        # uvicorn does not know an actor's method for what it is.
        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            await self._application(scope, receive, send)

        return application

    async def answer(self, request: Request) -> AsyncGenerator[Part | None, None]:
        """As `replica.Model.answer`."""
        async with contextlib.aclosing(exchange.answer(self._application, request)) as parts:
            async for part in parts:
                yield part

    async def _application(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (await receive()).get("more_body"):
            pass
        path = scope["path"].removeprefix(scope["root_path"])
        stream = path == "/stream"
        kind = b"text/event-stream" if stream else b"application/json"
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        )
        if stream:
            for _ in range(CHUNKS):
                await asyncio.sleep(INTERVAL)
                await send({"type": "http.response.body", "body": _EVENT, "more_body": True})
        elif path == "/step":
            async with self._engine:
                await asyncio.sleep(STEP)
        body = b"" if stream else json.dumps({"response": "word", "status": 200}).encode()
        await send({"type": "http.response.body", "body": body})
