"""docs/proxies.md: nginx and HAProxy, as the page configures them, before the real service."""

import http.client
import json
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from testing.server import Server, free_port
from tests import proxies, warm
from tests.conftest import PATIENCE, hardening
from tests.proxies import Proxy
from tests.test_overload import OURS, gauge
from tests.test_tls import certificate

SHORT = {"prompt": "What is the capital of France?", "max_new_tokens": 4}
LONG = {"prompt": "Count from one to a thousand.", "temperature": 2, "max_new_tokens": 100}
TIMEOUT = 2  # seconds, of a body


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost and its key in one file, as both proxies read it."""
    folder = tmp_path_factory.mktemp("certificate")
    file = folder / "chat.pem"
    file.write_bytes(b"".join(part.read_bytes() for part in certificate(folder)))
    return file


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Iterator[Server]:
    """A second server, which knows the prefix, waits less for bodies, and is stopped at last."""
    log = tmp_path_factory.mktemp("prefixed") / "log"
    sets = ("--set", "engine.enforce_eager=true", "--set", "engine.root_path=/llm")
    env = {"SERVICE_BODY_TIMEOUT": str(TIMEOUT), "SERVICE_DRAIN_TIMEOUT": str(PATIENCE)}
    with warm.Server.service(log, *sets, env=env) as server:
        yield server


Start = Callable[..., Proxy]


@pytest.fixture
def start(pem: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a proxy before one or two servers, with changes to the page's configuration."""
    with ExitStack() as stack:

        def start(name: str, *urls: str, more: dict[str, str] | None = None) -> Proxy:
            both = (urls[0], urls[-1])
            context = proxies.running(name, both, pem, tmp_path / name, more or {})
            return stack.enter_context(context)

        yield start


@pytest.fixture(params=proxies.NAMES)
def proxy(request: pytest.FixtureRequest, service: Server, start: Start) -> Proxy:
    return start(request.param, service.url)


@pytest.fixture
def trust(pem: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(pem))


@pytest.fixture
def https(trust: ssl.SSLContext) -> Iterator[httpx.Client]:
    with httpx.Client(verify=trust, timeout=PATIENCE, trust_env=False) as client:
        yield client


def open_connections(server: Server) -> set[int]:
    """The ports of whoever is connected to a server now."""
    port = httpx.URL(server.url).port
    return {
        each.raddr.port
        for each in psutil.net_connections("tcp")
        if each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED
    }


def test_events_come_while_the_answer_is_made(
    proxy: Proxy, https: httpx.Client, service: Server
) -> None:
    with https.stream("POST", proxy.url, json={**LONG, "stream": True}) as answer:
        events = filter(None, answer.iter_lines())
        assert json.loads(next(events).removeprefix("data: "))["delta"]
        assert gauge(service, OURS) == 1  # the engine has not finished
        *_, last = events
    assert json.loads(last.removeprefix("data: "))["status"] == 200


def test_an_answer_may_take_longer_than_a_client_may_be_idle(
    start: Start, https: httpx.Client, service: Server
) -> None:
    proxy = start("haproxy", service.url, more={"timeout client 60s": "timeout client 1s"})
    assert https.post(proxy.url, json=LONG).status_code == 200


