"""The data of one HTTP request for its log line, span and metrics."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from starlette.types import Scope

from service.clients import ANYONE, Client

_logger = logging.getLogger("service")

_SCOPE_KEY = "chat_service.record"


@dataclass(slots=True)
class RequestRecord:
    """Created by `middleware.Observe`, filled in by handlers, logged after the response."""

    id: str
    status: int = 499  # kept if the client leaves before a response
    model: str | None = None  # the served name, where there is a choice
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # RequestError.type
    client: Client = ANYONE
    layer_seconds: float = 0.0
    # W3C trace context for the engine, if traces are on.
    trace_headers: dict[str, str] | None = None
    # (local time, prompt, response), only with the setting log_prompts.
    exchange: tuple[str, str, str] | None = None

    def attach(self, scope: Scope) -> None:
        scope[_SCOPE_KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """Return the record of the request of `scope`."""
        record: Self = scope[_SCOPE_KEY]
        return record

    def note_model(self, name: object, names: Sequence[str]) -> None:
        """Note which of `names` answers, where there is a choice; others are a client's text."""
        if len(names) > 1 and name in names:
            self.model = str(name)

    def log(self, method: str, route: str, seconds: float, *, quiet: bool) -> None:
        """Log one line for a finished request. Times are in seconds.

        With `quiet`, for health checks, a success is shown only by --verbose. If `exchange` is set,
        log it too, in the tutorials' format.
        """
        fields = {
            "id": self.id,
            "key": None if self.client is ANYONE else self.client.name,
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
