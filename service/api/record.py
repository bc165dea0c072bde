"""The data of one HTTP request for its log line, span and metrics."""

import logging
import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

from starlette.datastructures import MutableHeaders
from starlette.types import Scope

from service.api import metrics
from service.clients import ANYONE, Client

_logger = logging.getLogger("service")

_SCOPE_KEY = "chat_service.record"
REQUEST_ID = "x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_current: ContextVar["RequestRecord | None"] = ContextVar("record", default=None)


@dataclass(slots=True)
class RequestRecord:
    """Created by `middleware.Observe`, filled in by handlers, logged after the response."""

    id: str
    status: int = 499  # kept if the client leaves before a response
    model: str | None = None  # the served name: the model's or an adapter's
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # RequestError.type
    client: Client = ANYONE
    layer_seconds: float = 0.0
    # (prompt tokens, vLLM's statistics) of each sequence that the engine was given.
    sequences: list[tuple[int, Any]] = field(default_factory=list)
    # W3C trace context for the engine, if traces are on.
    trace_headers: dict[str, str] | None = None
    # (local time, prompt, response), only with the setting log_prompts.
    exchange: tuple[str, str, str] | None = None

    def attach(self, scope: Scope) -> None:
        """Make it the record of `scope`, and of what its task gives to the engine."""
        scope[_SCOPE_KEY] = self
        _current.set(self)

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """Return the record of the request of `scope`."""
        record: Self = scope[_SCOPE_KEY]
        return record

    @property
    def tokens(self) -> int:
        """All tokens of the request: its prompts' and its answers'."""
        return (self.prompt_tokens or 0) + (self.generation_tokens or 0)

    def count(self) -> None:
        """Count a finished request to a generating route, and its tokens, for its client."""
        client, model = self.client.name, self.model or ""
        metrics.CLIENT_REQUESTS.labels(client, model, self.status).inc()
        if self.prompt_tokens:
            metrics.TOKENS.labels(client, model, "prompt").inc(self.prompt_tokens)
        if self.generation_tokens:
            metrics.TOKENS.labels(client, model, "generation").inc(self.generation_tokens)

    def log(self, method: str, route: str, seconds: float, *, quiet: bool) -> None:
        """Log one line for a finished request. Times are in seconds.

        With `quiet`, for health checks, a success is shown only by --verbose. If `exchange` is set,
        log it too, in the tutorials' format.
        """
        fields = {
            "id": self.id,
            "client": None if self.client is ANYONE else self.client.name,
            "method": method,
            "route": route,
            "status": self.status,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "finish_reason": self.finish_reason,
            "model": self.model,
            "error": self.error,
            "duration": f"{seconds:.4f}",
            "layer": f"{self.layer_seconds:.4f}" if self.layer_seconds else None,
        }
        level = logging.DEBUG if quiet and self.status < 400 else logging.INFO
        line = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        _logger.log(level, "request %s", line)
        if self.exchange:
            when, prompt, response = self.exchange
            escaped = repr(prompt)[1:-1]  # keeps it on one line
            _logger.info('[%s] ", prompt:"%s", response:"%r"', when, escaped, response)


def note_sequence(prompt_tokens: int, statistics: Any) -> None:
    """Note a sequence that the request of this task gives to the engine."""
    if record := _current.get():
        record.sequences.append((prompt_tokens, statistics))


def request_id(scope: Scope) -> str:
    """Return the client's X-Request-Id if it is safe, else a new id, also set for vLLM."""
    headers = MutableHeaders(scope=scope)
    if _SAFE_ID.fullmatch(given := headers.get(REQUEST_ID, "")):
        return given
    headers[REQUEST_ID] = uuid.uuid4().hex
    return headers[REQUEST_ID]