# How a prefix is kept: what is replaced in the page's configuration.
KEPT = {
    "nginx": {"http://chat/;": "http://chat;"},
    "haproxy": {"http-request replace-path": "# http-request replace-path"},
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", proxies.NAMES)
def test_below_a_prefix_all_is_as_without(
    name: str, kept: bool, start: Start, https: httpx.Client, service: Server, prefixed: Server
) -> None:
    proxy = start(name, prefixed.url, more=KEPT[name]) if kept else start(name, service.url)
    url = f"{proxy.url}/llm"
    for path in ("/health/live", "/health/ready", "/v1/models"):
        assert https.get(url + path).status_code == 200, path
    assert https.post(f"{url}/", json=SHORT).json()["status"] == 200
    page = https.get(f"{url}/", headers={"accept": "text/html"}).text
    assert "<!doctype html>" in page
    answer = https.post(f"{url}/tokenize/", json={"prompt": "hi"}, follow_redirects=True)
    assert (answer.status_code, str(answer.url)) == (200, f"{url}/tokenize")
    if not kept:
        assert https.post(url, json=SHORT).json()["status"] == 200


# Ways to write the path of the metrics. The service takes many of them.
METRICS = (
    *(
        "metrics",
        "metrics/",
        "metrics/x",
        "metrics?x=1",
        "metricsx",
        "/metrics",
        "./metrics",
        "x/../metrics",
    ),
    *("%6detrics", "%6Detrics/", "metrics%2f", "metrics%2Fx", "metrics%00", "metrics%0a"),
    *("metrics%20", "metrics%3f", "metrics;x", "%256detrics", "METRICS"),
    *("llm/metrics/", "llm/%6detrics", "%6clm/metrics", "llm//metrics", "llm/metrics"),
)


@hardening(16)
def test_metrics_are_not_reached_however_the_path_is_written(
    proxy: Proxy, trust: ssl.SSLContext
) -> None:
    for path in METRICS:
        connection = http.client.HTTPSConnection("localhost", proxy.port, context=trust)
        connection.request("GET", f"/{path}")
        answer = connection.getresponse()
        assert answer.status in (400, 404), path
        assert b"service_" not in answer.read(), path


def test_what_a_client_says_of_itself_goes_nowhere(
    proxy: Proxy, https: httpx.Client, service: Server
) -> None:
    headers = {
        "X-Forwarded-For": "192.0.2.1",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Prefix": "/evil",
        "Forwarded": "for=192.0.2.1;host=evil.example;proto=http",
    }
    answer = https.post(f"{proxy.url}/tokenize/", headers=headers, json={"prompt": "hi"})
    assert (answer.status_code, answer.headers["location"]) == (307, "../tokenize")
    page = https.get(proxy.url, headers=headers)
    assert page.status_code == 200
    log = service.log.read_text()
    assert all(word not in page.text + log for word in ("evil", "192.0.2.1"))


def test_connections_to_the_service_are_kept(
    proxy: Proxy, https: httpx.Client, service: Server
) -> None:
    kept = 0
    before: set[int] = set()
    for _ in range(10):
        assert https.post(proxy.url, json=SHORT).status_code == 200
        now = open_connections(service)
        kept += bool(before & now)
        before = now
    assert kept >= 5  # HAProxy sometimes closes one that it does not need
    assert len(now) < 5


@hardening(3)
def test_clients_that_say_nothing_do_not_reach_the_service(
    proxy: Proxy, https: httpx.Client, service: Server, trust: ssl.SSLContext
) -> None:
    with ExitStack() as stack:
        for _ in range(40):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port)))
            idle = stack.enter_context(trust.wrap_socket(raw, server_hostname="localhost"))
            idle.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n")
        assert https.post(proxy.url, json=SHORT).status_code == 200
        assert len(open_connections(service)) < 5


# A request has a second, in place of the page's figures and of nginx's own.
IMPATIENT = {
    "nginx": {
        "client_header_timeout 10s": "client_header_timeout 1s",
        "client_max_body_size": "client_body_timeout 1s; client_max_body_size",
    },
    "haproxy": {"timeout http-request 30s": "timeout http-request 1s"},
}


@hardening(3)
@pytest.mark.parametrize("name", proxies.NAMES)
def test_a_head_that_is_too_slow_ends_the_connection(
    name: str, start: Start, service: Server, trust: ssl.SSLContext
) -> None:
    proxy = start(name, service.url, more=IMPATIENT[name])
    with socket.create_connection(("127.0.0.1", proxy.port)) as raw:
        with trust.wrap_socket(raw, server_hostname="localhost") as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n")
            assert slow.recv(12) in (b"", b"HTTP/1.1 408")


