"""The gate is closed by default: what is not known to generate nothing passes the queue."""

import asyncio
from argparse import Namespace
from types import SimpleNamespace
from typing import Any
from urllib.parse import urljoin

import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from service import clients
from service.api.admission import Admission
from service.api.cancellation import Cancellations
from service.api.gate import Gate
from service.api.keys import Keys
from service.api.middleware import ApiKey, Observe, Refusals
from service.api.rate_limits import RateLimits
from service.clients import Client
from service.errors import Overloaded
from service.model_config.schema import Sampling
from service.settings import Settings
from tests.conftest import hardening


class State:
    """What the classes need of `app.state.service`, whose queue can be closed."""

    traces = False
    engine_dead = False
    model_names = ("a-model",)
    body_keys: frozenset[str] = frozenset()
    hidden = frozenset({"/v1/hidden"})
    keys: Keys | None = None

    def __init__(self, *, cache_per_key: bool = False) -> None:
        self.admission = Admission(1, 0, 10)
        self.cancellations = Cancellations()
        self.rate_limits = RateLimits()
        self.deployment = SimpleNamespace(
            settings=Settings(cache_per_key=cache_per_key),
            model=SimpleNamespace(name="a-model", routes=["/v1/chat"], sampling=Sampling()),
        )

    def served(self, name: object) -> str | None:
        return "a-model" if name == "a-model" else None

    async def create(self, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({"response": "ours"})(scope, receive, send)


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"body": (await request.body()).decode()})


def application(state: State, root_path: str = "") -> FastAPI:
    app = FastAPI(root_path=root_path)
    app.state.service = state
    app.state.args = Namespace(allowed_origins=["*"], allow_credentials=False)
    for path in ("/v1/new", "/v1/hidden", "/v1/audio/transcriptions", "/tokenize"):
        app.add_route(path, echo, methods=["GET", "POST"])
    app.add_middleware(Gate)
    app.add_middleware(ApiKey)
    app.add_middleware(Refusals)
    app.add_middleware(Observe)
    return app


def ask(state: State, method: str, path: str, *, closed: bool = False, **body: Any) -> Any:
    if closed:
        state.admission.close(Overloaded("the server is full", retry_after=1))
    return TestClient(application(state)).request(method, path, **body)


@hardening(22)
@pytest.mark.parametrize(
    ("method", "path", "status", "when_closed"),
    [
        ("POST", "/v1/new", 200, 429),
        ("POST", "/v1/audio/transcriptions", 200, 429),
        ("POST", "/v1/nowhere", 404, 429),
        ("PUT", "/v1/new", 405, 429),
        ("GET", "/v1/new", 200, 200),
        ("POST", "/tokenize", 200, 200),
        ("POST", "/v1/responses/resp_1/cancel", 404, 404),
        ("POST", "/v1/responses/resp_1/new", 404, 429),
        ("POST", "/health", 405, 405),
        ("DELETE", "/", 405, 405),
        ("GET", "/v1/hidden", 404, 404),
        ("POST", "/v1/hidden", 404, 404),
        ("OPTIONS", "/", 405, 405),
        ("OPTIONS", "/v1/new", 405, 405),
        ("POST", "/v1/chat", 200, 200),
        ("GET", "/v1/chat", 404, 404),
        ("POST", "/", 200, 200),  # whose handler asks the queue
    ],
)
def test_what_may_generate_passes_the_queue(
    method: str, path: str, status: int, when_closed: int
) -> None:
    assert ask(State(), method, path).status_code == status
    closed = ask(State(), method, path, closed=True)
    assert closed.status_code == when_closed
    assert ("retry-after" in closed.headers) == (when_closed == 429)


@hardening(1)
def test_limits_hold_on_routes_that_nobody_knows() -> None:
    assert ask(State(), "POST", "/v1/new", json={"n": 65}).status_code == 422
    assert ask(State(), "POST", "/v1/new", json={"n": 2}).json() == {"body": '{"n":2}'}


def test_files_pass_where_no_cache_is_kept_per_key() -> None:
    files = {"file": b"sound"}
    path = "/v1/audio/transcriptions"
    assert "sound" in ask(State(), "POST", path, files=files).json()["body"]
    refused = ask(State(cache_per_key=True), "POST", path, files=files)
    assert refused.status_code == 422 and "takes no forms" in refused.text


@hardening(18)
def test_each_key_has_a_cache_of_its_own_on_every_route() -> None:
    shared = ask(State(), "POST", "/v1/new", json={"prompt": "hi"}).json()["body"]
    assert shared == '{"prompt":"hi"}' and not Settings().cache_per_key
    body = ask(State(cache_per_key=True), "POST", "/v1/new", json={"prompt": "hi"}).json()["body"]
    assert body == '{"prompt":"hi","cache_salt":"anonymous"}'


