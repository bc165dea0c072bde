"""Two API processes on one engine: a key, prompts in the log, traces, and a template with rules."""

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service import model_config
from testing.server import Server
from tests import warm
from tests.conftest import MODEL, PATIENCE, hardening, logged
from tests.otlp import Collector
from tests.prometheus import scrape, series
from tests.test_faults import EAGER, check_killed_engine

KEY = "correct-horse-battery-staple"
BEARER = {"authorization": f"Bearer {KEY}"}
RULE = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector().listening() as collector:
        yield collector


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("two")
    key_file = folder / "key"
    key_file.write_text(f"{KEY}\n")
    env = {
        "SERVICE_API_KEY_FILE": str(key_file),
        "SERVICE_LOG_PROMPTS": "true",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",  # ms
    }
    both = ("--set", "engine.api_server_count=2")
    traces = ("--set", f"engine.otlp_traces_endpoint={collector.endpoint}")
    config, _ = model_config.load(MODEL)
    template = f"prompt.template={json.dumps(RULE + str(config.prompt.template))}"
    sets = (*both, *traces, "--set", template)
    with warm.Server.service(folder / "log", *EAGER, *sets, env=env) as server:
        yield server


def test_both_answer_and_the_metrics_are_their_sum(two: Server, tmp_path: Path) -> None:
    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=PATIENCE, headers=BEARER, trust_env=False) as client:
            asks = (
                client.post(two.url, json={"prompt": f"Say {i}.", "max_new_tokens": 4})
                for i in range(40)
            )
            return await asyncio.gather(*asks)

    answers = asyncio.run(ask_all())
    assert {answer.status_code for answer in answers} == {200}
    samples = scrape(two, tmp_path / "scrape", KEY)

    def total(name: str, **labels: str) -> float:
        return samples[series(__name__=name, **labels)]

    assert total("service_requests_total", route="/", status="200") == 40
    assert total("service_request_duration_seconds_count", route="/") == 40
    mine = {"client": "default", "model": MODEL}
    assert total("service_tokens_total", **mine, kind="generation") == 160
    assert total("service_client_requests_total", **mine, status="200") == 40
    assert total("vllm:generation_tokens_total", engine="0", model_name=MODEL) == 160
    assert total("service_requests_in_flight") == 1  # the scrape itself, and no label of a process
    assert all(logged(two, f'prompt:"Say {i}."') for i in range(40))


@pytest.mark.parametrize("padding", [0, 5000])  # what is short is rendered without vLLM's renderer
def test_turns_that_the_template_refuses_are_not_called_too_long(two: Server, padding: int) -> None:
    history = [{"role": "assistant", "content": "Hi." + "." * padding}]
    body = {"prompt": "hi", "history": history}
    answer = httpx.post(two.url, json=body, headers=BEARER, trust_env=False)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request", "history")
    assert "does not accept these turns" in error["message"]


