"""Hostile input over real HTTP: it costs that request alone, and the answer says why, no more."""

import asyncio
import json
import math
import re
import socket
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from testing.server import Server
from tests.conftest import MODEL, PATIENCE, hardening, logged

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
HI = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": MODEL, "prompt": "hi", "max_tokens": 2}
SCORE = {"model": MODEL, "query": "a", "items": ["b"], "label_token_ids": [1]}
OUTSIDE = 99_999_999  # of every vocabulary


@pytest.fixture(autouse=True)
def still_serving(service: Server, http: httpx.Client) -> Any:
    """Whatever a test did, the next request works."""
    yield
    assert http.get("/health/generate").status_code == 200


def check_refusal(answer: httpx.Response, *statuses: int) -> str:
    """The status is one of these, and the message names no path, address or stack; returns it."""
    assert answer.status_code in statuses, answer.text[:500]
    assert len(answer.content) < 1000, answer.text[:500]
    assert "Traceback" not in answer.text and " at 0x" not in answer.text
    assert not re.search(r"/(root|home|usr|tmp|work|opt)/", answer.text)
    message = str(answer.json()["error"]["message"])
    assert message.endswith(f"(request {answer.headers['x-request-id']})")
    return message


def post(http: httpx.Client, route: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(route, content=content, headers={"content-type": "application/json"})


@hardening(1)
@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {**HI, "n": 65}),
        (COMPLETE, {**TEXT, "n": 10**9}),
        (COMPLETE, {**TEXT, "n": 10, "prompt": ["a"] * 10}),
        (COMPLETE, {**TEXT, "best_of": 1000}),
        (COMPLETE, {**TEXT, "prompt": ["a"] * 5000}),
        (COMPLETE, {**TEXT, "prompt": [[1, 2]] * 500}),
        (f"{CHAT}/batch", {**HI, "messages": [HI["messages"]] * 500}),
        ("/generative_scoring", {**SCORE, "items": ["b"] * 3000}),
        ("/invocations", {**TEXT, "n": 65}),
        ("/v1/responses", {"input": "hi", "n": 65}),
        ("/v1/messages", {**HI, "n": 65}),
    ],
)
def test_too_many_sequences_are_refused_with_the_limit(
    http: httpx.Client, route: str, body: dict[str, Any]
) -> None:
    assert " ask for 64 sequences at most " in check_refusal(post(http, route, body), 422)


@hardening(1, 4)
def test_our_route_gives_one_answer_and_takes_no_grammar(http: httpx.Client) -> None:
    body = {"prompt": "hi", "max_new_tokens": 3, "details": True}
    extra = {"n": 1000, "best_of": 1000, "structured_outputs": {"regex": "zzz"}}
    one, other = (post(http, "/", each).json() for each in (body, {**body, **extra}))
    assert other["response"] == one["response"]
    assert other["details"]["completion_tokens"] == 3


@hardening(2)
@pytest.mark.parametrize("route", ["/", CHAT, COMPLETE, "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b""),
        (400, b"{"),
        (422, b"[" * 100_000),  # more arrays than a body may hold
        (400, b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}"),
        (400, b'{"prompt": ' + b"[" * 201 + b"]" * 201 + b"}"),
        (400, b'{"model": "x", "messages": [], "metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 301),
        (400, b"\xff\xfe\x00"),
        (422, b"null"),
        (422, b"[]"),
        (422, b'"text"'),
    ],
)
def test_what_is_no_json_object_is_refused(
    http: httpx.Client, route: str, status: int, body: bytes
) -> None:
    check_refusal(post(http, route, body), status)


@hardening(2, 17, 25)
@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {**HI, "messages": ["secret" * 20] * 3000}),
        (COMPLETE, {**TEXT, "stop_token_ids": list(range(49_152, 100_000))}),
        (COMPLETE, {**TEXT, "bad_words": [f"secret{i}" for i in range(10_000)]}),
        (COMPLETE, {**TEXT, "temperature": "secret"}),
        (COMPLETE, {**TEXT, "stop": {"secret": 1}}),
        ("/", {"prompt": "hi", "stop": {"secret": 1}}),
        ("/", {"prompt": ["secret"] * 1000}),
        ("/tokenize", {"model": MODEL, "prompt": ["secret"] * 1000}),
        ("/tokenize", b'{"prompt": ' + b"[" * 100_000),
        (CHAT, {**HI, "model": "a secret\nmodel"}),
        ("/v1/responses", {"input": "hi", "previous_response_id": "resp-secret-1"}),
    ],
)
def test_errors_and_the_log_do_not_repeat_what_was_sent(
    http: httpx.Client, service: Server, route: str, body: Any
) -> None:
    assert "secret" not in check_refusal(post(http, route, body), 400, 404, 422)
    assert "secret" not in service.log.read_text()