@hardening(3)
def test_an_address_has_so_many_connections_to_haproxy(
    start: Start, service: Server, trust: ssl.SSLContext
) -> None:
    proxy = start("haproxy", service.url, more={"gt 120 }": "gt 3 }"})
    with ExitStack() as stack:
        held: list[http.client.HTTPSConnection] = []
        with pytest.raises(OSError):
            for _ in range(4):
                held.append(http.client.HTTPSConnection("localhost", proxy.port, context=trust))
                stack.callback(held[-1].close)
                held[-1].connect()
        held[0].request("GET", "/health/live")
        assert held[0].getresponse().status == 200


def test_haproxy_logs_requests(start: Start, https: httpx.Client, service: Server) -> None:
    proxy = start("haproxy", service.url)
    assert https.get(f"{proxy.url}/health/live").status_code == 200
    deadline = time.monotonic() + PATIENCE
    while '"GET /health/live HTTP/1.1"' not in proxy.output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


BODY = json.dumps(SHORT).encode()


def begin(connection: http.client.HTTPConnection) -> None:
    """Send a request but for its body, of which one byte comes."""
    connection.putrequest("POST", "/")
    connection.putheader("Content-Length", str(len(BODY)))
    connection.endheaders()
    connection.send(BODY[:1])


def slow_body(connection: http.client.HTTPConnection) -> int:
    """The status of a request whose body comes more slowly than `prefixed` waits."""
    begin(connection)
    time.sleep(TIMEOUT)
    connection.send(BODY[1:2])
    time.sleep(TIMEOUT)
    connection.send(BODY[2:])
    return connection.getresponse().status


def test_what_does_not_fit_haproxys_buffer_is_waited_for_by_the_service(
    start: Start, prefixed: Server, trust: ssl.SSLContext
) -> None:
    proxy = start("haproxy", prefixed.url)
    secure = http.client.HTTPSConnection("localhost", proxy.port, context=trust)
    secure.putrequest("POST", "/")
    secure.putheader("Content-Length", str(300_000))
    secure.endheaders()
    secure.send(b" " * 200_000)
    answer = secure.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["type"]) == (408, "body_too_slow")


@hardening(3)
def test_a_slow_body_is_waited_for_by_the_proxy(
    start: Start, prefixed: Server, trust: ssl.SSLContext
) -> None:
    port = httpx.URL(prefixed.url).port
    assert slow_body(http.client.HTTPConnection("127.0.0.1", port)) == 408
    for name in proxies.NAMES:
        proxy = start(name, prefixed.url)
        secure = http.client.HTTPSConnection("localhost", proxy.port, context=trust)
        assert slow_body(secure) == 200, name


@hardening(3)
def test_a_body_that_is_too_slow_is_refused_by_the_proxy(
    start: Start, service: Server, trust: ssl.SSLContext
) -> None:
    for name in proxies.NAMES:
        proxy = start(name, service.url, more=IMPATIENT[name])
        secure = http.client.HTTPSConnection("localhost", proxy.port, context=trust)
        begin(secure)
        if name == "haproxy":
            assert secure.getresponse().status == 408
        else:
            with pytest.raises(http.client.RemoteDisconnected):
                secure.getresponse()


@pytest.mark.parametrize(("name", "status"), [("nginx", 502), ("haproxy", 503)])
def test_where_no_server_answers_the_proxy_says_so(
    name: str, status: int, start: Start, https: httpx.Client
) -> None:
    proxy = start(name, f"http://127.0.0.1:{free_port()}")
    assert https.post(proxy.url, json=SHORT).status_code == status