@hardening(13)
@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer not-the-key", "Basic wrong", f"Basic {KEY}", KEY, "Bearer \xff"],
)
@pytest.mark.parametrize("route", ["/", "/v1/models", "/metrics", "/openapi.json", "/nowhere"])
def test_every_route_asks_for_the_key(two: Server, route: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {b"authorization": authorization.encode("latin-1")}
    answer = httpx.post(f"{two.url}{route}", headers=headers, json={}, trust_env=False)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    body = answer.json()
    assert body["error"]["type"] == "unauthorized"
    assert (body["status"] if route == "/" else body["error"]["code"]) == 401
    assert "not-the-key" not in two.log.read_text()


OPEN = ("/", "/health", "/health/live", "/health/ready", "/ping")


@hardening(13)
def test_no_route_of_the_list_is_open_but_these(two: Server) -> None:
    with httpx.Client(base_url=two.url, trust_env=False) as http:
        routes = http.get("/", headers={"accept": "application/json"}).json()["routes"]
        assert {*OPEN, "/v1/chat/completions", "/health/generate"} < set(routes)
        for route in routes:
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
                status = http.request(method, route).status_code
                is_open = route in OPEN and (method in ("GET", "HEAD") or route != "/")
                assert (status == 401) != is_open, (method, route, status)
        # A browser's question whether it may send the key; by default no other site may.
        asks = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
        assert http.options("/v1/models", headers=asks).text.startswith("Disallowed CORS origin")


@hardening(13)
@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1/models/",
        "/v1/%6dodels",
        "/health/../v1/models",
        "/health/live/../../v1/models",
        "/health%2f..%2fv1%2fmodels",
        "/V1/MODELS",
        "/v1/models?/health",
        "/v1/models;/health",
        "/health/",
        "http://x/v1/models",
        "http://x/health/../v1/models",
        "http://x",
        "*",
    ],
)
@pytest.mark.parametrize("host", ["x", "/health", "x/health?", "localhost", ""])
def test_no_path_and_no_host_goes_round_the_key(two: Server, target: str, host: str) -> None:
    answer = talk(two, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 400 ")), answer  # 400: no such target


@hardening(13)
def test_a_websocket_is_never_opened(two: Server) -> None:
    for path in ("/v1/realtime", "/health", "/"):
        for key in ("", f"Authorization: Bearer {KEY}\r\n"):
            answer = talk(
                two,
                f"GET {path} HTTP/1.1\r\nHost: x\r\n{key}Connection: Upgrade, close\r\n"
                "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            )
            status = 200 if path in OPEN else 404 if key else 401
            assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer


def talk(server: Server, request: str) -> bytes:
    """All that comes back for a request, to its end."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), 10) as s:
        s.sendall(request.encode())
        return b"".join(iter(lambda: s.recv(65536), b""))


def test_the_command_line_says_how_to_give_the_key(two: Server) -> None:
    for command in (("top",), ("chat", "hi")):
        done = warm.run(*command, "--url", two.url)
        assert done.returncode == 1 and "(--key, or SERVICE_API_KEY)" in done.stderr
    assert warm.run("chat", "hi", "--url", two.url, "--key", KEY).returncode == 0


@hardening(13)
@pytest.mark.parametrize("route", OPEN)
def test_health_and_the_page_need_no_key(two: Server, route: str) -> None:
    assert httpx.get(f"{two.url}{route}", trust_env=False).status_code == 200


@hardening(25)
def test_prompts_are_logged_as_the_tutorials_do_on_one_line(two: Server) -> None:
    prompt = 'Two\nlines "quoted"\x1b[31m'
    body = {"prompt": prompt, "max_new_tokens": 3}
    answer = httpx.post(
        two.url, headers=BEARER, json=body, timeout=PATIENCE, trust_env=False
    ).json()
    line = f'[{answer["time"]}] ", prompt:"Two\\nlines "quoted"\\x1b[31m", response:"'
    assert logged(two, f'{line}{answer["response"]!r}"\n')
    assert KEY not in two.log.read_text()


def test_the_engines_span_is_in_ours_and_ours_in_the_clients(
    two: Server, collector: Collector
) -> None:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    bodies = {
        "/": {"prompt": "hi", "max_new_tokens": 4},
        "/v1/chat/completions": chat,
    }
    for number, (route, body) in enumerate(bodies.items(), 1):
        trace, client = f"{number:032x}", f"{number:016x}"
        headers = {**BEARER, "traceparent": f"00-{trace}-{client}-01", "x-request-id": "traced"}
        answer = httpx.post(f"{two.url}{route}", json=body, headers=headers, timeout=PATIENCE)
        assert answer.status_code == 200
        spans = {span.name: span for span in collector.of(trace, 2)}
        ours, engines = spans[f"POST {route}"], spans["llm_request"]
        assert (ours.parent, engines.parent) == (client, ours.id)
        assert ours.attributes["http.response.status_code"] == 200
        assert ours.attributes["gen_ai.request.id"] == "traced"
        for name in ("gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens"):
            assert ours.attributes[name] == engines.attributes[name] > 0


@hardening(25)
def test_headers_of_a_trace_are_not_logged(two: Server) -> None:
    headers = {"traceparent": f"00-{1:032x}-{1:016x}-01", "tracestate": "my prompt = secret words"}
    assert httpx.get(f"{two.url}/v1/models", headers=headers).status_code == 401
    assert logged(two, "route=/v1/models status=401")
    assert "secret words" not in two.log.read_text()


@hardening(20)
def test_a_killed_engine_is_told_by_both(two: Server) -> None:
    check_killed_engine(two, BEARER)
