"""Errors over real HTTP: our own sentences for vLLM's, in the form of each route's protocol."""

import json
import time
from typing import Any

import httpx
import openai
import pytest

from service.api import vllm_errors
from testing.server import Server
from tests.conftest import MODEL, hardening

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
TURNS = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": TURNS, "max_tokens": 2},
    COMPLETE: {"model": MODEL, "prompt": "hi", "max_tokens": 2},
    RESPONSES: {"model": MODEL, "input": "hi", "max_output_tokens": 2},
    MESSAGES: {"model": MODEL, "messages": TURNS, "max_tokens": 2},
    "/tokenize": {"model": MODEL, "prompt": "hi"},
    "/detokenize": {"model": MODEL, "tokens": [1]},
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    504: "timeout_error",
}
LONG = "word " * 3000
IMAGE = {"type": "image_url", "image_url": {"url": "https://127.0.0.1/secret.png"}}
TOOL = {"type": "function", "function": {"name": "secret", "parameters": {"type": "object"}}}


def message(answer: httpx.Response, route: str) -> str:
    """The message of an error, whose form is that of the route's protocol."""
    body = answer.json()
    request_id = answer.headers["x-request-id"]
    error = body["error"]
    if route.startswith(MESSAGES):
        assert list(body) == ["type", "error", "request_id"]
        assert (body["type"], body["request_id"]) == ("error", request_id)
        assert list(error) == ["type", "message"]
        assert error["type"] == ANTHROPIC_TYPES[answer.status_code]
    else:
        assert list(body) == ["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["code"] == answer.status_code
    text = str(error["message"])
    assert text.endswith(f" (request {request_id})") and len(text) < 300, text
    assert "secret" not in answer.text
    return text


@hardening(17)
@pytest.mark.parametrize("route", BODIES)
def test_a_wrong_model_name_is_told_the_right_ones_at_once(
    http: httpx.Client, service: Server, route: str
) -> None:
    for name in ("secret", "`" + " 'secret" * 6000, "secret/" * 6000):
        began = time.monotonic()
        answer = http.post(route, json={**BODIES[route], "model": name})
        assert time.monotonic() - began < 1
        assert answer.status_code == 404
        assert f"this server has {MODEL} " in message(answer, route)
        if route not in (MESSAGES,):
            assert answer.json()["error"]["param"] == "model"
    assert "secret" not in service.log.read_text()


@hardening(7, 17)
@pytest.mark.parametrize(
    ("route", "extra", "param", "says"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, "input_tokens",
         "the prompt has 2049 tokens or more, and the model's context of 2048"),
        (COMPLETE, {"prompt": LONG}, "input_tokens", "the prompt has 2049 tokens or more"),
        (RESPONSES, {"input": LONG}, "input_tokens", "the prompt has 2049 tokens or more"),
        (MESSAGES, {"messages": [{"role": "user", "content": LONG}]}, None,
         "the prompt has 2049 tokens or more"),
        (CHAT, {"max_tokens": 5000}, "max_tokens", "are more than the model's context of 2048"),
        (CHAT, {"max_tokens": "secret"}, "max_tokens", "max_tokens must be an integer"),
        (CHAT, {"temperature": "secret"}, "temperature", "temperature must be a number"),
        (CHAT, {"temperature": -1}, "temperature", "temperature must be a number from 0 to 2"),
        (CHAT, {"top_p": 2}, "top_p", "top_p must be a number above 0, at most 1"),
        (CHAT, {"n": "secret"}, "n", "n must be an integer"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "`stream: true`"),
        (CHAT, {"logprobs": True, "top_logprobs": 100}, "logprobs", "at most 20 tokens"),
        (CHAT, {"tools": [TOOL]}, None, "engine.tool_call_parser"),
        (CHAT, {"tools": []}, "tools", "tools must be an array of at least one tool"),
        (CHAT, {"tool_choice": "secret", "tools": [TOOL]}, "tool_choice", "tool_choice must be"),
        (CHAT, {"chat_template": "{{ secret }}"}, None, "chat_template is the server's own"),
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, None, "text only"),
        (COMPLETE, {"suffix": "secret"}, "suffix", "suffix is not supported by this server"),
        (COMPLETE, {"prompt": [99_999_999]}, None, "not in the model's vocabulary"),
        (COMPLETE, {"stop_token_ids": [99_999_999]}, "stop_token_ids",
         "not in the model's vocabulary"),
        (COMPLETE, {"logit_bias": {"secret": 1}}, "logit_bias", "logit_bias "),
        (COMPLETE, {"stop": ["secret"] * 17}, "stop", "stop has at most 16 items"),
        (CHAT, {"stop": ["secret"] * 17}, "stop", "stop has at most 16 items"),
        (MESSAGES, {"stop_sequences": ["secret"] * 17}, None, "has at most 16 items"),
        (COMPLETE, {"bad_words": {"secret": 1}}, "bad_words", "bad_words must be an array"),
        (RESPONSES, {"previous_response_id": "resp_secret"}, None,
         "there is no response of this id"),
        ("/detokenize", {"tokens": ["secret"]}, "tokens", "tokens"),
        ("/tokenize", {"prompt": {"secret": 1}}, "prompt", "prompt must be a string"),
        ("/tokenize", {"model": 1}, "model", "model must be a string"),
    ],
)  # fmt: skip
def test_an_error_says_what_to_do_in_our_words(
    http: httpx.Client,
    service: Server,
    route: str,
    extra: dict[str, Any],
    param: str | None,
    says: str,
) -> None:
    answer = http.post(route, json={**BODIES[route], **extra})
    assert answer.status_code in (400, 404, 422)
    assert says in message(answer, route), answer.text
    if route != MESSAGES:
        found = answer.json()["error"]["param"]
        assert (found or "").partition(".")[0] == (param or ""), answer.text
    assert "secret" not in service.log.read_text()