def test_a_page_of_another_site_may_post() -> None:
    answer = ask(State(), "POST", "/", headers={"origin": "http://elsewhere"})
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("service", "reason"),
    [
        (None, "this model does not generate text"),
        (State(), "the application fails: AttributeError"),
    ],
)
def test_a_start_that_fails_is_reported_and_ends(service: State | None, reason: str) -> None:
    """uvicorn would take an exception for an application without a lifespan, and serve on."""
    reports: list[str] = []
    app = application(State())
    app.state.args.chat_service = (None, SimpleNamespace(report_failure=reports.append))
    if service is None:
        del app.state.service
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    asyncio.run(Gate(app)({"type": "lifespan", "app": app}, receive, send))
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
    assert len(reports) == 1 and reports[0].startswith(reason)


# The prefix that we know of, and the one of the path that reaches us.
PREFIXES = [("", ""), ("/prefix", "/prefix"), ("/prefix", "")]


@pytest.mark.parametrize(("root_path", "kept"), PREFIXES)
def test_behind_a_proxy_the_same_paths_need_no_key(root_path: str, kept: str) -> None:
    state = State()
    state.keys = Keys({}, None)
    client = TestClient(application(state, root_path))
    assert client.get(f"{kept}/health/live").json() == {"status": "alive"}
    for slash in ("/", ""):
        page = client.get(f"{kept}{slash}", headers={"accept": "text/html"})
        assert page.status_code == 200 and "<!doctype html>" in page.text
        assert client.post(f"{kept}{slash}").status_code == 401
    assert client.get(f"{kept}/v1/new").status_code == 401


@pytest.mark.parametrize(("root_path", "kept"), PREFIXES)
def test_behind_a_proxy_a_request_counts_for_its_route(root_path: str, kept: str) -> None:
    def count(route: str, status: int) -> float:
        labels = {"route": route, "status": str(status)}
        return REGISTRY.get_sample_value("service_requests_total", labels) or 0.0

    for keys, status in ((None, 200), (Keys({}, None), 401)):
        state = State()
        state.keys = keys
        client = TestClient(application(state, root_path))
        for route in ("/", "/v1/new"):
            before = count(route, status)
            assert client.post(kept + route).status_code == status
            assert count(route, status) == before + 1, route


@pytest.mark.parametrize(("root_path", "kept"), PREFIXES)
@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("/v1/new/", "/v1/new"),
        ("/v1/new/?a=%2F&b", "/v1/new?a=%2F&b"),
        ("/folder", "/folder/"),
        ("/folder?a=b", "/folder/?a=b"),
    ],
)
def test_a_redirect_is_right_for_the_client_of_a_proxy(
    root_path: str, kept: str, path: str, right: str
) -> None:
    app = application(State(), root_path)
    app.add_route("/folder/", echo, methods=["GET", "POST"])
    client = TestClient(app, headers={"host": "inside", "x-forwarded-proto": "https"})
    answer = client.post(kept + path, follow_redirects=False)
    assert answer.status_code == 307
    seen = f"https://outside/llm{path}"  # the address as the client has it
    assert urljoin(seen, answer.headers["location"]) == f"https://outside/llm{right}"


def test_head_is_answered_wherever_get_is() -> None:
    app = application(State())
    app.add_api_route("/v1/got", lambda: {"a": 1}, methods=["GET"])
    app.add_api_route("/v1/made", lambda: {"a": 1}, methods=["POST"])
    client = TestClient(app)
    for path in ("/v1/got", "/v1/new", "/v1/made", "/v1/nowhere", "/openapi.json", "/docs"):
        got, head = client.get(path), client.head(path)
        assert head.status_code == got.status_code, path
        assert head.content == b"" or head.is_error, path
        assert head.headers.get("content-type") == got.headers.get("content-type"), path


@hardening(13)
@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/messages", {"x-api-key": "k"}, 200),
        ("/v1/messages", {"x-api-key": "k", "authorization": "Bearer other"}, 200),
        ("/v1/messages", {"x-api-key": "other", "authorization": "Bearer k"}, 200),
        ("/v1/messages/count_tokens", {"x-api-key": "k"}, 200),
        ("/v1/models", {"x-api-key": "k"}, 200),
        ("/v1/models/a-model", {"X-Api-Key": " k "}, 200),
        ("/v1/messages", {"x-api-key": "other"}, 401),
        ("/v1/messages", {"x-api-key": ""}, 401),
        ("/v1/messages", {"api-key": "k"}, 401),
        ("/v1/messages?x-api-key=k", {}, 401),
        ("/v1/new", {"x-api-key": "k"}, 401),  # it is no route of Anthropic's
        ("/", {"x-api-key": "k"}, 401),
    ],
)
@pytest.mark.parametrize("prefix", ["", "/prefix"])
def test_anthropics_clients_send_the_key_in_their_header(
    prefix: str, path: str, headers: dict[str, str], status: int
) -> None:
    state = State()
    state.keys = Keys({clients.digest(b"k"): Client("alice")}, None)
    app = application(state, prefix)
    for route in ("/v1/messages", "/v1/messages/count_tokens", "/v1/models", "/v1/models/a-model"):
        app.add_route(route, echo, methods=["POST"])
    answer = TestClient(app).post(prefix + path, headers=headers)
    assert answer.status_code == status
    named = "or `x-api-key`" in answer.text
    assert named == (status == 401 and "/v1/m" in path)
