"""Pure-ASGI classes that every request passes, vLLM's own routes included.

vLLM builds them without arguments (`--middleware`), so what they need of this deployment they read
from the application's state.
"""

import asyncio
import json
import re
import time
import uuid
from http import HTTPStatus
from typing import Any, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs, metrics, tracing
from service.budget import Budget
from service.errors import (
    ENGINE_ENDED,
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    Overloaded,
    RequestError,
    Unauthorized,
    refusal,
)
from service.keys import Keys
from service.request_record import RequestRecord

REQUEST_ID = "x-request-id"
# Probes carry no key, and are not worth a log line each.
HEALTH = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
_QUIET = HEALTH | {"/metrics"}
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# So much of an answer with an error is read; vLLM's own repeat what the client sent.
_LONGEST_ERROR = 65_536
_LONGEST_MESSAGE = 300
# So many bodies of the longest kind may be held at one time.
_MOST_BODIES = 64
_SHORT_BODY = 65_536  # bytes; these are let in always


class ServiceState(Protocol):
    """What these classes need of `app.state.service`."""

    @property
    def keys(self) -> Keys | None: ...
    @property
    def guarded_metrics(self) -> bool: ...
    @property
    def max_body_bytes(self) -> int: ...
    @property
    def body_timeout(self) -> float: ...

    create: ASGIApp  # POST /
    budget: Budget
    traces: bool
    body_bytes: int  # of all bodies that are held now

    @property
    def engine_dead(self) -> bool: ...


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
        except Exception:
            record.status = 500  # what the server answers after us
            raise
        finally:
            metrics.IN_FLIGHT.dec()
            seconds = time.perf_counter() - began
            route = _route(scope)
            metrics.REQUESTS.labels(route, record.status).inc()
            metrics.REQUEST_SECONDS.labels(route).observe(seconds)
            _add_vllm_usage(record, scope)
            if span:
                tracing.end(span, scope, record, route)
            logs.request(record, scope["method"], route, seconds, quiet=scope["path"] in _QUIET)


