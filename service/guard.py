"""Pure-ASGI classes that every request passes, vLLM's own routes included.

vLLM builds them without arguments (`--middleware`), so what they need of this deployment they read
from the application's state.
"""

import hashlib
import hmac
import re
import time
import uuid
from typing import Any, Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs, metrics
from service.errors import RequestError, Unauthorized, refusal
from service.request_record import RequestRecord

REQUEST_ID = "x-request-id"
# Probes carry no key, and are not worth a log line each.
_HEALTH = frozenset({"/health", "/health/ready", "/ping"})
_QUIET = _HEALTH | {"/metrics"}
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ServiceState(Protocol):
    """What these classes need of `app.state.service`."""

    @property
    def key_hash(self) -> str | None: ...


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
            logs.request(record, scope["method"], route, seconds, quiet=scope["path"] in _QUIET)


class ApiKey:
    """Asks for the API key, when there is one, on every route but the health checks.

    Keys are compared as hashes and in constant time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A browser asks with OPTIONS, and without the key, whether it may send the key.
        if scope["type"] != "http" or scope["path"] in _HEALTH or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        state: ServiceState = scope["app"].state.service
        if state.key_hash and not _has_key(Headers(scope=scope), state.key_hash):
            error: RequestError = Unauthorized(
                "send the API key in the header `Authorization: Bearer <key>`"
            )
            await refusal(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _has_key(headers: Headers, key_hash: str) -> bool:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()  # the bytes as they came
    return hmac.compare_digest(given, key_hash) and scheme.lower() == "bearer"


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
    return mounted or "unmatched"


def _add_vllm_usage(record: RequestRecord, scope: Scope) -> None:
    """vLLM's own handlers leave their token counts on the request's state."""
    state: dict[str, Any] = scope.get("state", {})
    usage = getattr(state.get("request_metadata"), "final_usage_info", None)
    if usage is not None:
        record.prompt_tokens = usage.prompt_tokens
        record.generation_tokens = usage.completion_tokens