@hardening(17)
def test_patterns_run_over_the_beginning_of_a_text_alone() -> None:
    explained = vllm_errors.explain(400, {"message": "x" * 10**6}, [MODEL], ())
    assert len(explained.message) < 300
    assert vllm_errors.text({"message": "x" * 10**6}) == "x" * 1000


def test_what_is_no_json_or_no_route_is_told_so(http: httpx.Client) -> None:
    answer = http.post(COMPLETE, content=b'{"prompt": "hi"}')
    assert answer.status_code == 400
    assert "send the header `Content-Type: application/json`" in message(answer, COMPLETE)
    answer = http.get("/secret")
    assert answer.status_code == 404
    assert "GET / lists the routes" in message(answer, "/secret")
    answer = http.get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "the header Allow says" in message(answer, CHAT)


def test_our_own_refusals_take_the_form_of_the_route(http: httpx.Client) -> None:
    for route in (CHAT, MESSAGES, "/tokenize", "/nowhere"):
        answer = http.post(route, content=b" " * (4 * 2**20 + 1))
        assert answer.status_code == 413
        assert "the body is longer than" in message(answer, route)
    answer = http.post(MESSAGES, json=BODIES[MESSAGES], headers={"X-Request-Timeout": "x"})
    assert answer.status_code == 422
    message(answer, MESSAGES)
    answer = http.post("/", content=b" " * (4 * 2**20 + 1))
    assert list(answer.json()) == ["response", "status", "time", "error"]


def stream(http: httpx.Client, route: str, **body: Any) -> httpx.Response:
    headers = {"X-Request-Timeout": "1"}
    long = {"stream": True, "max_tokens": 1900, "max_output_tokens": 1900, "temperature": 2}
    return http.post(route, json={**BODIES[route], **long, **body}, headers=headers)


def test_a_stream_of_messages_ends_with_anthropics_error_event(http: httpx.Client) -> None:
    answer = stream(http, MESSAGES)
    assert (answer.status_code, answer.headers["x-accel-buffering"]) == (200, "no")
    *_, last, nothing = answer.text.split("\n\n")
    assert nothing == "" and last.startswith("event: error\ndata: ")
    body = json.loads(last.partition("data: ")[2])
    request_id = answer.headers["x-request-id"]
    assert (body["type"], body["request_id"]) == ("error", request_id)
    assert body["error"]["type"] == "timeout_error"
    assert body["error"]["message"].endswith(f"(request {request_id})")


def test_a_stream_of_responses_ends_with_openais_error_event(
    http: httpx.Client, service: Server
) -> None:
    answer = stream(http, RESPONSES)
    *_, before, last, nothing = answer.text.split("\n\n")
    assert nothing == "" and last.startswith("event: error\ndata: ")
    assert "[DONE]" not in answer.text
    number = json.loads(before.partition("data: ")[2])["sequence_number"]
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        events = list(
            client.responses.create(
                model=MODEL,
                input="Count from one to a thousand.",
                temperature=2,
                max_output_tokens=1900,
                stream=True,
                extra_headers={"X-Request-Timeout": "1"},
            )
        )
    assert json.loads(last.partition("data: ")[2])["sequence_number"] == number + 1
    error = events[-1]
    assert error.type == "error"
    assert error.code == "deadline_exceeded" and "(request " in error.message


def test_a_stream_of_chat_ends_with_openais_error(http: httpx.Client, service: Server) -> None:
    answer = stream(http, CHAT)
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Count from one to a thousand."}],
            temperature=2,
            max_tokens=1900,
            stream=True,
            extra_headers={"X-Request-Timeout": "1"},
        )
        with pytest.raises(openai.APIError, match="the time that the client allowed"):
            list(chunks)


@pytest.mark.parametrize("route", [route for route in BODIES if "tokenize" not in route])
def test_no_stream_is_kept_back_by_a_proxy(http: httpx.Client, route: str) -> None:
    answer = http.post(route, json={**BODIES[route], "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize("route", ["/health", "/ping", "/health/live", "/health/ready"])
def test_health_answers_head(http: httpx.Client, route: str) -> None:
    answer = http.head(route)
    assert (answer.status_code, answer.content) == (200, b"")
