"""What one HTTP request's log line, span and metrics say about it; and the log line."""

import logging
from dataclasses import dataclass
from typing import Self

from starlette.types import Scope

from service.clients import ANYONE, Client

_logger = logging.getLogger("service")

_SCOPE_KEY = "chat_service.record"


@dataclass(slots=True)
class RequestRecord:
    """Made by `middleware.Observe`, filled in by the handler, written when the answer is out."""

    id: str
    status: int = 499  # until something is answered: the client went away
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # RequestError.type
    client: Client = ANYONE
    layer_seconds: float = 0.0
    # W3C trace context for the engine, where traces are on.
    trace_headers: dict[str, str] | None = None
    # Local time, prompt and response, only when the setting asks for prompts in the log.
    exchange: tuple[str, str, str] | None = None

    def attach(self, scope: Scope) -> None:
        scope[_SCOPE_KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """The record of the request that `scope` belongs to."""
        record: Self = scope[_SCOPE_KEY]
        return record

    def log(self, method: str, route: str, seconds: float, *, quiet: bool) -> None:
        """One line for a finished request; times are in seconds.

        `quiet` is for probes, whose good answers only --verbose shows. The prompt is logged only
        when the handler left it in the record, and then in the tutorials' own format.
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
            "error": self.error,
            "duration": f"{seconds:.4f}",
            "layer": f"{self.layer_seconds:.4f}" if self.layer_seconds else None,
        }
        level = logging.DEBUG if quiet and self.status < 400 else logging.INFO
        line = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        _logger.log(level, "request %s", line)
        if self.exchange:
            when, prompt, response = self.exchange
            escaped = repr(prompt)[1:-1]  # one line, whatever the prompt
            _logger.info('[%s] ", prompt:"%s", response:"%r"', when, escaped, response)
