"""The front of a cluster over replicas that are lost, hang, are full or wait: no Ray, no engine."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import yaml

from service.cluster import environment, exchange, front
from service.cluster.exchange import BEAT, Part, Request
from service.cluster.front import FrontApplication, ReplicaLost
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
        self.asked = 0

    def answer(self, model: str, request: Request) -> Answer:
        self.asked += 1
        return self.answers.pop(0)() if len(self.answers) > 1 else self.answers[0]()

    async def metrics(self) -> list[tuple[dict[str, str], str]]:
        return []


CORS = {"allow_origins": ["https://page.example"], "allow_credentials": True}


def ask(replicas: Replicas, path: str = "/") -> httpx.Response:
    async def run() -> httpx.Response:
        app: Any = FrontApplication(replicas, Settings(queue_timeout=0.5))
        app.configure("a", {"a": "a"}, None, CORS)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            return await client.post(path, json={"prompt": "hi"})

    with mock.patch.multiple(front, _SILENCE=0.3, _PAUSE=0.01):
        return asyncio.run(run())


@pytest.mark.parametrize(
    "first",
    [
        lost_before_it_begins,
        hangs_before_it_begins,
        hangs_afterwards,
        lost_after_a_while,
        stopping,
    ],
)
def test_another_replica_answers(first: Callable[[], Answer]) -> None:
    replicas = Replicas(first, well)
    assert (ask(replicas).text, replicas.asked) == ("well", 2)


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
