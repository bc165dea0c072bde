"""The limits of one connection, by the bytes on it: uvicorn with our protocol and a small app."""

import asyncio
import inspect
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from prometheus_client import REGISTRY
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api import connection
from service.settings import Settings
from tests import hardening as hardening_page
from tests.conftest import hardening

CONNECTIONS = 8
TIMEOUT = 1.0  # seconds, of headers and of writing
LONG = 40_000  # bytes: what uvloop keeps without a word, by default
GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/slow":
        await asyncio.sleep(2 * TIMEOUT)
    body = b"." * LONG if scope["path"] == "/long" else b"answer"
    if scope["path"] in ("/echo", "/count"):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        body = body if scope["path"] == "/echo" else str(len(body)).encode()
    if scope["path"] == "/headers":
        await asyncio.sleep(0.5)
        body = b" ".join(name for name, _ in scope["headers"])
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for event in (b"first\n\n", b"", b"second\n\n"):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body"})
        return
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(app, loop="uvloop", lifespan="off", log_level="error")
    config.load()
    connection.guard(config, Settings(body_timeout=TIMEOUT, write_timeout=TIMEOUT), CONNECTIONS)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(port: int) -> Iterator[socket.socket]:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.settimeout(10)
        s.connect(("127.0.0.1", port))
        yield s


def read(client: socket.socket) -> bytes:
    """All until the server closes."""
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionError:
        pass
    return received


@hardening(19)
@pytest.mark.parametrize("last", [False, True])
def test_an_answer_that_nobody_reads_ends_the_connection(client: socket.socket, last: bool) -> None:
    head = GET % b"/long"
    client.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") if last else head)
    time.sleep(2 * TIMEOUT)
    assert len(read(client)) < LONG


