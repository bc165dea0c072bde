"""The front of a cluster over replicas that are lost, hang, are full or wait: no Ray, no engine."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import httpx
import pytest
import yaml
from prometheus_client import REGISTRY

from service import clients
from service.api import body_budget
from service.cluster import environment, exchange, relay
from service.cluster.exchange import BEAT, Part, Request
from service.cluster.front import FrontApplication
from service.cluster.relay import ReplicaLost
from service.errors import WaitedTooLong, refusal_body
from service.settings import Settings

Answer = AsyncGenerator[Part | None, None]
KUBERNETES = Path(__file__).parent.parent / "kubernetes"


def part(text: str, status: int | None = 200, *, more: bool = False) -> Part:
    kind = b"text/event-stream" if text.startswith("data") else b"application/json"
    headers = ((b"content-type", kind),) if status else ()
    return Part(status, headers, text.encode(), more)


async def well() -> Answer:
    yield None
    yield part("well")


async def lost_before_it_begins() -> Answer:
    raise ReplicaLost
    yield


async def hangs_before_it_begins() -> Answer:
    await asyncio.sleep(60)
    yield None


async def hangs_afterwards() -> Answer:
    yield None
    await asyncio.sleep(60)


async def lost_after_a_while() -> Answer:
    yield None
    for _ in range(3):  # longer than a request may wait
        await asyncio.sleep(0.2)
        yield BEAT
    raise ReplicaLost


async def beats_for_long() -> Answer:
    yield None
    for _ in range(30):
        await asyncio.sleep(0.1)
        yield BEAT
    yield part("late")


async def lost_after_its_head() -> Answer:
    yield None
    yield Part(200, ((b"content-type", b"text/event-stream"),), b"", True)
    yield BEAT
    raise ReplicaLost


async def sends_its_head_first() -> Answer:
    yield None
    yield Part(201, ((b"content-type", b"text/plain"),), b"", True)
    yield BEAT
    yield Part(None, (), b"a", True)
    yield Part(None, (), b"b", False)


async def lost_in_a_stream() -> Answer:
    yield None
    yield part('data: {"delta": "a"}\n\n', more=True)
    raise ReplicaLost


async def lost_when_done() -> Answer:
    yield None
    yield part("well")
    raise ReplicaLost


async def stopping() -> Answer:
    yield None
    yield part('{"error": {"message": "the server is stopping"}}', 503)


async def has_let_it_wait() -> Answer:
    error = WaitedTooLong("it waited 60 s in the queue, which is the limit", retry_after=3)
    yield None
    yield part(refusal_body(error, "id", "/v1/messages").decode(), 503)


class Replicas:
    """Answers with the next of `answers`, and then always with the last."""

    def __init__(self, *answers: Callable[[], Answer]) -> None:
        self.answers = list(answers)
        self.requests: list[Request] = []

    @property
    def asked(self) -> int:
        return len(self.requests)

    def answer(self, model: str, request: Request) -> Answer:
        self.requests.append(request)
        return self.answers.pop(0)() if len(self.answers) > 1 else self.answers[0]()

    async def metrics(self) -> list[tuple[dict[str, str], str]]:
        return []


CORS = {"allow_origins": ["https://page.example"], "allow_credentials": True}


NONE: Mapping[str, Any] = MappingProxyType({})
KEYS = {clients.digest(b"key-of-anna"): clients.Client("anna")}


def ask(
    replicas: Replicas,
    path: str = "/",
    body: Mapping[str, Any] = NONE,
    *,
    headers: Mapping[str, str] = NONE,
    queue_timeout: float = 0.5,
    silence: float = 0.3,
    keys: Mapping[str, clients.Client] | None = None,
) -> httpx.Response:
    async def run() -> httpx.Response:
        app: Any = FrontApplication(replicas, Settings(queue_timeout=queue_timeout))
        app.configure("a", {"a": "a"}, keys, CORS, ["/v1/chat"])
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.post(path, json={"prompt": "hi", **body}, headers=headers)

    with mock.patch.multiple(relay, _SILENCE=silence, _PAUSE=0.01, BEAT_SECONDS=0.1):
        return asyncio.run(run())


@pytest.mark.parametrize(
    "first",
    [
        lost_before_it_begins,
        hangs_before_it_begins,
        hangs_afterwards,
        lost_after_a_while,
        lost_after_its_head,
        stopping,
    ],
)
def test_another_replica_answers(first: Callable[[], Answer]) -> None:
    replicas = Replicas(first, well)
    assert (ask(replicas).text, replicas.asked) == ("well", 2)


def test_a_replica_that_hangs_leaves_another_time_to_begin() -> None:
    replicas = Replicas(hangs_before_it_begins, well)
    assert ask(replicas, queue_timeout=2, silence=60).text == "well"


def test_an_answer_has_the_head_that_came_before_it() -> None:
    response = ask(Replicas(sends_its_head_first))
    assert (response.status_code, response.text) == (201, "ab")
    assert response.headers["content-type"] == "text/plain"


def test_what_was_answered_is_not_asked_again() -> None:
    replicas = Replicas(lost_when_done, well)
    assert (ask(replicas).text, replicas.asked) == ("well", 1)


def test_a_stream_that_is_lost_ends_with_an_event() -> None:
    replicas = Replicas(lost_in_a_stream, well)
    events = [json.loads(text) for text in re.findall("^data: (.*)$", ask(replicas).text, re.M)]
    assert (events[0], events[-1]["status"], replicas.asked) == ({"delta": "a"}, 503, 1)


def test_a_request_that_ends_replicas_does_not_get_them_all() -> None:
    replicas = Replicas(lost_after_a_while)
    assert (ask(replicas).status_code, replicas.asked) == (503, 2)


def test_a_request_waits_for_a_replica_as_long_as_any_may() -> None:
    response = ask(Replicas(lost_before_it_begins))
    assert (response.status_code, response.json()["error"]["type"]) == (503, "waited_too_long")


def test_who_has_waited_does_not_wait_again_at_another() -> None:
    replicas = Replicas(has_let_it_wait, well)
    response = ask(replicas, "/v1/messages")
    assert (response.status_code, replicas.asked) == (503, 1)


@pytest.mark.parametrize(
    ("headers", "body"), [({"x-request-timeout": "0.2"}, {}), ({}, {"timeout": 0.2})]
)
def test_a_deadline_passes_while_there_is_no_replica(
    headers: Mapping[str, str], body: Mapping[str, Any]
) -> None:
    replicas = Replicas(lost_before_it_begins)
    response = ask(replicas, "/", body, headers=headers, queue_timeout=600)
    assert (response.status_code, response.json()["error"]["type"]) == (504, "deadline_exceeded")


def test_a_deadline_passes_at_a_replica_that_does_not_keep_it() -> None:
    response = ask(Replicas(beats_for_long), headers={"x-request-timeout": "0.2"})
    assert (response.status_code, response.json()["error"]["type"]) == (504, "deadline_exceeded")


def test_a_replica_is_told_the_time_that_is_left() -> None:
    replicas = Replicas(lost_after_a_while, well)
    assert ask(replicas, headers={"x-request-timeout": "600"}).text == "well"
    left = min(float(v) for name, v in replicas.requests[1].headers if name == b"x-request-timeout")
    assert left <= 599.4  # the first had it for 0.6 s


def test_a_route_that_answers_like_the_contract_is_refused_like_it() -> None:
    counted = metric("service_requests_total", route="/", status="404")
    response = ask(Replicas(well), "/v1/chat", {"model": "b"})
    assert (response.status_code, response.json()["response"]) == (404, "")
    assert metric("service_requests_total", route="/", status="404") == counted + 1
    events = re.findall("^data: (.*)$", ask(Replicas(lost_in_a_stream), "/v1/chat").text, re.M)
    assert json.loads(events[-1])["response"] == ""  # no [DONE]


def test_an_empty_name_is_none_for_vllm_and_unknown_to_the_contract() -> None:
    assert ask(Replicas(well), "/v1/completions", {"model": ""}).text == "well"
    assert ask(Replicas(well), "/", {"model": ""}).status_code == 404


def test_a_body_that_is_too_small_to_cost_much_is_not_checked() -> None:
    key = "k" * (body_budget.MAX_KEY_BYTES + 1)
    assert ask(Replicas(well), "/", {key: 1}).text == "well"
    assert ask(Replicas(well), "/", {key: "x" * 5000}).status_code == 422


def test_what_the_front_refuses_is_logged_and_counted_for_its_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    headers = {"authorization": "Bearer key-of-anna"}
    with caplog.at_level(logging.INFO, "service"):
        response = ask(Replicas(well), "/", {"model": "b"}, headers=headers, keys=KEYS)
    assert response.status_code == 404
    (line,) = caplog.messages
    assert "client=anna method=POST route=/ status=404 error=not_found" in line
    assert metric("service_client_requests_total", client="anna", model="", status="404") == 1


@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_is_counted_once(begun: bool) -> None:
    """By the replica, once it has begun."""
    left = asyncio.Event()

    async def hangs() -> Answer:
        if begun:
            yield None
        left.set()
        await asyncio.sleep(600)
        yield None

    async def run() -> None:
        app = FrontApplication(Replicas(hangs), Settings())
        app.configure("a", {"a": "a"}, None, CORS)
        messages = [{"type": "http.request", "body": b"{}"}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b""}
        await app({**scope, "headers": [(b"content-length", b"2")]}, receive, send)

    counted = metric("service_requests_total", route="/", status="499")
    asyncio.run(run())
    assert metric("service_requests_total", route="/", status="499") - counted == (not begun)


def test_the_first_retry_is_an_increase() -> None:
    FrontApplication(Replicas(), Settings()).configure("new", {"new": "new"}, None, CORS)
    assert REGISTRY.get_sample_value("service_front_retries_total", {"model": "new"}) == 0


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0


def test_an_application_that_fails_in_its_answer_does_not_look_complete() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        raise ZeroDivisionError

    async def parts() -> list[Part | None]:
        request = Request("POST", "/", b"", (), None, b"")
        return [part async for part in exchange.answer(application, request)]

    with pytest.raises(ZeroDivisionError):
        asyncio.run(parts())


def test_kubernetes_has_the_environment_of_ray() -> None:
    documents = yaml.safe_load_all((KUBERNETES / "ray-service.yaml").read_text())
    (data,) = (
        document["data"]
        for document in documents
        if document["metadata"]["name"] == "chat-service-ray-environment"
    )
    assert data | {"RAY_AUTH_MODE": "token"} == environment.VARIABLES


@pytest.mark.parametrize(("method", "path"), [("POST", "/"), ("GET", "/health/live")])
def test_a_page_elsewhere_may_read_what_the_front_answers_itself(method: str, path: str) -> None:
    async def run(origin: str) -> httpx.Response:
        app: Any = FrontApplication(Replicas(well), Settings())
        app.configure("a", {"a": "a"}, None, CORS)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            body = {"prompt": "hi", "model": "b"} if method == "POST" else None
            return await client.request(method, path, json=body, headers={"origin": origin})

    response = asyncio.run(run("https://page.example"))
    assert response.status_code == (404 if method == "POST" else 200)
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    assert response.headers["access-control-allow-credentials"] == "true"
    response = asyncio.run(run("https://other.example"))
    assert "access-control-allow-origin" not in response.headers
