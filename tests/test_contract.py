"""POST / over real HTTP: the tutorials' clients, every request key, every refusal."""

import asyncio
import json
import re
import subprocess
import time
from typing import Any

import httpx
import pytest
import requests

from testing.server import Server
from tests.conftest import MODEL, PATIENCE

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
COUNTRIES = "France Italy Spain Japan Germany Egypt Greece Russia China India".split()


def ask(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


@pytest.mark.parametrize("header", [["-H", "Content-Type: application/json"], []])
def test_the_tutorials_curl(service: Server, header: list[str]) -> None:
    body = json.dumps({"prompt": FRANCE})
    done = subprocess.run(
        ["curl", "-s", "-X", "POST", service.url, *header, "-d", body], capture_output=True
    )
    assert re.fullmatch(
        r'\{"response": "The capital of France is Paris\.", "status": 200, '
        r'"time": "\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"\}',
        done.stdout.decode(),
    )


def test_the_tutorials_requests_client(service: Server) -> None:
    def get_completion(prompt: str) -> Any:
        headers = {"Content-Type": "application/json"}
        data = {"prompt": prompt}
        response = requests.post(url=service.url, headers=headers, data=json.dumps(data))
        return response.json()["response"]

    assert get_completion(FRANCE) == PARIS


def test_text_is_utf8_and_not_escaped(http: httpx.Client) -> None:
    answer = http.post("/", json={"prompt": "你好", "history": [["早上好", "你好😀"]]})
    assert answer.headers["content-type"] == "application/json"
    assert '[["早上好", "你好😀"], ["你好", "' in answer.content.decode()


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_a_body_may_be_in_any_encoding_that_the_tutorials_server_reads(
    http: httpx.Client, codec: str
) -> None:
    turns = [{"role": "user", "content": "你好"}]
    for route, body in {
        "/": {"prompt": "你好", "history": [], "max_new_tokens": 1},
        "/tokenize": {"model": MODEL, "prompt": "你好"},
        "/v1/chat/completions": {"model": MODEL, "messages": turns, "max_tokens": 1},
        "/v1/messages": {"model": MODEL, "messages": turns, "max_tokens": 1},
    }.items():
        content = json.dumps(body, ensure_ascii=False).encode(codec)
        answer = http.post(route, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        if route == "/":
            assert answer.json()["history"][0][0] == "你好"


@pytest.mark.parametrize(
    "body",
    ['{"prompt": "你好"}'.encode("gbk"), "\ufeff{}".encode("utf-16")[:-1], b"{\xed\xa0\x80}"],
)
@pytest.mark.parametrize("route", ["/", "/tokenize", "/v1/chat/completions"])
def test_a_body_in_another_encoding_is_told_so(http: httpx.Client, route: str, body: bytes) -> None:
    answer = http.post(route, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is not UTF-8 text (byte ")


def test_history_comes_back_with_the_turn_in_the_form_it_came_in(http: httpx.Client) -> None:
    pairs = [[FRANCE, PARIS]]
    as_pairs = ask(http, prompt="And of Italy?", history=pairs, max_new_tokens=16)
    assert as_pairs["history"] == [*pairs, ["And of Italy?", as_pairs["response"]]]
    messages = [
        {"role": "user", "content": FRANCE, "metadata": ""},
        {"role": "assistant", "content": PARIS},
    ]
    as_messages = ask(http, prompt="And of Italy?", history=messages, max_new_tokens=16)
    assert as_messages["history"] == [
        *messages,
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": as_messages["response"]},
    ]
    assert as_pairs["response"] == as_messages["response"]
    assert "Rome" in as_pairs["response"]
    assert list(as_pairs) == ["response", "status", "time", "history"]
    assert ask(http, prompt=FRANCE, history=[])["history"] == [[FRANCE, PARIS]]


def test_the_request_comes_before_the_yaml_and_the_yaml_before_vllm(http: httpx.Client) -> None:
    assert ask(http, prompt=FRANCE, details=True)["details"] == {
        "model": MODEL,
        "finish_reason": "stop",
        "prompt_tokens": 16,
        "completion_tokens": 8,
        "sampling": {"temperature": 0.0, "repetition_penalty": 1.1, "max_tokens": 512},
    }
    asked = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "repetition_penalty": 1.3, "seed": 7}
    details = ask(http, prompt=FRANCE, details=True, stop="\n", max_new_tokens=9, **asked)[
        "details"
    ]
    assert details["sampling"] == {**asked, "stop": "\n", "max_tokens": 9}


@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
def test_the_length_limit_is_kept(http: httpx.Client, name: str) -> None:
    details = ask(http, prompt="Tell me a story.", details=True, **{name: 5})["details"]
    assert (details["completion_tokens"], details["finish_reason"]) == (5, "length")


def test_a_limit_beyond_the_context_is_cut_to_the_room_left(http: httpx.Client) -> None:
    details = ask(http, prompt=FRANCE, details=True, max_length=10**6)["details"]
    assert details["sampling"]["max_tokens"] == 2048 - 16


def test_the_same_seed_gives_the_same_answer(http: httpx.Client) -> None:
    def story(seed: int) -> object:
        return ask(http, prompt="Tell me a story.", temperature=1, seed=seed, max_length=24)[
            "response"
        ]

    assert story(1) == story(1) != story(2)


def test_the_answer_ends_before_a_stop_string(http: httpx.Client) -> None:
    assert ask(http, prompt=FRANCE, stop=[" Paris", "London"])["response"] == (
        "The capital of France is"
    )


def test_a_stream_is_deltas_and_then_the_ordinary_answer(http: httpx.Client) -> None:
    body = {"prompt": FRANCE, "stream": True, "history": [], "details": True}
    with http.stream("POST", "/", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *deltas, last = events(answer.read().decode())
    assert len(deltas) > 1  # what is ready together is one
    assert "".join(delta.pop("delta") for delta in deltas) == last["response"] == PARIS
    assert not any(deltas)
    assert list(last) == ["response", "status", "time", "history", "details"]
    assert last["details"]["completion_tokens"] == 8


def test_a_plain_answer_is_the_streamed_one_also_where_a_character_is_cut(
    http: httpx.Client,
) -> None:
    # The model's tokens for these are single bytes: a limit falls inside of characters.
    body = {"prompt": "Repeat after me: 你好😀, 你好😀", "history": [["你好😀", "你好😀你好😀"]]}
    answers = set()
    for limit in range(1, 13):
        plain = ask(http, **body, max_new_tokens=limit)["response"]
        stream = http.post("/", json={**body, "max_new_tokens": limit, "stream": True})
        *deltas, last = events(stream.text)
        assert "".join(delta["delta"] for delta in deltas) == last["response"] == plain
        assert "\ufffd" not in plain
        answers.add(plain)
    assert 2 < len(answers) < 12  # some limits add no whole character


def test_a_client_that_leaves_frees_the_engine(http: httpx.Client) -> None:
    long = {"prompt": "Count from one to a thousand.", "temperature": 2, "max_new_tokens": 1900}
    with http.stream("POST", "/", json={**long, "stream": True}) as answer:
        next(answer.iter_raw())
    with pytest.raises(httpx.ReadTimeout):
        http.post("/", json=long, timeout=0.5)
    deadline = time.monotonic() + PATIENCE
    while 'num_requests_running{engine="0",model_name="smollm2-135m-instruct"} 0.0' not in (
        metrics := http.get("/metrics").text
    ):
        assert time.monotonic() < deadline, metrics
        time.sleep(0.1)
    assert 'service_requests_total{route="/",status="499"} 2.0' in metrics


LONG = "word " * 3000
REFUSALS = {
    "no body": (b"", 400, "malformed_body", None),
    "not JSON": (b"prompt=hi", 400, "malformed_body", None),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, "malformed_body", None),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', 400, "malformed_body", None),
    "too deep": (b"[" * 10_000, 400, "malformed_body", None),
    "not an object": (b"[]", 422, "invalid_request", None),
    "no prompt": (b"{}", 422, "invalid_request", "prompt"),
    "null prompt": (b'{"prompt": null}', 422, "invalid_request", "prompt"),
    "empty prompt": (b'{"prompt": ""}', 422, "invalid_request", "prompt"),
    "number for a prompt": (b'{"prompt": 1}', 422, "invalid_request", "prompt"),
    "list for a prompt": (b'{"prompt": ["hi"]}', 422, "invalid_request", "prompt"),
    "text for a number": (b'"temperature": "hot"', 422, "invalid_request", "temperature"),
    "not a number": (b'"temperature": NaN', 422, "invalid_request", "temperature"),
    "too hot": (b'"temperature": 2.1', 422, "invalid_request", "temperature"),
    "top_p of zero": (b'"top_p": 0', 422, "invalid_request", "top_p"),
    "top_k below -1": (b'"top_k": -2', 422, "invalid_request", "top_k"),
    "half a top_k": (b'"top_k": 1.5', 422, "invalid_request", "top_k"),
    "no penalty": (b'"repetition_penalty": 0', 422, "invalid_request", "repetition_penalty"),
    "no tokens": (b'"max_length": 0', 422, "invalid_request", "max_length"),
    "true for a number": (b'"max_new_tokens": true', 422, "invalid_request", "max_new_tokens"),
    "huge seed": (b'"seed": 99999999999999999999', 422, "invalid_request", "seed"),
    "empty stop": (b'"stop": [""]', 422, "invalid_request", "stop"),
    "half a pair": (b'"history": [["hi"]]', 422, "invalid_request", "history"),
    "unknown role": (
        b'"history": [{"role": "wizard", "content": "hi"}]',
        422,
        "invalid_request",
        "history",
    ),
    "a number that no answer can hold": (
        b'"history": [{"role": "user", "content": "hi", "x": 1e400}]',
        422,
        "invalid_request",
        "history",
    ),
    "text for a flag": (b'"stream": "yes"', 422, "invalid_request", "stream"),
    "longer than the context": (
        json.dumps({"prompt": LONG}).encode(),
        422,
        "prompt_too_long",
        "prompt",
    ),
    "longer than the context, streamed": (
        json.dumps({"prompt": LONG, "stream": True}).encode(),
        422,
        "prompt_too_long",
        "prompt",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_request_is_refused_in_the_contracts_form(http: httpx.Client, case: str) -> None:
    body, status, kind, param = REFUSALS[case]
    if body.startswith(b'"'):
        body = b'{"prompt": "hi", ' + body + b"}"
    answer = http.post("/", content=body)
    parsed = answer.json()
    message = parsed["error"].pop("message")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", parsed.pop("time"))
    assert (answer.status_code, parsed) == (
        status,
        {"response": "", "status": status, "error": {"type": kind, "param": param}},
    )
    assert 10 < len(message) < 250
    assert LONG[:20] not in message


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "a"), ("assistant", "b\n\n c ")],
        [("user", ""), ("assistant", "")],
        [("system", "Be kind."), ("user", "a"), ("assistant", "b")],
        [("system", "x-anthropic-billing-header: cch=1;\nBe kind.")],  # vLLM drops the first line
        [("user", "<|im_end|>"), ("assistant", "<|im_" + "end|> \u2028 鲲鹏 \U0001f40b")],
        [("assistant", "{{ 1 / 0 }}"), ("user", "{% endfor %}")],
        [("user", "word " * 900)],
    ],
)
def test_turns_become_the_tokens_that_vllms_chat_route_makes(
    http: httpx.Client, turns: list[tuple[str, str]]
) -> None:
    history = [{"role": role, "content": content} for role, content in turns]
    messages = [*history, {"role": "user", "content": "hi"}]
    theirs = http.post("/tokenize", json={"messages": messages}).json()
    ours = ask(http, prompt="hi", history=history, max_new_tokens=1, details=True)
    assert ours["details"]["prompt_tokens"] == theirs["count"]


def test_the_prompt_may_fill_the_context_but_for_one_token(http: httpx.Client) -> None:
    frame = ask(http, prompt="a", details=True, max_length=1)["details"]["prompt_tokens"] - 1
    fits = ask(http, prompt="a" + " a" * (2046 - frame), details=True)["details"]
    assert (fits["prompt_tokens"], fits["completion_tokens"]) == (2047, 1)
    assert http.post("/", json={"prompt": "a" + " a" * (2047 - frame)}).status_code == 422
    assert http.post("/", json={"prompt": "a" + " a" * (2048 - frame)}).status_code == 422


def test_two_hundred_clients_each_get_their_own_answer(service: Server) -> None:
    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=PATIENCE, trust_env=False) as client:
            return await asyncio.gather(
                *(
                    client.post(service.url, json={"prompt": f"What is the capital of {country}?"})
                    for country in COUNTRIES * 20
                )
            )

    for answer, country in zip(asyncio.run(ask_all()), COUNTRIES * 20, strict=True):
        assert answer.status_code == 200
        named = [other for other in COUNTRIES if other in answer.json()["response"]]
        assert named == [country]


def test_the_openapi_schema_describes_the_contract(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert schema["info"]["title"] == "vllm-chat-service"
    operation = schema["paths"]["/"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"]
    assert {"400", "401", "422", "500", "503"} <= set(operation["responses"])


def test_the_page_of_the_schema_brings_its_scripts(http: httpx.Client) -> None:
    page = http.get("/docs").text
    assets = re.findall(r'<script src="([^"]+)"|rel="stylesheet" href="([^"]+)"', page)
    assert len(assets) == 2
    for asset in map("".join, assets):
        assert asset.startswith("/") and http.get(asset).status_code == 200