@hardening(2)
@pytest.mark.parametrize(("length", "status"), [(b"15", 200), (b"9" * 19, 413)])
def test_a_length_with_thousands_of_zeros_is_a_length(
    service: Server, length: bytes, status: int
) -> None:
    url = httpx.URL(service.url)
    with socket.create_connection((url.host, url.port)) as client:
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        length = b"Content-Length: " + b"0" * 4400 + length
        client.sendall(head + length + b'\r\n\r\n{"prompt":"hi"}')
        assert client.recv(65_536).startswith(b"HTTP/1.1 %d " % status)


def test_what_is_refused_before_it_is_routed_counts_for_its_route(
    http: httpx.Client, service: Server
) -> None:
    answer = post(http, "/", b" " * (4 * 2**20 + 1))
    assert logged(service, f"id={answer.headers['x-request-id']} method=POST route=/ status=413")


@hardening(2)
def test_a_body_over_the_limit_is_refused(http: httpx.Client) -> None:
    for route in ("/", CHAT, "/tokenize", "/nowhere"):
        check_refusal(post(http, route, b" " * (4 * 2**20 + 1)), 413)


COUNTED = {"type": "object", "properties": {f"p{i}": {} for i in range(33)}, "maxProperties": 9}


LARGE = {f"p{i}": {"type": "string", "description": "x" * 30} for i in range(400)}
LARGE_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": LARGE}}}
PROPERTIES = "maxProperties has at most 32 properties"
CHARACTERS = "has at most 1024 characters"
WORK = "takes too long to compile"
BYTES = "has at most 16384 bytes where it becomes a grammar"


@hardening(4)
@pytest.mark.parametrize(
    ("says", "extra"),
    [
        (PROPERTIES, {"structured_outputs": {"json": COUNTED}}),
        (PROPERTIES,
         {"structured_outputs": {"json": json.dumps({"type": "array", "items": COUNTED})}}),
        (CHARACTERS, {"structured_outputs": {"regex": "(a|a|b)*" * 2000}}),
        (CHARACTERS,
         {"structured_outputs": {"json": {"type": "string", "pattern": "(x+x+)+y" * 200}}}),
        (WORK, {"structured_outputs": {"json": {"type": "string", "pattern": "(a|b){1,9999}"}}}),
        (BYTES, {"structured_outputs": {"choice": [f"c{i}" for i in range(10_000)]}}),
        (BYTES, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "enum": [f"v{i}" for i in range(5000)]}}}}),
        (BYTES, {"tools": [LARGE_TOOL], "tool_choice": "required"}),
        (BYTES, {"tools": [LARGE_TOOL],
                 "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ],
)  # fmt: skip
def test_a_grammar_has_a_size(http: httpx.Client, says: str, extra: dict[str, Any]) -> None:
    assert says in check_refusal(post(http, CHAT, {**HI, **extra}), 422)


@hardening(5)
@pytest.mark.parametrize(
    ("statuses", "grammar"),
    [
        ((400,), {"regex": "((((("}),
        ((400,), {"structural_tag": "{}"}),
        ((400,), {"json": "{"}),
        # It compiles, and nothing can be made of it.
        ((400, 500), {"grammar": "root ::= root root | root"}),
    ],
)
def test_a_bad_grammar_fails_alone(
    http: httpx.Client, statuses: tuple[int, ...], grammar: dict[str, Any]
) -> None:
    answer = post(http, COMPLETE, {**TEXT, "structured_outputs": grammar})
    check_refusal(answer, *statuses)


@hardening(4)
@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "((a{1,1000}){1,1000}){1,1000}"},
        {"json": {"type": "string", "minLength": 10**5, "maxLength": 10**7}},
    ],
)
def test_a_grammar_that_explodes_is_compiled_or_refused(
    http: httpx.Client, grammar: dict[str, Any]
) -> None:
    answer = post(http, COMPLETE, {**TEXT, "structured_outputs": grammar})
    if answer.status_code != 200:
        check_refusal(answer, 400)


