"""No body stalls the server or eats its memory: measured on every route of the real one that
reads a body, under a limit of memory."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from testing.server import Server
from tests import warm
from tests.conftest import MODEL, hardening

MAX_BODY = 4 * 2**20
MAX_DELAY = 0.25  # seconds that /health/live may wait
MAX_GROWTH = 150e6  # bytes of the API process
ADDRESS_SPACE = 2 * 2**30  # bytes that it may still take, above what it has when it is ready

# As those of models that call tools: it writes them as JSON, in many lines.
TEMPLATE = (
    "{{ tools | tojson(indent=4) if tools }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
)

HI: dict[str, Any] = {
    "model": MODEL,
    "prompt": "hi",
    "messages": [{"role": "user", "content": "hi"}],
    "input": "hi",
    "tokens": [1, 2],
    "query": "a",
    "items": ["b"],
    "max_tokens": 1,
    "max_new_tokens": 1,
    "max_output_tokens": 1,
}
# Small pieces that a body repeats; the second half are right somewhere.
PIECES = [
    b"{}", b"[]", b"0", b"1e5", b'""', b"null", b"[[]]", b'{"a":{}}', b'["",""]', b'"/a"',
    b'["a","b"]',
    b'{"role":"user","content":"x"}',
    b'{"role":"user","content":[{"type":"text","text":"x"}]}',
    b'{"role":"assistant","content":"x"}',
    b'{"type":"text","text":"x"}',
    b'{"type":"input_text","text":"x"}',
    b'{"type":"message","role":"user","content":[]}',
    b'{"type":"function_call","call_id":"a","name":"f","arguments":"{}"}',
    b'{"type":"function","function":{"name":"f","parameters":{}}}',
]  # fmt: skip
LONG_TEXTS = [b"a", b"a ", b" ", b"/a", b"/a.b", b"` 'a'", b"\\n", b"\\\\", b'\\"', b"\\u0000",
              b"<|im_end|>", "好".encode(), b"{", b"[", b",", b"0"]  # fmt: skip


class Watched:
    """A server whose API process has a limit of memory, and how it bears each body."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.api = server.api_process()
        limit = self.api.memory_info().vms + ADDRESS_SPACE
        self.api.rlimit(psutil.RLIMIT_AS, (limit, limit))
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            self.schema = http.get("/openapi.json").json()
            index = http.get("/", headers={"accept": "application/json"}).json()["routes"]
        bodiless = {"GET", "HEAD", "OPTIONS"}
        self.routes = sorted(path for path, methods in index.items() if set(methods) - bodiless)

    def keys(self, route: str) -> list[str]:
        """The keys of a body, where the application's schema says them."""
        operation = self.schema["paths"].get(route, {}).get("post", {})
        found = json.dumps(operation.get("requestBody", {}))
        keys: set[str] = set()
        for name, schema in self.schema["components"]["schemas"].items():
            if f'"#/components/schemas/{name}"' in found:
                keys |= set(schema.get("properties", ()))
        if route == "/":
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            keys = set(body["properties"])
        return sorted(keys) or sorted({*HI, "tools"})

    def base(self, route: str) -> dict[str, Any]:
        known = self.keys(route)
        if route == "/v1/responses":  # which refuses a prompt before it looks at anything else
            known.remove("prompt")
        return {key: value for key, value in HI.items() if key in known}

    def send(self, route: str, body: bytes) -> tuple[float, float, int]:
        """Longest wait of a probe meanwhile, bytes by which memory grew, and the status."""
        done = threading.Event()
        before = self.api.memory_info().rss
        waits, grown = [0.0], [0]

        def watch() -> None:
            with httpx.Client(base_url=self.server.url, trust_env=False, timeout=60) as http:
                while not done.is_set():
                    began = time.perf_counter()
                    assert http.get("/health/live").status_code == 200
                    waits.append(time.perf_counter() - began)
                    grown.append(self.api.memory_info().rss - before)
                    time.sleep(0.005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        time.sleep(0.02)
        answer = httpx.post(
            self.server.url + route.replace("{response_id}", "x"),
            content=body,
            headers={"content-type": "application/json", "x-request-timeout": "20"},
            timeout=120,
            trust_env=False,
        )
        done.set()
        watcher.join()
        return max(waits), max(grown), answer.status_code

    def check(self, route: str, body: bytes) -> int:
        """The status, when the body was no burden. Others compute on the same cores and may delay
        some tries; what is a burden by itself delays them all."""
        for _ in range(6):
            delay, growth, status = self.send(route, body)
            print(f"{route} {len(body)} bytes: {delay:.3f} s, {growth / 1e6:.1f} MB, {status}")
            if delay < MAX_DELAY and growth < MAX_GROWTH:
                return status
        raise AssertionError(
            f"{route} waited {delay:.2f} s, grew {growth / 1e6:.0f} MB, status {status}: "
            f"{body[:200]!r} ({len(body)} bytes)"
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Watched]:
    log = tmp_path_factory.mktemp("budget") / "log"
    options = ["engine.enforce_eager=true", "engine.max_model_len=8192"]
    options.append(f"prompt.template={json.dumps(TEMPLATE)}")
    with warm.Server.service(log, *(f"--set={option}" for option in options)) as server:
        yield Watched(server)
        assert server.process.poll() is None


def body_with(base: dict[str, Any], key: bytes, value: bytes) -> bytes:
    rest = {name: each for name, each in base.items() if name.encode() != key}
    return json.dumps(rest).encode()[:-1] + (b", " if rest else b"") + b'"%s": %s}' % (key, value)


def many(piece: bytes, size: int) -> bytes:
    return b"[" + b",".join([piece] * max(1, size // (len(piece) + 1))) + b"]"


def text(piece: bytes, size: int) -> bytes:
    return b'"' + piece * (size // len(piece)) + b'"'


def numbered(template: bytes, size: int) -> bytes:
    """An object of as many keys as fit."""
    count = size // (len(template) + 8)
    return b"{" + b",".join(b'"k%d":%s' % (i, template) for i in range(count)) + b"}"


def deep(opening: bytes, closing: bytes, size: int) -> bytes:
    count = size // (len(opening) + len(closing))
    return opening * count + b"1" + closing * count


def wide(keys: int) -> bytes:
    """An object whose keys are as long as they may be."""
    return b"{" + b",".join(b'"%0256d":1' % number for number in range(keys)) + b"}"


def tool(schema: bytes) -> bytes:
    return b'[{"type":"function","function":{"name":"f","parameters":{"enum":%s}}}]' % schema


SHAPES = st.one_of(
    st.tuples(st.just(many), st.sampled_from(PIECES)),
    st.tuples(st.just(text), st.sampled_from(LONG_TEXTS)),
    st.tuples(st.just(numbered), st.sampled_from(PIECES)),
)
WRAPPERS = [b"%s", b"[%s]", b"[[%s]]", b'[{"role":"user","content":%s}]', b'{"a":%s}',
            b'[{"type":"message","role":"user","content":%s}]',
            b'[{"role":"assistant","content":"x","tool_calls":%s}]',
            b'[{"type":"function","function":{"name":"f","parameters":%s}}]']  # fmt: skip
SIZES = st.sampled_from([300, 3000, 20_000, 60_000, 180_000, 600_000, MAX_BODY - 2000])


@st.composite
def values(draw: st.DrawFn) -> bytes:
    size = draw(SIZES)
    kind = draw(st.sampled_from(["shape", "shape", "shape", "deep", "number"]))
    if kind == "deep":
        opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"a":', b"}"), (b"[[],", b"]")]))
        return deep(opening, closing, draw(st.sampled_from([200, 1000, size])))
    if kind == "number":
        return draw(st.sampled_from([b"", b"-", b"0.", b"1e"])) + b"9" * size
    make, piece = draw(SHAPES)
    return draw(st.sampled_from(WRAPPERS)) % make(piece, size)


# Each key may become a grammar.
PATTERNS = b"1," + b",".join(b'"k%d": {"pattern": "%%(p)b"}' % n for n in range(3800))


@hardening(1, 2)
@pytest.mark.parametrize(
    ("route", "key", "value"),
    [
        ("/v1/responses", b"input", many(b"{}", 180_000)),
        ("/v1/responses", b"input", many(b'{"role":"user","content":"x"}', 600_000)),
        ("/v1/chat/completions", b"messages", many(b"{}", 180_000)),
        ("/v1/messages", b"messages", many(b"{}", MAX_BODY - 2000)),
        ("/tokenize", b"messages", many(b"0", MAX_BODY - 2000)),
        ("/detokenize", b"tokens", many(b"1", MAX_BODY - 2000)),
        ("/", b"history", many(b"[]", 600_000)),
        ("/", b"history", many(b'["",""]', MAX_BODY - 2000)),
        ("/v1/completions", b"model", text(b"/a", MAX_BODY - 2000)),
        ("/tokenize", b"model", text(b"` 'a'", 45_000)),
        ("/v1/completions", b"k" * (MAX_BODY - 2000), b"1"),
        ("/v1/chat/completions", b"logit_bias", numbered(b'"x"', 2_000_000)),
        ("/tokenize", b"messages", b'[{"role":"user","content":%s}]' % text(b"0", 600_000)),
        ("/invocations", b"messages", many(b"{}", MAX_BODY - 2000)),
        ("/tokenize", b"tools", tool(b"[" + b",".join([wide(500)] * 32) + b"]")),
        ("/v1/chat/completions", b"tools", tool(many(b"0.12345678901234567", 1_200_000))),
        ("/tokenize", b"tools", tool(b"[" * 150 + many(b"0", 2 * 43_000) + b"]" * 150)),
        ("/v1/completions", b"k", PATTERNS % {b"p": b"[" * 1024}),
        ("/v1/completions", b"k", PATTERNS % {b"p": b"a" * 1024}),
    ],
)
def test_no_body_of_these_is_a_burden(
    watched: Watched, route: str, key: bytes, value: bytes
) -> None:
    assert 400 <= watched.check(route, body_with(watched.base(route), key, value)) < 500


TURN = b'{"role":"user","content":"x"}'


@hardening(1, 2)
@pytest.mark.parametrize(
    ("route", "key", "value"),
    [
        ("/v1/responses", b"input", b"[" + b",".join([TURN] * 512) + b"]"),
        ("/v1/chat/completions", b"messages", b"[" + b",".join([TURN] * 512) + b"]"),
        ("/v1/messages", b"messages", b"[" + b",".join([TURN] * 512) + b"]"),
        ("/", b"history", b"[" + b",".join([b'["a","b"]'] * 512) + b"]"),
        ("/detokenize", b"tokens", many(b"1", 2 * 65_000)),
        ("/v1/completions", b"bad_words", many(b'"ab"', 5 * 9000)),
        ("/v1/responses", b"input", b"[" + b",".join([numbered(b"1", 5000)] * 40) + b"]"),
        ("/v1/completions", b"prompt", text(b"0", 130_000)),
        ("/tokenize", b"prompt", text(b"0", 130_000)),
        ("/tokenize", b"tools", tool(text(b"\\u0000", 6 * 21_000))),
        ("/tokenize", b"tools", tool(b"[" * 150 + many(b"0", 2 * 1500) + b"]" * 150)),
    ],
)
def test_a_body_just_within_the_limits_is_no_burden(
    watched: Watched, route: str, key: bytes, value: bytes
) -> None:
    watched.check(route, body_with(watched.base(route), key, value))


@hardening(1, 2)
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_no_body_of_any_shape_is_a_burden_on_any_route(watched: Watched, data: Any) -> None:
    route = data.draw(st.sampled_from(watched.routes))
    if data.draw(st.integers(0, 9)) == 0:
        body = data.draw(values())
    else:
        key = data.draw(st.sampled_from([*watched.keys(route), "unknown"])).encode()
        body = body_with(watched.base(route), key, data.draw(values()))
    watched.check(route, body[:MAX_BODY])


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"tool_{i}",
            "description": "Looks at what the user names, and says what stands there. " * 4,
            "parameters": {
                "type": "object",
                "properties": {
                    f"argument_{j}": {"type": "string", "description": "What it is for. " * 3}
                    for j in range(10)
                },
                "required": ["argument_0"],
            },
        },
    }
    for i in range(90)
]


@hardening(4)
def test_ordinary_tools_of_100_kb_pass_and_stall_nothing(watched: Watched) -> None:
    assert len(json.dumps(TOOLS)) > 100_000
    chat = watched.base("/v1/chat/completions")
    for choice in ("none", "auto"):
        body = json.dumps({**chat, "tools": TOOLS, "tool_choice": choice}).encode()
        status = watched.check("/v1/chat/completions", body)
        assert status != 422  # the embedded model has no parser for "auto": 400
    function = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
    responses = {**watched.base("/v1/responses"), "tools": function, "tool_choice": "none"}
    # The template writes them, and that is longer than the context: vLLM's 400.
    assert watched.check("/v1/responses", json.dumps(responses).encode()) == 400
    anthropic = [
        {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
        for f in function
    ]
    messages = {**watched.base("/v1/messages"), "tools": anthropic}
    assert watched.check("/v1/messages", json.dumps(messages).encode()) in (200, 400)


@hardening(9)
def test_a_conversation_as_long_as_the_context_passes(watched: Watched) -> None:
    turns = [["a", "b"]] * 120
    assert watched.check("/", json.dumps({**HI, "history": turns}).encode()) == 200
