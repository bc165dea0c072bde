"""Pure ASGI middleware for every request, including those to vLLM's own routes.

vLLM builds the classes without arguments (`--middleware`), so they read settings and state from
`app.state.service`.
"""

import json
import logging
import time
import traceback
from abc import ABC, abstractmethod
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import metrics, tracing, vllm_errors
from service.api.bodies import has_body, is_form
from service.api.body_budget import as_utf8
from service.api.generating import generates
from service.api.keys import HEALTH, is_public
from service.api.record import REQUEST_ID, RequestRecord, request_id
from service.api.refusal import refusal, refusal_event
from service.api.routes import ROUTES
from service.api.state import ServiceState
from service.errors import ClientGone, EngineDead, RequestError

_logger = logging.getLogger("service")

# Logged only with --verbose or when they fail.
_QUIET = HEALTH | {"/metrics"}
# Read at most this much of an error body: vLLM echoes input.
_MAX_ERROR_BYTES = 65_536
# The beginnings of vLLM's error events. Its other events are named, or their JSON begins with `id`.
_ERROR_EVENTS = (b'data: {"error"', b"event: error")


class _HttpMiddleware(ABC):
    """Passes a lifespan on, and closes WebSockets, which are not served."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.handle(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an HTTP request, or pass it on to `self.app`."""


class Observe(_HttpMiddleware):
    """The outermost middleware: gives each request an id, counts it, times it, and logs it once."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord(request_id(scope))
        record.attach(scope)
        state: ServiceState = scope["app"].state.service
        if scope["method"] == "POST" and path_of(scope) in state.deployment.model.routes:
            scope["path"] = scope["path"].removesuffix(path_of(scope)) + "/"
        traced = state.traces and path_of(scope) not in _QUIET
        span = tracing.begin(scope, record) if traced else None

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = record.id
                if record.status == 307:
                    headers["location"] = _other_slash(scope)
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
            _note_tokens(record, scope)
            if generates(scope["method"], path_of(scope)):
                record.count()
                state.rate_limits.spend(record.client, record.tokens)
            if span:
                tracing.end(span, scope, record, route)
            record.log(scope["method"], route, seconds, quiet=path_of(scope) in _QUIET)


class Refusals(_HttpMiddleware):
    """Writes every error response, in the form of the route's protocol.

    A RequestError from a handler becomes its response; any other exception becomes a 500. The texts
    of vLLM's own errors are replaced, in responses and in streams.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = _GuardedResponse(scope, receive, send)
        try:
            await self.app(scope, receive, response.send)
        except ClientDisconnect:
            await response.refuse(ClientGone("the client closed the connection"))
        except RequestError as e:
            await response.refuse(e)
        except Exception as e:
            await response.refuse(response.unexpected(e))


class _GuardedResponse:
    """Forwards one response to the client and replaces an error in it with ours."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._record = RequestRecord.of(scope)
        self._state: ServiceState = scope["app"].state.service
        self._failed: Message | None = None  # the start message of an error response
        self._body = b""  # of that error response, so far
        self._started = False
        self._events: int | None = None  # events sent so far; None: not an event stream
        self._complete = False

    async def send(self, message: Message) -> None:
        if self._complete:
            return  # an error has already ended the response
        if message["type"] == "http.response.start":
            if message["status"] >= 400 and self._record.error is None:
                self._failed = message
                return
            self._started = True
            headers = MutableHeaders(scope=message)
            if headers.get("content-type", "").startswith("text/event-stream"):
                self._events = 0
                headers["x-accel-buffering"] = "no"  # nginx would buffer the events
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
        """End the response with an error, unless it is complete."""
        if self._complete:
            return
        self._record.status = error.status
        self._record.error = error.type.replace(" ", "")
        path = path_of(self._scope)
        if isinstance(error, ClientGone):
            return
        if not self._started:
            response = refusal(error, self._record.id, path)
            if self._failed and "allow" in (headers := Headers(raw=self._failed["headers"])):
                response.headers["allow"] = headers["allow"]
            await with_cors(response, self._scope)(self._scope, self._receive, self._send)
        elif self._events is not None:
            event = refusal_event(error, self._record.id, path, self._events)
            await self._send({"type": "http.response.body", "body": event})
        self._complete = True

    def unexpected(self, error: Exception) -> RequestError:
        """Log an exception that is our fault; the client gets only the request id."""
        if self._state.engine_dead:
            return EngineDead()
        stack = "".join(traceback.format_tb((error.__cause__ or error).__traceback__))
        # Do not log the exception's text: it may echo input.
        _logger.error("request %s failed: %s\n%s", self._record.id, type(error).__name__, stack)
        _logger.debug("request %s", self._record.id, exc_info=error)
        return RequestError("internal error; the server's log has more under the request's id")

    def _explain(self, body: bytes, status: int | None = None) -> RequestError:
        """Turn a vLLM or FastAPI error body, or a stream's event, into a RequestError."""
        try:
            value = json.loads(body)
        except ValueError:
            value = None
        nested = value.get("error", value) if isinstance(value, dict) else None
        error = nested if isinstance(nested, dict) else {}
        if status is None:
            code = error.get("code")
            status = code if isinstance(code, int) and 400 <= code < 500 else 500
        _logger.debug("request %s: vLLM says %r", self._record.id, vllm_errors.text(error))
        if status >= 500 and self._state.engine_dead:
            return EngineDead()
        return vllm_errors.explain(status, error, self._state.model_names, self._state.body_keys)