def test_a_long_answer_reaches_who_reads_it(client: socket.socket) -> None:
    client.sendall((GET % b"/long").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert read(client).endswith(b"." * LONG)


def test_requests_sent_ahead_in_pieces_are_answered(client: socket.socket) -> None:
    client.sendall(GET % b"/slow")
    time.sleep(0.2)
    client.sendall(GET % b"/" + b"GET / HTTP")
    time.sleep(0.2)
    client.sendall(b"/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert read(client).count(b"answer") == 3


EXPECT = b"POST %s HTTP/1.%d\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"


def test_who_waits_for_100_continue_gets_it_or_an_answer_that_closes(client: socket.socket) -> None:
    client.sendall(EXPECT % (b"/echo", 1))
    assert client.recv(65536).startswith(b"HTTP/1.1 100 ")
    client.sendall(b"hi")
    assert client.recv(65536).endswith(b"\r\n\r\nhi")
    client.sendall(EXPECT % (b"/", 1))
    answer = read(client)
    assert answer.endswith(b"answer") and b"connection: close\r\n" in answer


def test_a_client_of_http_1_0_is_sent_no_100(client: socket.socket) -> None:
    client.sendall(EXPECT % (b"/echo", 0) + b"hi")
    answer = read(client)
    assert b" 100 " not in answer and answer.endswith(b"\r\n\r\nhi")


@hardening(2)
@pytest.mark.parametrize(
    ("parts", "size", "status"), [(1_000, 1, b"200"), (1_001, 1, b"400"), (1_500, 64, b"200")]
)
def test_a_body_has_so_many_short_parts(
    client: socket.socket, parts: int, size: int, status: bytes
) -> None:
    head = b"POST /count HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    client.sendall(head + b"Connection: close\r\n\r\n")
    client.sendall(b"%x\r\n%s\r\n" % (size, b"x" * size) * parts + b"0\r\n\r\n")
    answer = read(client)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert status != b"200" or answer.endswith(b"\r\n\r\n%d" % (parts * size))


@pytest.mark.parametrize("pause", [0, 0.2])
def test_a_trailer_is_no_header(client: socket.socket, pause: float) -> None:
    head = b"POST /headers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
    client.sendall(head + b"Connection: close\r\n\r\n")
    time.sleep(pause)
    client.sendall(b"2\r\nhi\r\n0\r\nAuthorization: Bearer x\r\n\r\n")
    assert b"authorization" not in read(client).partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    ("method", "version", "chunked", "body"),
    [
        (b"GET", b"1.0", False, b"first\n\nsecond\n\n"),
        (b"HEAD", b"1.0", False, b""),
        (b"GET", b"1.1", True, b"7\r\nfirst\n\n\r\n8\r\nsecond\n\n\r\n0\r\n\r\n"),
        (b"HEAD", b"1.1", False, b""),
    ],
)
def test_a_stream_has_chunks_for_who_knows_them(
    client: socket.socket, method: bytes, version: bytes, chunked: bool, body: bytes
) -> None:
    client.sendall(method + b" /stream HTTP/" + version + b"\r\nConnection: close\r\n\r\n")
    head, _, got = read(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and got == body
    assert (b"transfer-encoding: chunked" in head) == chunked
    assert b"connection: close" in head


@pytest.mark.parametrize("path", [b"/", b"/long"])
def test_an_answer_of_known_length_is_whole_over_http_1_0(
    client: socket.socket, path: bytes
) -> None:
    client.sendall(b"GET " + path + b" HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    head, _, body = read(client).partition(b"\r\n\r\n")
    assert b"content-length: %d\r\n" % len(body) in head and b"transfer-encoding" not in head


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
INNER = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"


@hardening(2)
@pytest.mark.parametrize("upgrade", [UPGRADE, b"Connection: upgrade\r\nUpgrade: websocket\r\n"])
@pytest.mark.parametrize(
    "framed",
    [
        b"Content-Length: %d\r\n\r\n%s" % (len(INNER), INNER),
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(INNER), INNER),
    ],
)
@pytest.mark.parametrize("size", [1, 20, 100, 10_000])
def test_who_asks_for_another_protocol_is_answered_in_this_one(
    client: socket.socket, upgrade: bytes, framed: bytes, size: int
) -> None:
    """With its body, wherever the request is cut, and with what is sent ahead after it."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sent = b"POST /echo?a=b HTTP/1.1\r\nHost: x\r\n" + upgrade + framed
    sent += sent + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for at in range(0, len(sent), size):
        client.sendall(sent[at : at + size])
        time.sleep(0.0005)
    received = read(client)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 3
    assert received.count(INNER) == 2 and received.endswith(b"answer")


@hardening(3)
def test_headers_sent_ahead_have_their_time_after_the_answer(client: socket.socket) -> None:
    client.sendall(GET % b"/slow" + b"GET / HTTP")
    began = time.monotonic()
    received = read(client)
    assert received.count(b"answer") == 1 and b"HTTP/1.1 408" in received
    assert time.monotonic() - began < 5 * TIMEOUT


@hardening(3)
@pytest.mark.parametrize(("headers", "status"), [(128, b" 200 "), (129, b" 431 ")])
def test_a_request_has_so_many_headers(client: socket.socket, headers: int, status: bytes) -> None:
    more = b"a: b\r\n" * (headers - 2)
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + more + b"\r\n")
    assert status in read(client).split(b"\r\n")[0]


@hardening(3)
@pytest.mark.parametrize(("length", "refused"), [(65_536, False), (65_537, True)])
def test_a_head_that_goes_on_is_refused(client: socket.socket, length: int, refused: bool) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\na: "
    client.sendall(head + b"b" * (length - len(head)))
    client.settimeout(TIMEOUT / 2)
    if refused:
        assert client.recv(65536).startswith(b"HTTP/1.1 431 ")
    else:
        with pytest.raises(TimeoutError):
            client.recv(65536)


@hardening(19)
def test_who_closes_its_sending_half_has_left(client: socket.socket) -> None:
    began = time.monotonic()
    client.sendall(GET % b"/slow")
    time.sleep(0.2)
    client.shutdown(socket.SHUT_WR)
    assert read(client) == b""
    assert time.monotonic() - began < TIMEOUT


def connect(port: int, request: bytes = b"") -> socket.socket:
    s = socket.create_connection(("127.0.0.1", port), timeout=10)
    s.sendall(request)
    return s


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@hardening(3)
def test_at_the_limit_the_longest_idle_connection_makes_room(port: int) -> None:
    before = count("service_idle_connections_closed_total")
    old = [connect(port, GET % b"/") for _ in range(CONNECTIONS)]
    try:
        assert all(b"answer" in s.recv(65536) for s in old)
        for s in old[1:]:  # the first has now been idle for longest
            s.sendall(GET % b"/")
            assert b"answer" in s.recv(65536)
        with connect(port, GET % b"/") as new:
            assert b"answer" in new.recv(65536)
            assert old[0].recv(65536) == b""
            for s in old[1:]:
                s.sendall(GET % b"/")
                assert b"answer" in s.recv(65536)
        assert count("service_idle_connections_closed_total") == before + 1
    finally:
        for s in old:
            s.close()


@hardening(3)
def test_when_all_are_busy_the_newcomer_alone_is_refused_and_health_is_answered(port: int) -> None:
    before = count("service_refused_requests_total", reason="connections")
    time.sleep(0.2)  # connections of other tests have gone
    busy = [connect(port, GET % b"/slow") for _ in range(CONNECTIONS)]
    try:
        time.sleep(0.2)
        with connect(port, GET % b"/") as new:
            answer = read(new)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in answer
        assert b'"type": "unavailable"' in answer
        with connect(port, GET % b"/v1/messages") as new:
            assert b'{"type": "error", ' in read(new)  # Anthropic's form
        with connect(port, GET % b"/health/live") as probe:
            assert b"answer" in probe.recv(65536)
            assert count("service_refused_requests_total", reason="connections") == before + 2
            assert all(b"answer" in s.recv(65536) for s in busy)
            busy.pop().close()  # the probe's connection is no longer above the limit
            time.sleep(0.2)
            probe.sendall(GET % b"/")
            assert b"answer" in probe.recv(65536)
    finally:
        for s in busy:
            s.close()


def test_the_page_says_these_limits() -> None:
    page = hardening_page.PAGE.read_text(encoding="utf-8")
    kilobytes = connection._MAX_HEADER_BYTES // 1024
    says = f"431 above {connection._MAX_HEADERS} headers or {kilobytes} KiB of them"
    assert says in page
    assert f"of requests sent ahead {connection._MAX_PIPELINED} are answered" in page


def test_uvicorn_has_the_methods_that_are_overridden() -> None:
    for name, method in vars(connection.GuardedProtocol).items():
        if callable(method) and not name.startswith("_"):
            theirs = getattr(HttpToolsProtocol, name)
            assert list(inspect.signature(theirs).parameters) == list(
                inspect.signature(method).parameters
            ), name
