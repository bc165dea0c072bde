"""Pure-ASGI classes that every request passes, vLLM's own routes included.

vLLM builds them without arguments (`--middleware`), so what they need of this deployment they read
from the application's state.
"""

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import metrics, tracing, vllm_errors
from service.api.record import RequestRecord
from service.api.refusal import refusal, refusal_event
from service.api.routes import ROUTES
from service.api.state import ServiceState
from service.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    EngineDead,
    Overloaded,
    RequestError,
    Unauthorized,
)

_logger = logging.getLogger("service")

REQUEST_ID = "x-request-id"
# Probes carry no key, and are not worth a log line each.
HEALTH = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
_QUIET = HEALTH | {"/metrics"}
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Read at most this much of an error body: vLLM repeats what the client sent.
_MAX_ERROR_BYTES = 65_536
# How an error of vLLM's begins in a stream; its other events are named, or begin with an id.
_ERROR_EVENTS = (b'data: {"error"', b"event: error")
# So many bodies of the longest kind may be held at one time.
_MAX_BODIES = 64
_MIN_COUNTED_BODY = 65_536  # bytes; these are let in always


class Observe:
    """Outermost: gives each request an id, counts it, times it, and logs it once."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(_request_id(scope))
        record.attach(scope)
        state: ServiceState = scope["app"].state.service
        traced = state.traces and scope["path"] not in _QUIET
        span = tracing.begin(scope, record) if traced else None

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = record.id
            await send(message)

        began = time.perf_counter()
        metrics.IN_FLIGHT.inc()
        try:
            await self.app(scope, receive, observed)
        finally:
            metrics.IN_FLIGHT.dec()
            seconds = time.perf_counter() - began
            route = _route(scope)
            metrics.REQUESTS.labels(route, record.status).inc()
            metrics.REQUEST_SECONDS.labels(route).observe(seconds)
            _add_vllm_usage(record, scope)
            if span:
                tracing.end(span, scope, record, route)
            record.log(scope["method"], route, seconds, quiet=scope["path"] in _QUIET)


class Refusals:
    """Writes every error, in the form of the route's protocol.

    Handlers raise: a RequestError says what it is, anything else is a fault of ours, and 500. Of
    vLLM's own errors, in an answer or in a stream, the texts are replaced.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        try:
            await self.app(scope, receive, answer.send)
        except ClientDisconnect:
            await answer.refuse(ClientGone("the client closed the connection"))
        except RequestError as e:
            await answer.refuse(e)
        except Exception as e:
            await answer.refuse(answer.unexpected(e))


class _Answer:
    """What is sent to a client; an error in it gives way to ours."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._record = RequestRecord.of(scope)
        self._state: ServiceState = scope["app"].state.service
        self._failed: Message | None = None  # the start of an error of vLLM's
        self._body = b""  # of that
        self._started = False
        self._events: int | None = None  # sent so far, in a stream of them
        self._complete = False

    async def send(self, message: Message) -> None:
        if self._complete:
            return  # an error has ended it already
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and self._record.error is None:
                self._failed = message
                return
            self._started = True
            headers = MutableHeaders(scope=message)
            if headers.get("content-type", "").startswith("text/event-stream"):
                self._events = 0
                headers["x-accel-buffering"] = "no"  # nginx would keep the events back
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            if self._failed:
                self._body += body[: _MAX_ERROR_BYTES - len(self._body)]
                if not message.get("more_body"):
                    await self.refuse(self._explain(self._body, self._failed["status"]))
                return
            if self._events is not None and body:
                if body.startswith(_ERROR_EVENTS):
                    await self.refuse(self._explain(body.partition(b"data: ")[2]))
                    return
                self._events += 1
            self._complete = not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, error: RequestError) -> None:
        """End the answer with an error, unless it is complete."""
        if self._complete:
            return
        self._record.status = error.status
        self._record.error = error.type.replace(" ", "")
        path = path_of(self._scope)
        if isinstance(error, ClientGone):
            return
        if not self._started:
            answer = refusal(error, self._record.id, path)
            if self._failed and "allow" in (headers := Headers(raw=self._failed["headers"])):
                answer.headers["allow"] = headers["allow"]
            await with_cors(answer, self._scope)(self._scope, self._receive, self._send)
        elif self._events is not None:
            event = refusal_event(error, self._record.id, path, self._events)
            await self._send({"type": "http.response.body", "body": event})
        self._complete = True

    def unexpected(self, error: Exception) -> RequestError:
        """A fault of ours, for the log with its place and for the client by the request's id."""
        if self._state.engine_dead:
            return EngineDead()
        stack = "".join(traceback.format_tb((error.__cause__ or error).__traceback__))
        # What it says may repeat what the client sent.
        _logger.error("request %s failed: %s\n%s", self._record.id, type(error).__name__, stack)
        _logger.debug("request %s", self._record.id, exc_info=error)
        return RequestError("internal error; the server's log has more under the request's id")

    def _explain(self, body: bytes, status: int = 500) -> RequestError:
        """An error of vLLM's or FastAPI's as ours."""
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        found = answer.get("error", answer) if isinstance(answer, dict) else None
        error = found if isinstance(found, dict) else {}
        _logger.debug("request %s: vLLM says %r", self._record.id, vllm_errors.text(error))
        if status >= 500 and self._state.engine_dead:
            return EngineDead()
        return vllm_errors.explain(status, error, self._state.model_names, self._state.body_keys)


