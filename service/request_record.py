"""What one HTTP request's log line and metrics say about it."""

from dataclasses import dataclass
from typing import Self

from starlette.types import Scope

from service.admission import ANYONE, Client

_SCOPE_KEY = "chat_service.record"


@dataclass(slots=True)
class RequestRecord:
    """Made by `guard.Observe`, filled in by the handler, written when the answer is out."""

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