@hardening(4)
def test_a_deadline_holds_while_a_grammar_is_compiled(http: httpx.Client) -> None:
    schema = {"type": "string", "minLength": 2 * 10**5, "maxLength": 10**7}
    body = {**TEXT, "structured_outputs": {"json": schema}}
    began = time.monotonic()
    answer = http.post(COMPLETE, json=body, headers={"X-Request-Timeout": "0.1"})
    check_refusal(answer, 504)
    assert time.monotonic() - began < 5


@hardening(6, 11, 12)
@pytest.mark.parametrize(
    ("route", "body"),
    [
        (CHAT, {**HI, "chat_template": "{% for i in range(10**9) %}x{% endfor %}"}),
        (CHAT, {**HI, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
        (CHAT, {**HI, "chat_template_kwargs": {"messages": [], "tokenize": True}}),
        ("/tokenize", {**HI, "chat_template": "{{ 1 }}"}),
        (COMPLETE, {**TEXT, "prompt_embeds": "AAAA"}),
        (COMPLETE, {"model": MODEL, "prompt_embeds": ["AAAA"]}),
        *(
            (
                CHAT,
                {
                    **HI,
                    "messages": [
                        {"role": "user", "content": [{"type": "text", "text": "hi"}, part]}
                    ],
                },
            )
            for part in (
                {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}},
                {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
                {"type": "video_url", "video_url": {"url": "http://169.254.169.254/"}},
                {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
            )
        ),
    ],
)
def test_templates_tensors_and_media_of_a_client_are_refused(
    http: httpx.Client, route: str, body: dict[str, Any]
) -> None:
    check_refusal(post(http, route, body), 400, 422)


@hardening(12)
@pytest.mark.parametrize("route", [CHAT, "/v1/responses", "/v1/messages", "/tokenize"])
def test_nothing_is_fetched_for_a_client(http: httpx.Client, route: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/x.png"
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
        if route == "/v1/responses":
            part = {"type": "input_image", "image_url": url}
        elif route == "/v1/messages":
            part = {"type": "image", "source": {"type": "url", "url": url}}
        turns = [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]
        body = {"model": MODEL, "max_tokens": 2, "messages": turns}
        if route == "/v1/responses":
            body = {"model": MODEL, "input": turns}
        check_refusal(post(http, route, body), 400)
        elsewhere.settimeout(0.5)
        with pytest.raises(TimeoutError):
            elsewhere.accept()


@hardening(7)
@pytest.mark.parametrize(
    "extra",
    [
        {"min_tokens": 10**6},
        {"min_tokens": -1},
        {"stop": ["x"] * 1000},
        {"stop": ["x" * 10**6]},
        {"stop": ["x" * 1001]},
        {"stop": [""]},
        {"bad_words": [f"w{i}" for i in range(10_000)]},
        {"bad_words": [""]},
        {"logit_bias": {str(OUTSIDE): 1}},
        {"logit_bias": {"-5": 1}},
        {"logit_bias": {"x": 1}},
        {"allowed_token_ids": [OUTSIDE]},
        {"allowed_token_ids": [-3]},
        {"allowed_token_ids": []},
        {"stop_token_ids": [OUTSIDE], "min_tokens": 1},
        {"stop_token_ids": [-7], "min_tokens": 1},
        {"stop_token_ids": [2**70]},
        {"logprobs": 10**5},
        {"prompt_logprobs": -1},
        {"logprobs": 1, "logprob_token_ids": [-9]},
        {"priority": -(2**70)},
        {"vllm_xargs": {"a": 2**70}},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
        {"repetition_detection": {"max_pattern_size": 2**70, "min_count": 2}},
        {"stream_interval": 2**80},
        {"stream_interval": str(2**80), "n": 2},
        {"cache_salt": "x" * 10**5},
        {"truncate_prompt_tokens": 2**62},
    ],
)
def test_extremes_of_sampling_are_refused(http: httpx.Client, extra: dict[str, Any]) -> None:
    check_refusal(post(http, COMPLETE, {**TEXT, **extra}), 400, 422)


@hardening(7)
@pytest.mark.parametrize("route", [COMPLETE, CHAT])
def test_what_is_refused_in_a_stream_is_the_clients_error_too(
    http: httpx.Client, route: str
) -> None:
    body = {**(HI if route == CHAT else TEXT), "stream": True, "stream_interval": 2**80}
    event = post(http, route, body).text.partition("\n")[0].removeprefix("data: ")
    assert json.loads(event)["error"]["code"] == 400


@hardening(8)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38, -1, "1", 1.5, None, [], {}])
@pytest.mark.parametrize(
    "key", ["temperature", "top_p", "top_k", "repetition_penalty", "max_length", "seed", "timeout"]
)
def test_numbers_are_numbers_within_bounds(http: httpx.Client, key: str, value: Any) -> None:
    answer = post(http, "/", {"prompt": "hi", "max_new_tokens": 1, key: value})
    fine = [("temperature", 1.5), ("repetition_penalty", 1.5), ("timeout", 1.5), ("seed", -1)]
    if value is None or (key, value) in [*fine, ("top_k", -1)]:
        assert answer.status_code in (200, 504)
    else:
        check_refusal(answer, 422)


@hardening(8)
@pytest.mark.parametrize(
    "value", [b"NaN", b"1e400", b"-1e400", b"1e38", b"-0.1", b'"x"', b'"1"', b"1.5"]
)
@pytest.mark.parametrize(
    "key", [b"temperature", b"top_p", b"top_k", b"presence_penalty", b"logit_bias"]
)
def test_numbers_on_vllms_routes(http: httpx.Client, key: bytes, value: bytes) -> None:
    number = b'{"5": %s}' % value if key == b"logit_bias" else value
    body = json.dumps(TEXT).encode()[:-1] + b', "%s": %s}' % (key, number)
    answer = post(http, COMPLETE, body)
    penalty = b"presence_penalty"
    within = [(b"temperature", b"1.5"), (penalty, b"1.5"), (penalty, b"-0.1")]
    # vLLM reads a string as a number, and holds a bias within -100 and 100.
    any_bias = key == b"logit_bias" and value not in (b"NaN", b'"x"')
    if value == b'"1"' or (key, value) in within or any_bias:
        assert answer.status_code == 200, answer.text
    else:
        check_refusal(answer, 400)


@hardening(9)
@pytest.mark.parametrize(
    ("prompt", "ours", "vllms"),
    [
        (b'""', 422, 400),
        (b"null", 422, 400),
        (b'["hi"]', 422, 200),  # vLLM's completions take a list
        (b'"\\ud800"', 400, 400),
        (b'" \\n\\t "', 200, 200),
        (b'"\\u0000\\u0000"', 200, 200),
        (b'"<|im_start|>system\\n<|im_end|><|endoftext|>"', 200, 200),
        (b'"' + b"x " * 500_000 + b'"', 422, 422),
        (b'"' + "好".encode() * 1_000_000 + b'"', 422, 422),
    ],
)
@pytest.mark.parametrize("route", ["/", COMPLETE])
def test_odd_prompts_have_a_defined_answer(
    http: httpx.Client, route: str, prompt: bytes, ours: int, vllms: int
) -> None:
    limit = b"max_new_tokens" if route == "/" else b"max_tokens"
    body = b'{"model": "%s", "prompt": %s, "%s": 2}' % (MODEL.encode(), prompt, limit)
    answer = post(http, route, body)
    status = ours if route == "/" else vllms
    if status == 200:
        assert answer.status_code == 200, answer.text
    else:
        said = check_refusal(answer, status)
        assert len(prompt) < 10**6 or "at most 131072 characters" in said


@hardening(9)
def test_a_prompt_as_long_as_the_context_more_or_less(http: httpx.Client) -> None:
    def tokens(words: int) -> int:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "a" + " a" * words}]}
        return int(http.post("/tokenize", json=body).json()["count"])

    longest = 2047 - tokens(0)
    assert tokens(longest) == 2047
    for words, status in ((longest - 1, 200), (longest, 200), (longest + 1, 422)):
        body = {"prompt": "a" + " a" * words, "details": True, "stop": ["\0"]}
        answer = http.post("/", json=body)
        assert answer.status_code == status, answer.text
        if status == 200:
            assert 1 <= answer.json()["details"]["completion_tokens"] <= 2048 - tokens(words)
        else:
            check_refusal(answer, 422)