class ApiKey:
    """Asks for an API key, when there are any, on every route but health checks and the page.

    Whose key it is goes on with the request. WebSockets are not served.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state: ServiceState = scope["app"].state.service
        path = scope["path"]
        open_to_all = (
            path in HEALTH
            or (path == "/" and scope["method"] in ("GET", "HEAD"))  # where a person enters the key
            or (path == "/metrics" and not state.deployment.settings.metrics_key)
        )
        if state.keys and not open_to_all and not _is_preflight(scope):
            client = state.keys.client(_bearer(scope))
            if client is None:
                raise Unauthorized("send an API key in the header `Authorization: Bearer <key>`")
            RequestRecord.of(scope).client = client
        await self.app(scope, receive, send)


class Body:
    """Reads a request's body whole before anything else does, within a size and a time.

    The bodies held at one time have a limit too, which many clients reach only together.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
            await self.app(scope, receive, send)
            return
        state: ServiceState = scope["app"].state.service
        held = _Held(state)
        try:
            try:
                async with asyncio.timeout(state.deployment.settings.body_timeout):
                    body = await _read(headers, receive, held)
            except TimeoutError:
                seconds = state.deployment.settings.body_timeout
                raise BodyTooSlow(f"the body did not come within {seconds:g} s") from None
            if scope["path"] == "/" or not _is_form(scope):
                state.budget.check(path_of(scope), body)
            whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

            async def read() -> Message:
                nonlocal whole
                if whole is not None:
                    message, whole = whole, None
                    return message
                return await receive()

            await self.app(scope, read, send)
        finally:
            state.held_body_bytes -= held.bytes


class _Held:
    """The bytes of one body, counted among those of all."""

    def __init__(self, state: ServiceState) -> None:
        self.state = state
        self.bytes = 0

    def add(self, count: int) -> None:
        """Raises Overloaded when the bodies of all requests together are too much."""
        self.bytes += count
        self.state.held_body_bytes += count
        if (
            self.bytes > _MIN_COUNTED_BODY
            and self.state.held_body_bytes
            > _MAX_BODIES * self.state.deployment.settings.max_body_bytes
        ):
            metrics.REFUSED.labels("bodies").inc()
            raise Overloaded("the server holds too many long bodies already", retry_after=1)


async def _read(headers: Headers, receive: Receive, held: _Held) -> bytes:
    limit = held.state.deployment.settings.max_body_bytes
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection")
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        held.add(len(message.get("body", b"")))
        if not message.get("more_body"):
            return bytes(body)


def _is_form(scope: Scope) -> bool:
    """Whether a body is files and fields; vLLM's routes for JSON refuse such a one unread."""
    return Headers(scope=scope).get("content-type", "").lower().startswith("multipart/form-data")


def _too_large(limit: int) -> RequestError:
    return BodyTooLarge(f"the body is longer than the limit of {limit} bytes")


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks, without the key, if it may send it; vLLM's CORS layer answers."""
    headers = Headers(scope=scope)
    asks = "origin" in headers and "access-control-request-method" in headers
    return asks and scope["method"] == "OPTIONS"


def _bearer(scope: Scope) -> bytes:
    """The key that a request carries, as the bytes that came, or nothing."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return bytes(key.strip()) if scheme.lower() == b"bearer" else b""
    return b""


def with_cors(app: ASGIApp, scope: Scope) -> ASGIApp:
    """Lets a page of another site read the answer, where vLLM's arguments let it."""
    if "origin" not in Headers(scope=scope):
        return app
    args = scope["app"].state.args
    return CORSMiddleware(
        app, allow_origins=args.allowed_origins, allow_credentials=args.allow_credentials
    )


def path_of(scope: Scope) -> str:
    """The path of a request, without what a proxy in front of us adds."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("app_root_path", scope.get("root_path", "")))


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id when it is harmless, else a new one; vLLM is shown the same."""
    headers = MutableHeaders(scope=scope)
    given = headers.get(REQUEST_ID, "")
    if _SAFE_ID.fullmatch(given):
        return given
    headers[REQUEST_ID] = uuid.uuid4().hex
    return headers[REQUEST_ID]


def _route(scope: Scope) -> str:
    """The route's template, so that no path of a client's choosing becomes a label."""
    if (route := scope.get("route")) is not None:
        return str(route.path)
    if (path := path_of(scope)) in ROUTES:
        return path
    mounted: str = scope.get("root_path", "").removeprefix(scope.get("app_root_path", ""))
    if mounted:
        return mounted
    # Refused before it was routed.
    paths = (getattr(route, "path", None) for route in scope["app"].routes)
    return scope["path"] if scope["path"] in paths else "unmatched"


def _add_vllm_usage(record: RequestRecord, scope: Scope) -> None:
    """vLLM's own handlers leave their token counts on the request's state."""
    state: dict[str, Any] = scope.get("state", {})
    usage = getattr(state.get("request_metadata"), "final_usage_info", None)
    if usage is not None:
        record.prompt_tokens = usage.prompt_tokens
        record.generation_tokens = usage.completion_tokens