class ApiKey(_HttpMiddleware):
    """Requires an API key, if any are configured, on all routes but health checks and the page.

    Notes the key's owner in the request's record.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: ServiceState = scope["app"].state.service
        path = path_of(scope)
        metrics_key = state.deployment.settings.metrics_key
        public = is_public(scope, path, metrics_key=metrics_key)
        if state.keys and not public:
            RequestRecord.of(scope).client = state.keys.owner(scope, path)
        await self.app(scope, receive, send)


class Body(_HttpMiddleware):
    """Reads the whole body of a request first (`bodies`), and checks how much JSON it holds."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: ServiceState = scope["app"].state.service
        if not has_body(scope):
            await self.app(scope, receive, send)
            return
        async with state.bodies.read(scope, receive) as body:
            path = path_of(scope)
            if path == "/" or not is_form(scope):  # POST / reads JSON, whatever its type says
                body = as_utf8(body)
                state.budget.check(path, body)
            message = {"type": "http.request", "body": body, "more_body": False}
            await self.app(scope, once(message, receive), send)


def once(message: Message, then: Receive) -> Receive:
    """Return a `Receive` that returns `message` first."""
    first = iter([message])

    async def receive() -> Message:
        return next(first, None) or await then()

    return receive


def with_cors(app: ASGIApp, scope: Scope) -> ASGIApp:
    """Add CORS headers for cross-origin requests, as vLLM's arguments allow."""
    if "origin" not in Headers(scope=scope):
        return app
    args = scope["app"].state.args
    return CORSMiddleware(
        app, allow_origins=args.allowed_origins, allow_credentials=args.allow_credentials
    )


def path_of(scope: Scope) -> str:
    """Return the request's path without the root path of a proxy in front of us."""
    path: str = scope["path"]
    return path.removeprefix(_root_path(scope)) or "/"


def _root_path(scope: Scope) -> str:
    """Return the application's root path; `root_path` itself grows where a part is mounted."""
    root: str = scope.get("app_root_path", scope.get("root_path", ""))
    return root


def _route(scope: Scope) -> str:
    """Return the route's template: a path that a client chose must not become a metric label."""
    if (route := scope.get("route")) is not None:
        return str(route.path)
    if (path := path_of(scope)) in ROUTES:
        return path
    mounted: str = scope.get("root_path", "").removeprefix(_root_path(scope))
    if mounted:
        return mounted
    # The request was refused before routing.
    paths = (getattr(route, "path", None) for route in scope["app"].routes)
    return path if path in paths else "unmatched"


def _other_slash(scope: Scope) -> str:
    """Return Starlette's redirect, which adds or removes a final slash, as a relative URL.

    Nothing else is right for a client behind a proxy: it may have another scheme, host and prefix.
    """
    path, query = scope["path"], scope["query_string"].decode("latin-1")
    bare = path.rstrip("/")
    slashes = len(path) - len(bare)
    name = quote(bare.rpartition("/")[2])
    return ("../" * slashes + name if slashes else f"./{name}/") + (f"?{query}" if query else "")


def _note_tokens(record: RequestRecord, scope: Scope) -> None:
    """Note a request's tokens: as vLLM's handler tells them, else as the engine has counted.

    A handler tells them when an answer is complete, and not on all routes. Both agree but for a
    beam search, which gives the engine its prompt again at each step.
    """
    state: dict[str, Any] = scope.get("state", {})
    usage = getattr(state.get("request_metadata"), "final_usage_info", None)
    if usage is not None:
        record.prompt_tokens = usage.prompt_tokens
        record.generation_tokens = usage.completion_tokens
    elif record.sequences:
        record.prompt_tokens = sum(prompt for prompt, _ in record.sequences)
        record.generation_tokens = sum(s.num_generation_tokens for _, s in record.sequences)
