"""Innermost of our middleware: decides for each request which application answers it."""

import asyncio
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import request_limits
from service.api.admission import Admission
from service.api.cancellation import Cancellations, deadline_of
from service.api.lifespan import lifespan
from service.api.middleware import path_of, with_cors
from service.api.record import RequestRecord
from service.api.routes import ROUTES
from service.api.state import ServiceState
from service.errors import InvalidRequest, MethodNotAllowed, NotFound, ServiceError
from service.settings import Settings

# These methods generate nothing, on no route.
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
# What else generates nothing. A route that is not here passes the queue, known or not.
_FREE = frozenset(
    {
        "/detokenize",
        "/tokenize",
        "/v1/load_lora_adapter",
        "/v1/messages/count_tokens",
        "/v1/unload_lora_adapter",
    }
)
# How long vLLM's handler of an ended request may take to notice.
_NOTICE_SECONDS = 5.0


class Gate:
    """Our routes are answered before vLLM's, and what else may generate passes the queue."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        service: ServiceState = scope["app"].state.service
        await self._choose(scope, service)(scope, receive, send)

    def _choose(self, scope: Scope, service: ServiceState) -> ASGIApp:
        """The application for a request. Raises NotFound and MethodNotAllowed."""
        path, method = path_of(scope), scope["method"]
        if path in service.hidden:
            raise NotFound("there is no such route here; GET / lists the routes")
        if method == "OPTIONS":
            return self.app  # vLLM's CORS layer answers browsers
        if path in ROUTES:
            if path == "/" and method == "POST":
                return with_cors(service.create, scope)
            if method not in ("GET", "HEAD"):
                raise MethodNotAllowed("GET, HEAD, POST" if path == "/" else "GET, HEAD")
            return with_cors(_route, scope)
        if method in _READING or path in _FREE or path.startswith("/v1/responses/"):
            return self.app
        settings = service.deployment.settings
        return Admit(self.app, service.admission, service.cancellations, settings)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application's life, ours around vLLM's."""
        service: ServiceState = scope["app"].state.service
        try:
            async with lifespan(scope["app"]):
                await self.app(scope, receive, send)
        except ServiceError as e:
            service.host.report_failure(str(e))
            await send({"type": "lifespan.startup.failed", "message": str(e)})


async def _route(scope: Scope, receive: Receive, send: Send) -> None:
    """One of `ROUTES`."""
    response = await ROUTES[path_of(scope)](Request(scope, receive, send))
    await response(scope, receive, send)


class Admit:
    """A request to what may generate: behind the queue, with limits and a deadline."""

    def __init__(
        self, app: ASGIApp, admission: Admission, cancellations: Cancellations, settings: Settings
    ) -> None:
        self.app = app
        self.admission = admission
        self.cancellations = cancellations
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord.of(scope)
        message: Message | None = await receive()
        assert message is not None
        body = message.get("body", b"")
        request: Mapping[str, Any] = {}
        if Headers(scope=scope).get("content-type", "").startswith("multipart/form-data"):
            if self.settings.cache_per_key:  # of which a form cannot tell vLLM
                raise InvalidRequest("this server takes no forms, because it keeps a cache per key")
        elif body:
            request = request_limits.parse(body)
            if self.settings.cache_per_key:
                message["body"] = to_json({**request, "cache_salt": record.client.name})
        sequences = request_limits.sequences(request, self.settings.max_sequences)
        ended = asyncio.Event()

        async def read() -> Message:
            nonlocal message
            if message is not None:
                body, message = message, None
                return body
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send_until_ended(message: Message) -> None:
            if not ended.is_set():
                await send(message)

        async with (
            self.cancellations.watch(receive, deadline_of(scope)),
            self.admission.slot(record.client, sequences),
        ):
            handler = asyncio.ensure_future(self.app(scope, read, send_until_ended))
            try:
                await asyncio.shield(handler)
            except asyncio.CancelledError:
                # vLLM's handlers do not pass a cancellation on to the engine; what they notice is
                # that the client leaves.
                ended.set()
                handler.add_done_callback(lambda task: task.cancelled() or task.exception())
                await asyncio.wait({handler}, timeout=_NOTICE_SECONDS)
                handler.cancel()
                raise
