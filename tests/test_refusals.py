"""What fails in a way nobody foresaw, in our route and in vLLM's own: 500 and the request's id.

No engine: our classes around POST / and vLLM's routers and handlers, with parts that break.
"""

import asyncio
import json
import logging
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.requests import Request
from starlette.responses import Response
from vllm.entrypoints.anthropic import api_router as messages_router
from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.responses import api_router as responses_router
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from service import model_config
from service.api.admission import Admission
from service.api.cancellation import Cancellations
from service.api.contract import Contract
from service.api.engine import Chunk, Engine
from service.api.middleware import Observe, Refusals
from service.prompting import Message
from service.settings import Settings
from tests.conftest import MODEL, hardening

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
TURNS = [{"role": "user", "content": "secret"}]
BODIES: dict[str, dict[str, Any]] = {
    "/": {"prompt": "secret"},
    CHAT: {"messages": TURNS},
    RESPONSES: {"input": "secret"},
    MESSAGES: {"model": MODEL, "messages": TURNS, "max_tokens": 2},
}
TEXT = "secret /root/secret"
FIRST = 'event: first\ndata: {"id": 1}\n\n'


class BrokenEngine:
    """Fails after a chunk, or at once."""

    context = 2048
    defaults: dict[str, Any] = {}

    async def tokenize(self, prompt: list[Message] | str) -> list[int]:
        return [1]

    async def generate(
        self, *args: Any, stream: bool, **kwargs: Any
    ) -> AsyncGenerator[Chunk, None]:
        if stream:
            yield Chunk("first", 1, None)
        raise RuntimeError(TEXT)


class BrokenHandler:
    """In the place of vLLM's handlers: fails after an event, or at once."""

    async def create(self, request: Any, raw_request: Request) -> AsyncIterator[str]:
        if not request.stream:
            raise RuntimeError(TEXT)
        return self._events()

    create_chat_completion = create_messages = create

    async def _events(self) -> AsyncIterator[str]:
        yield FIRST
        raise RuntimeError(TEXT)


class HandlerThatTells(BrokenHandler):
    """Its stream ends with an error as vLLM's own handlers write them."""

    def __init__(self, event: str) -> None:
        self.event = event

    async def _events(self) -> AsyncIterator[str]:
        yield FIRST
        yield self.event
        yield "data: [DONE]\n\n"


class State:
    """What the classes need of `app.state.service`."""

    traces = False
    engine_dead = False
    model_names = (MODEL,)
    deployment = SimpleNamespace(model=SimpleNamespace(routes=()))
    body_keys = frozenset({"messages"})
    hidden: frozenset[str] = frozenset()


def application(handler: BrokenHandler | None = None) -> FastAPI:
    app = FastAPI()
    app.state.service = State()
    app.state.args = Namespace(
        log_error_stack=False, allowed_origins=["*"], allow_credentials=False
    )
    app.state.openai_serving_chat = app.state.anthropic_serving_messages = handler
    contract = Contract(
        model_config.load(MODEL)[0],
        cast(Engine, BrokenEngine()),
        Admission(4, 4, 10),
        Cancellations(),
        Settings(),
    )

    async def create(request: Request) -> Response:
        return await contract.create(request)

    app.add_api_route("/", create, methods=["POST"])
    for router in (chat_router, messages_router, responses_router):
        router.attach_router(app)
    init_exception_handler(app)
    app.add_middleware(Refusals)
    app.add_middleware(Observe)
    return app


def post(app: FastAPI, route: str, **body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            headers = {"origin": "http://elsewhere"}
            return await client.post(route, json={**BODIES[route], **body}, headers=headers)

    return asyncio.run(send())


def counted(route: str, status: int) -> float:
    labels = {"route": route, "status": str(status)}
    return REGISTRY.get_sample_value("service_requests_total", labels) or 0.0


@hardening(17)
@pytest.mark.parametrize("route", BODIES)
def test_what_fails_is_500_with_the_id_and_no_text(
    route: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = counted(route, 500)
    # vLLM's Responses route has no handler at all here.
    handler = None if route == RESPONSES else BrokenHandler()
    with caplog.at_level(logging.INFO, logger="service"):
        answer = post(application(handler), route)
    assert answer.status_code == 500
    assert answer.headers["access-control-allow-origin"] == "*"
    request_id = answer.headers["x-request-id"]
    assert answer.json()["error"]["message"].endswith(f"(request {request_id})")
    assert "secret" not in answer.text
    assert counted(route, 500) == before + 1
    ours = "\n".join(r.getMessage() for r in caplog.records if r.name == "service")
    assert f"id={request_id} " in ours and "secret" not in ours
    if route != MESSAGES:  # whose handler tells of it itself
        assert f"request {request_id} failed: " in ours


@hardening(17)
@pytest.mark.parametrize("route", ["/", CHAT, MESSAGES])
def test_a_stream_that_fails_ends_with_an_error_of_its_protocol(route: str) -> None:
    before = counted(route, 500)
    answer = post(application(BrokenHandler()), route, stream=True)
    assert answer.status_code == 200
    assert answer.headers["x-accel-buffering"] == "no"
    assert counted(route, 500) == before + 1
    check_last_event(route, answer)


@hardening(17)
@pytest.mark.parametrize(
    ("route", "event"),
    [
        (CHAT, 'data: {"error": {"message": "secret", "type": "x", "code": 400}}\n\n'),
        (MESSAGES, 'event: error\ndata: {"type": "error", "error": {"message": "secret"}}\n\n'),
    ],
)
def test_errors_of_vllms_streams_are_replaced(route: str, event: str) -> None:
    answer = post(application(HandlerThatTells(event)), route, stream=True)
    assert answer.text.startswith(FIRST)
    check_last_event(route, answer)


def check_last_event(route: str, answer: httpx.Response) -> None:
    assert "secret" not in answer.text
    if route in ("/", CHAT):
        assert answer.text.endswith("data: [DONE]\n\n") == (route == CHAT)
    else:
        assert "[DONE]" not in answer.text
    events = answer.text.removesuffix("data: [DONE]\n\n").strip().split("\n\n")
    assert len(events) == 2
    name, _, data = events[1].rpartition("data: ")
    body = json.loads(data)
    assert name == ("event: error\n" if route == MESSAGES else "")
    message = body["error"]["message"]
    assert message.endswith(f"(request {answer.headers['x-request-id']})")
    if route == "/":
        assert (body["response"], body["status"]) == ("", 500)
    elif route == CHAT:
        assert list(body) == ["error"] and body["error"]["code"] in (400, 500)
    else:
        assert (body["type"], body["error"]["type"]) == ("error", "api_error")