class CleanErrors:
    """Makes the errors of vLLM's routes short, free of input, and findable by the request's id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord.of(scope)
        start: Message | None = None
        body = b""

        async def cleaned(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                if message["status"] >= 400 and record.error is None:
                    start = message
                    return
            elif start:
                body += message.get("body", b"")[: _LONGEST_ERROR - len(body)]
                if not message.get("more_body"):
                    await self._send(start, body, scope, receive, send)
                return
            await send(message)

        await self.app(scope, receive, cleaned)

    async def _send(
        self, start: Message, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        record = RequestRecord.of(scope)
        state: ServiceState = scope["app"].state.service
        if start["status"] >= 500 and state.engine_dead:
            record.error = ENGINE_ENDED.type
            await refusal(ENGINE_ENDED, record.id)(scope, receive, send)
            return
        answer = _clean_error(body, start["status"], record.id)
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-type"] = "application/json"
        headers["content-length"] = str(len(answer))
        await send({**start, "headers": headers.raw})
        await send({"type": "http.response.body", "body": answer})


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
            or (path == "/metrics" and not state.guarded_metrics)
        )
        if state.keys and not open_to_all and not _is_preflight(scope):
            client = state.keys.client(_bearer(scope))
            if client is None:
                record = RequestRecord.of(scope)
                error = Unauthorized("send an API key in the header `Authorization: Bearer <key>`")
                record.error = error.type
                await refusal(error, record.id)(scope, receive, send)
                return
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
            await self._pass(held, scope, receive, send)
        finally:
            state.body_bytes -= held.bytes

    async def _pass(self, held: "_Held", scope: Scope, receive: Receive, send: Send) -> None:
        state = held.state
        try:
            async with asyncio.timeout(state.body_timeout):
                body = await _read(Headers(scope=scope), receive, held)
            if scope["path"] == "/" or not _is_form(scope):
                state.budget.check(scope["path"].removeprefix(scope.get("root_path", "")), body)
        except (TimeoutError, RequestError) as e:
            error = e if isinstance(e, RequestError) else _too_slow(state.body_timeout)
            record = RequestRecord.of(scope)
            record.error = error.type
            if not isinstance(error, ClientGone):
                await refusal(error, record.id)(scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def read() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        await self.app(scope, read, send)


class Shortcut:
    """Innermost: takes POST / to its handler past layers of vLLM's that it has no use for.

    They are CORS, which matters to browsers alone, HTTP metrics beside ours, and the router.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["path"] == "/"
            and scope["method"] == "POST"
            and not scope.get("root_path")
            and not any(name == b"origin" for name, _ in scope["headers"])
        ):
            state: ServiceState = scope["app"].state.service
            await state.create(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class _Held:
    """The bytes of one body, counted among those of all."""

    def __init__(self, state: ServiceState) -> None:
        self.state = state
        self.bytes = 0

    def add(self, count: int) -> None:
        """Raises Overloaded when the bodies of all requests together are too much."""
        self.bytes += count
        self.state.body_bytes += count
        if (
            self.bytes > _SHORT_BODY
            and self.state.body_bytes > _MOST_BODIES * self.state.max_body_bytes
        ):
            metrics.REFUSED.labels("bodies").inc()
            raise Overloaded("the server holds too many long bodies already", retry_after=1)


async def _read(headers: Headers, receive: Receive, held: _Held) -> bytes:
    most = held.state.max_body_bytes
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection")
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        held.add(len(message.get("body", b"")))
        if not message.get("more_body"):
            return bytes(body)


def _is_form(scope: Scope) -> bool:
    """Whether a body is files and fields; vLLM's routes for JSON refuse such a one unread."""
    return Headers(scope=scope).get("content-type", "").lower().startswith("multipart/form-data")


def _too_large(most: int) -> RequestError:
    return BodyTooLarge(f"the body is longer than the limit of {most} bytes")


def _too_slow(seconds: float) -> RequestError:
    return BodyTooSlow(f"the body did not come within {seconds:g} s")


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


def _clean_error(body: bytes, status: int, request_id: str) -> bytes:
    """An error answer of vLLM's or FastAPI's in OpenAI's form, without what the client sent."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    found = answer.get("error", answer) if isinstance(answer, dict) else {}
    error: dict[str, Any] = found if isinstance(found, dict) else {"message": found}
    message = error.get("message") or error.get("detail") or HTTPStatus(status).phrase
    message = _without_input(str(message))
    cleaned = {
        "message": f"{message} (request {request_id})",
        "type": error.get("type") or HTTPStatus(status).phrase,
        "param": error.get("param"),
        "code": error.get("code") or status,
    }
    outer = {k: v for k, v in answer.items() if k == "type"} if isinstance(answer, dict) else {}
    return json.dumps({**outer, "error": cleaned}, ensure_ascii=False).encode()


_VALIDATION = re.compile(
    r"\d+ validation errors?:\s+\{.*?'loc': '([^']*)', 'msg': (['\"])(.*?)\2", re.S
)
# What vLLM quotes is the name of a parameter, or what the client sent.
_QUOTED = re.compile(r"(?<!\w)([`'\"])(.*?)\1(?!\w)", re.S)
_NAME = re.compile(r"[a-z_.]{1,40}|application/json")


def _without_input(message: str) -> str:
    """A message of vLLM's less the value that it repeats."""
    if found := _VALIDATION.match(message):
        message = f"{found[1].removeprefix('body.')}: {found[3]}"
    message = re.sub(r"^\d+ validation errors?:\s+", "", message)
    message = re.sub(r", value=.*\)$", ")", message, flags=re.S)
    message = _QUOTED.sub(
        lambda quoted: quoted[0] if _NAME.fullmatch(quoted[2]) else "...", message
    )
    message = " ".join(message.split())
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " ..."


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