@contextmanager
def answering(
    status: int, body: bytes = b"", seconds: float = 0
) -> Iterator[tuple[str, list[str]]]:
    """A server that is ready, and answers POST so, after some time.

    Its URL, and the paths that it was asked for; after each body that it could send, "sent".
    """
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # as HAProxy asks whether it is ready
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            time.sleep(seconds)
            self.send_response(status)
            self.send_header("Retry-After", "7")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if body:
                # Without this the kernel may hold all of it.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                self.wfile.write(body)
                asked.append("sent")

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@hardening(21)
@pytest.mark.parametrize("name", proxies.NAMES)
def test_where_both_servers_are_busy_each_is_asked_once_and_the_client_told_when_to_come_back(
    name: str, start: Start, https: httpx.Client
) -> None:
    with answering(503) as (one, asked_one), answering(503) as (other, asked_other):
        proxy = start(name, one, other)
        for count in range(1, 6):
            answer = https.post(f"{proxy.url}/{count}", json=SHORT)
            assert (answer.status_code, answer.headers.get("retry-after")) == (503, "7"), count
    assert asked_one == asked_other == ["/1", "/2", "/3", "/4", "/5"]


def test_what_has_taken_long_is_not_sent_again_by_nginx(start: Start, https: httpx.Client) -> None:
    more = {"proxy_next_upstream_timeout 120s": "proxy_next_upstream_timeout 1s"}
    with (
        answering(503, seconds=2) as (one, asked_one),
        answering(503, seconds=2) as (other, more_asked),
    ):
        proxy = start("nginx", one, other, more=more)
        assert https.post(proxy.url, json=SHORT).headers["retry-after"] == "7"
    assert asked_one + more_asked == ["/"]


def test_an_answer_that_is_read_slowly_is_held_by_nginx(
    start: Start, trust: ssl.SSLContext
) -> None:
    with answering(200, b"a" * 3_900_000) as (url, asked), socket.socket() as raw:
        proxy = start("nginx", url)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", proxy.port))
        with trust.wrap_socket(raw, server_hostname="localhost") as reader:
            reader.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1")
            deadline = time.monotonic() + PATIENCE
            while asked != ["/", "sent"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)


SOON = {
    "nginx": {"proxy_connect_timeout 5s": "proxy_connect_timeout 1s"},
    "haproxy": {"timeout connect 5s": "timeout connect 1s"},
}


@hardening(21)
@pytest.mark.parametrize("name", proxies.NAMES)
def test_where_a_machine_is_gone_the_other_server_is_asked(
    name: str, start: Start, https: httpx.Client
) -> None:
    with ExitStack() as stack:
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(3):  # a full queue: the kernel answers nobody, as a machine without power
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        other, asked = stack.enter_context(answering(200))
        proxy = start(name, f"http://127.0.0.1:{silent.getsockname()[1]}", other, more=SOON[name])
        for count in range(1, 5):
            assert https.post(f"{proxy.url}/{count}", json=SHORT).status_code == 200, count
    assert asked == ["/1", "/2", "/3", "/4"]


MANY = [(f"x-{n}", "1") for n in range(200)]
LARGE = [("x-1", "1" * 40_000), ("x-2", "1" * 40_000)]


@hardening(2)
@pytest.mark.parametrize(
    ("name", "headers", "mebibytes", "status", "by_service"),
    [
        ("nginx", [], 5, 413, True),
        ("nginx", [], 9, 413, False),
        ("nginx", MANY, 0, 431, True),
        ("nginx", LARGE, 0, 431, True),
        ("nginx", [("x", "1" * 70_000)], 0, 400, False),
        ("haproxy", [], 5, 413, True),
        ("haproxy", [], 9, 413, True),
        ("haproxy", MANY, 0, 431, True),
        ("haproxy", LARGE, 0, 431, True),
        ("haproxy", MANY * 2, 0, 400, False),
        ("haproxy", LARGE * 2, 0, 400, False),
    ],
)
def test_what_is_too_large_is_refused_by_the_service_or_before_it(
    name: str,
    headers: list[tuple[str, str]],
    mebibytes: int,
    status: int,
    by_service: bool,
    start: Start,
    https: httpx.Client,
    service: Server,
) -> None:
    proxy = start(name, service.url)
    body = json.dumps({"prompt": "a" * (mebibytes << 20)})
    for content in (body, iter([body.encode()])):  # with its length, and in chunks
        answer = https.post(proxy.url, headers=headers, content=content)
        assert answer.status_code == status, answer.text
        assert answer.text.startswith('{"response": ""') == by_service, answer.text