@hardening(10)
def test_the_same_request_id_twice_gives_each_its_own_answer(service: Server) -> None:
    async def ask_all() -> list[str]:
        headers = {"X-Request-Id": "the-same"}
        async with httpx.AsyncClient(
            base_url=service.url, timeout=PATIENCE, headers=headers
        ) as client:
            asks = []
            for country in ("France", "Italy", "Spain", "Japan") * 4:
                prompt = f"What is the capital of {country}?"
                chat = {**HI, "messages": [{"role": "user", "content": prompt}], "max_tokens": 20}
                asks += [client.post("/", json={"prompt": prompt}), client.post(CHAT, json=chat)]
            found = []
            for answer in await asyncio.gather(*asks):
                assert answer.headers["x-request-id"] == "the-same"
                body = answer.json()
                found.append(body.get("response") or body["choices"][0]["message"]["content"])
            return found

    answers = asyncio.run(ask_all())
    cities = [city for city in ("Paris", "Rome", "Madrid", "Tokyo") * 4 for _ in range(2)]
    assert all(city in answer for city, answer in zip(cities, answers, strict=True)), answers


@hardening(12, 17, 25)
@pytest.mark.parametrize(
    "given", ["a b", "x" * 65, "../../etc", "a\tb", "héllo", "http://10.0.0.1/"]
)
def test_a_request_id_that_is_not_harmless_is_replaced(http: httpx.Client, given: str) -> None:
    headers = {b"X-Request-Id": given.encode()}
    answer = http.post("/", content=b"{", headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    check_refusal(answer, 400)


@hardening(12)
def test_dangerous_routes_are_off(http: httpx.Client) -> None:
    for route in ("/scale_elastic_ep", "/sleep", "/wake_up", "/reset_prefix_cache", "/pause",
                  "/collective_rpc", "/server_info", "/v1/load_lora_adapter"):  # fmt: skip
        check_refusal(http.post(route, json={}), 404, 405)


@hardening(12)
def test_routes_that_are_off_are_not_there(http: httpx.Client) -> None:
    routes = http.get("/", headers={"accept": "application/json"}).json()["routes"]
    assert "/v1/chat/completions" in routes
    assert not [route for route in routes if route.startswith("/inference") or "render" in route]
    assert http.head("/").status_code == 200
    allowed = http.put("/", json={}).headers["allow"]
    assert set(allowed.split(", ")) == {"GET", "HEAD", "POST"}


@hardening(2)
def test_a_body_after_an_upgrade_is_not_taken_for_a_request(service: Server) -> None:
    port = int(service.url.rpartition(":")[2])
    head = "POST / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
    head += "connection: close\r\n"
    inner = "GET /version HTTP/1.1\r\nhost: a\r\n\r\n"
    good = '{"prompt": "hi", "max_new_tokens": 1}'
    for framing, body, status in (
        (f"content-length: {len(inner)}", inner, b"400"),
        ("transfer-encoding: chunked", f"{len(inner):x}\r\n{inner}\r\n0\r\n\r\n", b"400"),
        (f"content-length: {len(good)}", good, b"200"),
    ):
        for pieces in ([head + framing + "\r\n\r\n" + body], [f"{head}{framing}\r\n\r\n", body]):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
                for piece in pieces:
                    s.sendall(piece.encode())
                    time.sleep(0.2)
                answer = b"".join(iter(lambda: s.recv(65536), b""))
            assert answer.count(b"HTTP/1.1 ") == 1 and b"0.32.0" not in answer, answer
            assert answer.startswith(b"HTTP/1.1 " + status)


@hardening(12)
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("VLLM_SERVER_DEV_MODE", "1"),
        ("VLLM_ENABLE_COHERE_API", "1"),
        ("VLLM_API_KEY", "secret"),
        ("VLLM_USE_RUST_FRONTEND", "1"),
    ],
)
def test_variables_that_undo_a_promise_end_the_start(variable: str, value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        env={variable: value, "PATH": "", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {variable} ") and ": unset it" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "secret" not in done.stderr


@hardening(16)
def test_what_listens_is_on_loopback(service: Server) -> None:
    import psutil

    top = psutil.Process(service.process.pid)
    listening = {
        connection.laddr
        for process in (top, *top.children(recursive=True))
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert ("127.0.0.1", int(service.url.rpartition(":")[2])) in listening
    assert {address.ip for address in listening} == {"127.0.0.1"}, listening


@hardening(25)
def test_nothing_of_a_client_gets_into_log_lines_or_labels(
    service: Server, http: httpx.Client
) -> None:
    http.post("/secret-path%0AFAKE", content=b"secret-body")
    http.request("SECRETMETHOD", "/")
    call = {"type": "function", "id": "c", "function": {"name": "secret", "arguments": "{"}}
    user = {"role": "user", "content": "hi"}
    part = {"type": "refusal", "refusal": None, "note": "secret"}
    summary = [{"type": "summary_text", "text": "a"}]
    item = {"type": "reasoning", "id": "r\nFAKE secret", "summary": summary}
    bodies: tuple[tuple[str, dict[str, Any]], ...] = (  # vLLM warns of each
        (
            CHAT,
            {
                **HI,
                "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}],
            },
        ),
        (CHAT, {**HI, "messages": [{"role": "assistant", "tool_calls": [call]}, user]}),
        ("/v1/responses", {"input": [item, user], "max_output_tokens": 1}),
    )
    for route, body in bodies:
        assert post(http, route, body).status_code == 200
    http.post("/", content=b"{", headers={"X-Request-Id": "fine-id"})
    assert logged(service, "id=fine-id")
    log = service.log.read_text()
    assert log.count("Please use content instead of summary") == 1 and "FAKE" not in log
    assert "secret" not in log and "SECRETMETHOD" not in log
    metrics = http.get("/metrics").text
    assert "secret" not in metrics and "SECRETMETHOD" not in metrics


# Any JSON, with the keys of the contract more often than others.
_KEYS = st.sampled_from(
    ["prompt", "history", "max_length", "max_new_tokens", "temperature", "top_p", "top_k",
     "repetition_penalty", "seed", "stop", "stream", "timeout", "details"]
)  # fmt: skip
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(_KEYS | st.text(max_size=8), inner, max_size=6)
    ),
    max_leaves=12,
)
_BODIES = st.one_of(
    st.binary(max_size=200),
    _JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(_KEYS, _JSON, max_size=6).map(
        lambda body: json.dumps({"prompt": "hi", **body, "max_new_tokens": 1}).encode()
    ),
)
_FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@hardening(8, 9)
@_FUZZ
@given(body=_BODIES)
def test_any_body_has_an_answer_in_the_contracts_form(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/", content=body)
    assert answer.status_code in (200, 400, 422, 504), (body, answer.text[:500])
    if "event-stream" in answer.headers["content-type"]:
        last = json.loads(answer.text.strip().rpartition("data: ")[2])
    else:
        last = answer.json()
    assert list(last)[:3] == ["response", "status", "time"]
    if last["status"] != 200:
        assert list(last["error"]) == ["type", "message", "param"]
        assert len(last["error"]["message"]) < 500


def test_our_routes_keep_to_their_schema(service: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    ours = schema.include(path_regex="^/(health/(live|ready|generate))?$")
    seen = []
    for found in ours.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        seen.append(f"{operation.method.upper()} {operation.path}")

        @settings(_FUZZ, max_examples=15)
        @given(case=operation.as_strategy())
        def call(case: Any) -> None:
            response = case.call(headers={"X-Request-Timeout": "2"}, timeout=PATIENCE)
            # A 504 is what the client asked for; to JSON Schema, 1.0 is an integer.
            case.validate_response(
                response, excluded_checks=[not_a_server_error, positive_data_acceptance]
            )
            assert response.status_code in (200, 400, 404, 405, 422, 504)

        call()
    health = [f"GET /health/{what}" for what in ("generate", "live", "ready")]
    assert sorted(seen) == ["GET /", *health, "POST /"]
