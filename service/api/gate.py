"""The innermost middleware: chooses the application that answers each request."""

import asyncio
import functools
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import request_limits
from service.api.application import Host
from service.api.bodies import is_form
from service.api.cancellation import deadline_of
from service.api.generating import generates
from service.api.keys import is_preflight
from service.api.lifespan import lifespan
from service.api.middleware import once, path_of, with_cors
from service.api.record import RequestRecord
from service.api.routes import ROUTES
from service.api.state import ServiceState
from service.errors import InvalidRequest, LaunchError, MethodNotAllowed, NotFound, ServiceError

# How long vLLM's handler may take to return after its request is cancelled.
_CANCEL_SECONDS = 5.0


class Gate:
    """Answers our routes itself; sends all other generating requests through the queue to vLLM."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._run_lifespan(scope, receive, send)
            return
        service: ServiceState = scope["app"].state.service
        await self._choose(scope, service)(scope, receive, send)

    def _choose(self, scope: Scope, service: ServiceState) -> ASGIApp:
        """Return the application for a request. Raises NotFound or MethodNotAllowed."""
        path, method = path_of(scope), scope["method"]
        if path in service.hidden:
            raise NotFound("there is no such route here; GET / lists the routes")
        if is_preflight(scope):
            return self.app  # vLLM's CORS layer answers browsers
        if generates(method, path):
            service.rate_limits.check(RequestRecord.of(scope).client)
            if path == "/":
                return with_cors(service.create, scope)
            return functools.partial(_admit, self.app, service)
        if path not in ROUTES:
            return functools.partial(_head, self.app) if method == "HEAD" else self.app
        if method not in ("GET", "HEAD"):
            raise MethodNotAllowed("GET, HEAD, POST" if path == "/" else "GET, HEAD")
        return with_cors(_route, scope)

    async def _run_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run our lifespan around vLLM's."""
        state = scope["app"].state
        host: Host = state.args.chat_service[1]
        started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "lifespan.startup.complete"
            await send(message)

        try:
            if not hasattr(state, "service"):  # vLLM has left our plugin out
                raise LaunchError("this model does not generate text, so POST / cannot serve it")
            async with lifespan(scope["app"]):
                await self.app(scope, receive, send_noting_start)
        except Exception as e:
            if started:
                raise
            # uvicorn takes an exception for an application without a lifespan, and serves on.
            reason = str(e) if isinstance(e, ServiceError) else f"the application fails: {e!r}"
            host.report_failure(reason)
            await send({"type": "lifespan.startup.failed", "message": reason})


async def _route(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request to one of `ROUTES`."""
    response = await ROUTES[path_of(scope)](Request(scope, receive, send))
    await response(scope, receive, send)


async def _head(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer HEAD as GET, without the body: FastAPI's routes take GET alone (RFC 9110, 9.3.2)."""
    get = {**scope, "method": "GET"}

    async def send_without_body(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    try:
        await app(get, receive, send_without_body)
    finally:
        scope.update(get, method="HEAD")  # the copy now holds the matched route


async def _admit(
    app: ASGIApp, service: ServiceState, scope: Scope, receive: Receive, send: Send
) -> None:
    """Pass a request to a generating vLLM route, with limits, a queue and a deadline."""
    settings = service.deployment.settings
    record = RequestRecord.of(scope)
    message = await receive()
    body = message.get("body", b"")
    request: Mapping[str, Any] = {}
    if is_form(scope):
        if settings.cache_per_key:  # a form has no field for the cache salt
            raise InvalidRequest("this server takes no forms, because it keeps a cache per key")
    elif body:
        request = request_limits.parse(body)
        if settings.cache_per_key:
            message["body"] = to_json({**request, "cache_salt": record.client.name})
    record.model = service.served(request.get("model") or service.deployment.model.name)
    default = service.deployment.model.sampling.max_tokens
    sequences = request_limits.sequences(request, settings.max_sequences, default)
    cancelled = asyncio.Event()

    async def receive_disconnect() -> Message:
        await cancelled.wait()
        return {"type": "http.disconnect"}

    async def send_unless_cancelled(message: Message) -> None:
        if not cancelled.is_set():
            await send(message)

    async with (
        service.cancellations.watch(receive, deadline_of(scope)),
        service.admission.slot(record.client, sequences),
    ):
        received = once(message, receive_disconnect)
        handler = asyncio.ensure_future(app(scope, received, send_unless_cancelled))
        try:
            await asyncio.shield(handler)
        except asyncio.CancelledError:
            # vLLM's handlers do not pass a cancellation on to the engine. They abort the
            # request when they receive a disconnect.
            cancelled.set()
            handler.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.wait({handler}, timeout=_CANCEL_SECONDS)
            handler.cancel()
            raise