@hardening(13)
def test_a_websocket_is_not_opened(proxy: Proxy, trust: ssl.SSLContext) -> None:
    connection = http.client.HTTPSConnection("localhost", proxy.port, context=trust)
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    connection.request("GET", "/v1/realtime", headers=upgrade)
    assert connection.getresponse().status == 404


# One request a minute and three at once, in place of the page's figures.
FEW = {
    "nginx": {"rate=20r/s": "rate=1r/m", "burst=60": "burst=3"},
    "haproxy": {"http_req_rate(3s)": "http_req_rate(600s)", "gt 60 }": "gt 3 }"},
}


@hardening(22)
@pytest.mark.parametrize("name", proxies.NAMES)
def test_an_address_has_so_many_requests(
    name: str, start: Start, https: httpx.Client, service: Server
) -> None:
    proxy = start(name, service.url, more=FEW[name])
    answers = [https.get(f"{proxy.url}/health/live").status_code for _ in range(6)]
    assert answers[0] == 200 and answers[-1] == 429


def presented(proxy: Proxy) -> str:
    """The certificate with which a proxy answers a new connection."""
    return ssl.get_server_certificate(("localhost", proxy.port))


@pytest.mark.parametrize("name", proxies.NAMES)
def test_a_new_certificate_cuts_no_answer(
    name: str, start: Start, https: httpx.Client, service: Server, pem: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.pem"
    own.write_bytes(pem.read_bytes())
    proxy = start(name, service.url, more={str(pem): str(own)})
    with https.stream("POST", proxy.url, json={**LONG, "stream": True}) as answer:
        events = filter(None, answer.iter_lines())
        next(events)
        before = presented(proxy)
        own.write_bytes(b"".join(part.read_bytes() for part in certificate(tmp_path)))
        proxy.process.send_signal(RELOAD[name])
        deadline = time.monotonic() + PATIENCE
        while presented(proxy) == before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        *_, last = events
    assert json.loads(last.removeprefix("data: "))["status"] == 200


RELOAD = {"nginx": signal.SIGHUP, "haproxy": signal.SIGUSR2}


@hardening(21)
def test_no_request_is_lost_when_a_server_stops_and_another_goes_on(
    start: Start, https: httpx.Client, service: Server, prefixed: Server
) -> None:
    """Proxies hold connections to the one that stops, and clients theirs to the proxies."""
    urls = [start(name, prefixed.url, service.url).url for name in proxies.NAMES]
    answers: Counter[tuple[str, str]] = Counter()
    ended = threading.Event()

    def ask(url: str, body: dict[str, Any]) -> None:
        while not ended.is_set():
            try:
                answer = https.post(url, json=body)
                last = answer.text.rpartition("data: ")[2]
                answers[url, str(json.loads(last).get("status", "none"))] += 1
            except (httpx.HTTPError, ValueError) as e:
                answers[url, repr(e)] += 1

    bodies = [SHORT, SHORT, {**LONG, "max_new_tokens": 30}, {**LONG, "stream": True}]
    threads = [threading.Thread(target=ask, args=(url, body)) for url in urls for body in bodies]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while not gauge(prefixed, OURS) or not gauge(service, OURS) or len(answers) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    prefixed.process.send_signal(signal.SIGTERM)
    assert prefixed.process.wait(PATIENCE) == 0
    alone = answers.copy()
    while any(answers[url, "200"] < alone[url, "200"] + 10 for url in urls):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert set(answers) == {(url, "200") for url in urls}, answers
