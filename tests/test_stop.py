"""A stop string of the YAML ends the answer on every route that generates; two SIGTERMs at last."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from testing.server import Server
from tests import warm
from tests.conftest import LOOPBACK, MODEL, hardening
from tests.test_faults import check_gone, check_unavailable, in_flight, processes
from tests.test_openai import FRANCE, PARIS

# The model says " Paris", which is one token; "Paris" is another one. "<|im_start|>" is a control
# token, which no text shows.
STOPS = ["Paris", "<|im_start|>"]
BEFORE = PARIS.partition("Paris")[0]
MESSAGES = [{"role": "user", "content": FRANCE}]
TURN = f"<|im_start|>user\n{FRANCE}<|im_end|>\n<|im_start|>assistant\n"

# Route -> its body. The YAML's template, in the text of a completion, gives the same answer.
BODIES: dict[str, dict[str, Any]] = {
    "/": {"prompt": FRANCE},
    "/v1/chat/completions": {"model": MODEL, "messages": MESSAGES},
    "/v1/chat/completions/batch": {"model": MODEL, "messages": [MESSAGES]},
    "/v1/completions": {"model": MODEL, "prompt": TURN},
    "/v1/messages": {"model": MODEL, "messages": MESSAGES, "max_tokens": 64},
    "/v1/responses": {"model": MODEL, "input": FRANCE},
    "/invocations": {"model": MODEL, "messages": MESSAGES},
}
STREAMED = [route for route in BODIES if route != "/v1/chat/completions/batch"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("stop") / "log"
    settings = (
        "engine.enforce_eager=true",
        "sampling.max_tokens=2000",
        f"sampling.stop={json.dumps(STOPS)}",
    )
    with warm.Server.service(log, *(word for s in settings for word in ("--set", s))) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
        yield client


def text_of(answer: dict[str, Any]) -> str:
    """The generated text in an answer of any of these routes."""
    if "response" in answer:
        return str(answer["response"])
    if "choices" in answer:
        (choice,) = answer["choices"]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    content = answer.get("content") or answer["output"][0]["content"]
    return str(content[0]["text"])


def delta_of(event: dict[str, Any]) -> str:
    """The new text in an event of any of these streams."""
    if event.get("choices"):
        (choice,) = event["choices"]
        return str(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])
    delta = event.get("delta") if event.get("type") != "message_delta" else None
    return str(delta.get("text", "") if isinstance(delta, dict) else delta or "")


def streamed(http: httpx.Client, route: str, body: dict[str, Any]) -> str:
    text = ""
    with http.stream("POST", route, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += delta_of(json.loads(line.removeprefix("data: ")))
    return text


@pytest.mark.parametrize("route", BODIES)
def test_an_answer_ends_before_a_stop_string(http: httpx.Client, route: str) -> None:
    answer = http.post(route, json=BODIES[route])
    assert answer.status_code == 200, answer.text
    assert text_of(answer.json()) == BEFORE


@pytest.mark.parametrize("route", STREAMED)
def test_a_stream_ends_before_a_stop_string(http: httpx.Client, route: str) -> None:
    assert streamed(http, route, BODIES[route]) == BEFORE


@pytest.mark.parametrize(
    ("route", "stop"),
    [
        ("/", {"stop": "London"}),
        ("/v1/chat/completions", {"stop": ["London"]}),
        ("/v1/completions", {"stop": "London"}),
        ("/v1/messages", {"stop_sequences": ["London"]}),
    ],
)
def test_a_requests_own_stop_strings_hold_beside_the_yamls(
    http: httpx.Client, route: str, stop: dict[str, Any]
) -> None:
    assert text_of(http.post(route, json={**BODIES[route], **stop}).json()) == BEFORE
    stop = {key: [" capital"] for key in stop}
    assert text_of(http.post(route, json={**BODIES[route], **stop}).json()) == "The"


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_a_control_token_stops_too(http: httpx.Client, route: str) -> None:
    (token,) = http.post("/tokenize", json={"prompt": "<|im_start|>"}).json()["tokens"]
    body = {**BODIES[route], "logit_bias": {token: 100}, "max_tokens": 3}
    answer = http.post(route, json=body).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


def test_a_beam_search_is_answered(http: httpx.Client) -> None:
    """It asks the engine for single tokens, without their text."""
    body = {"model": MODEL, "prompt": TURN, "use_beam_search": True, "n": 2, "max_tokens": 8}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"].startswith(BEFORE)


@hardening(21)
def test_a_second_sigterm_answers_everyone_and_ends_at_once(server: Server) -> None:
    children = processes(server)
    with in_flight(server) as answers:
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while LOOPBACK.get(f"{server.url}/health/ready").json()["status"] != "draining":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not answers  # they go on
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
    check_unavailable(answers, "the server is stopping")
    check_gone(server, children, 0)
    assert time.monotonic() - began < 10  # SERVICE_DRAIN_TIMEOUT is 30
