"""A small server with keys under more load, and slower clients, than it takes; at last SIGTERM."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from testing.server import Server
from tests.conftest import LOOPBACK, MODEL, PATIENCE, hardening, logged

RUNNING, WAITING = 4, 8
RUNS = "vllm:num_requests_running{"
OURS = "service_running_sequences "
WAITS = "service_waiting_sequences "
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob", "carol": "key-of-carol"}
LONG = {"prompt": "Count from one to a thousand.", "temperature": 2, "max_new_tokens": 1500}
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Count from one to a thousand."}],
    "temperature": 1.9,
    "max_tokens": 1500,
}


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, keys_file: Path) -> Iterator[Server]:
    settings = {
        "API_KEY_FILE": str(keys_file),
        "MAX_WAITING": str(WAITING),
        "MAX_SEQUENCES": "3",
        "MAX_BODY_BYTES": "65536",
        "BODY_TIMEOUT": "2",
        "WRITE_TIMEOUT": "2",
        "METRICS_KEY": "false",
        "CACHE_PER_KEY": "true",
        "DRAIN_TIMEOUT": str(PATIENCE),
    }
    log = tmp_path_factory.mktemp("small") / "log"
    server = Server.service(
        log,
        *("--set", "engine.enforce_eager=true", "--set", f"engine.max_num_seqs={RUNNING}"),
        *("--set", "sampling.max_tokens=2000"),  # the YAML's limit holds for /v1 too
        env={
            **{f"SERVICE_{name}": value for name, value in settings.items()},
            "OMP_NUM_THREADS": str(os.cpu_count()),  # not one, as the other tests have it
        },
    )
    seen = phases_until_ready(server)
    assert seen[0] == "starting" and {"loading", "warming"} < set(seen), seen
    try:
        yield server
    finally:
        server.stop()


def phases_until_ready(server: Server) -> list[str]:
    """What /health/ready says from its first answer on, which comes within the first seconds."""
    seen: list[str] = []
    began = time.monotonic()
    while "ready" not in seen:
        assert time.monotonic() - began < PATIENCE, server.log.read_text()
        try:
            answer = LOOPBACK.get(f"{server.url}/health/ready")
        except httpx.TransportError:
            assert not seen, "it answered before"
            assert time.monotonic() - began < 20
        else:
            phase = answer.json()["status"]
            assert answer.status_code == (200 if phase == "ready" else 503)
            if phase not in seen:
                refused = LOOPBACK.post(server.url, json={"prompt": "hi"})
                assert (phase == "ready") or refused.status_code in (503, 401)
                seen.append(phase)
        time.sleep(0.05)
    assert LOOPBACK.get(f"{server.url}/health/live").status_code == 200
    return seen


def gauge(server: Server, name: str) -> float:
    text = LOOPBACK.get(f"{server.url}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def wait_for(server: Server, name: str, value: float, seconds: float = PATIENCE) -> None:
    asked = time.monotonic()
    deadline = asked + seconds
    while (now := gauge(server, name)) != value:
        assert asked < deadline, f"{name} is {now}, not {value}"
        time.sleep(0.05)
        asked = time.monotonic()


async def fill(
    server: Server, client: httpx.AsyncClient, count: int
) -> list[asyncio.Task[httpx.Response]]:
    """Requests that run, or wait, until they are cancelled; all of them have come in."""
    endless = {"model": MODEL, "prompt": "Count", "max_tokens": 1900, "ignore_eos": True}
    tasks: list[asyncio.Task[httpx.Response]] = []
    running = min(count, RUNNING)
    for name, more in ((RUNS, running), (WAITS, count - running)):  # those that run come first
        for _ in range(more):
            asked = client.post("/v1/completions", json=endless, headers=bearer("alice"))
            tasks.append(asyncio.create_task(asked))
        await asyncio.to_thread(wait_for, server, name, more)
    return tasks


def client_of(server: Server, **options: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(
        base_url=server.url,
        timeout=PATIENCE,
        trust_env=False,
        verify=False,
        limits=limits,
        **options,
    )


def test_beside_busy_programs_the_engine_computes_with_one_thread(small: Server) -> None:
    children = psutil.Process(small.process.pid).children(recursive=True)
    (engine,) = (child for child in children if "EngineCore" in " ".join(child.cmdline()))

    def seconds() -> dict[int, float]:
        return {thread.id: thread.user_time + thread.system_time for thread in engine.threads()}

    async def scenario() -> list[float]:
        """The seconds in which each thread computed, of two."""
        async with client_of(small) as client:
            tasks = await fill(small, client, 1)
            await asyncio.sleep(2)
            before = seconds()
            await asyncio.sleep(2)
            after = seconds()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return [after[thread] - before.get(thread, 0) for thread in after]

    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        spent = sorted(asyncio.run(scenario()))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert spent[-1] > 0.3 and sum(spent[:-1]) < 0.2, spent


@hardening(22)
def test_a_full_server_says_when_to_come_back_and_then_has_room(small: Server) -> None:
    async def scenario() -> None:
        async with client_of(small) as client:
            body = {"prompt": "Count.", "temperature": 1, "max_new_tokens": 24}
            headers = bearer("alice")
            # Before an answer has ended the time is told by guess, after that by measurement.
            measured = asyncio.Event()

            async def persist() -> tuple[int, float, float]:
                """As a client that obeys: refusals by measurement, the longest refusal in seconds,
                the answer in seconds."""
                refused, longest = 0, 0.0
                while True:
                    began = time.monotonic()
                    answer = await client.post("/", json=body, headers=headers)
                    if answer.status_code == 200:
                        measured.set()
                        return refused, longest, time.monotonic() - began
                    assert answer.status_code == 429, answer.text
                    assert answer.json()["error"]["type"] == "overloaded"
                    longest = max(longest, time.monotonic() - began)
                    refused += measured.is_set()
                    await asyncio.sleep(int(answer.headers["retry-after"]))

            results = await asyncio.gather(*(persist() for _ in range(36)))
            refusals, longest, answers = zip(*results, strict=True)
            assert max(refusals) > 0
            assert max(refusals) <= 6
            assert max(longest) < max(answers)

    asyncio.run(scenario())
    assert gauge(small, 'service_refused_requests_total{reason="queue_full"}') > 0
    wait_for(small, OURS, 0)


@hardening(22)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_vllms_routes_stand_in_the_same_queue(small: Server, route: str) -> None:
    async def scenario() -> None:
        async with client_of(small) as client:
            tasks = await fill(small, client, RUNNING + WAITING)
            asked = {"prompt": "hi"} if route == "/v1/completions" else {"input": "hi"}
            body = {"model": MODEL, **(CHAT if "chat" in route else asked)}
            answer = await client.post(route, json=body, headers=bearer("alice"))
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            # Another client has a share of its own, and it does not wait behind all of Alice's.
            body |= {"max_output_tokens" if "responses" in route else "max_tokens": 2}
            bob = asyncio.create_task(client.post(route, json=body, headers=bearer("bob")))
            await asyncio.to_thread(wait_for, small, WAITS, WAITING + 1)
            for task in tasks[:1]:
                task.cancel()
            answer = await bob
            assert answer.status_code == 200, answer.text
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
    wait_for(small, OURS, 0)
    wait_for(small, WAITS, 0)


@hardening(22)
def test_who_floods_does_not_take_the_others_share(small: Server) -> None:
    answered: Counter[str] = Counter()

    async def scenario() -> None:
        body = {"prompt": "Count.", "temperature": 1, "max_new_tokens": 8, "stop": ["\0"]}
        begin, end = time.monotonic() + 3, time.monotonic() + 15
        async with client_of(small) as client:

            async def ask(name: str) -> None:
                while time.monotonic() < end:
                    answer = await client.post("/", json=body, headers=bearer(name))
                    if answer.status_code == 200:
                        answered[name] += begin < time.monotonic() < end
                    else:  # it does not obey: it comes back before its time
                        assert answer.status_code == 429
                        await asyncio.sleep(0.5)

            # Two of Bob's run when he has his share. Four wait, so that one always does.
            names = ["alice"] * 60 + ["bob"] * (RUNNING + 2)
            await asyncio.gather(*(ask(name) for name in names))

    asyncio.run(scenario())
    assert answered["bob"] >= 0.45 * answered.total() - RUNNING, answered  # a round at the edge


@hardening(19)
@pytest.mark.parametrize("route", ["/", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_who_leaves_frees_the_engine_within_a_second(
    small: Server, route: str, stream: bool, queued: bool
) -> None:
    async def scenario() -> None:
        async with client_of(small, headers=bearer("bob")) as client:
            running = RUNNING if queued else 0
            tasks = await fill(small, client, running)
            body = {**(LONG if route == "/" else CHAT), "stream": stream}

            async def ask() -> None:
                async with client.stream("POST", route, json=body) as answer:
                    async for _ in answer.aiter_bytes():
                        pass

            asking = asyncio.create_task(ask())
            await asyncio.to_thread(wait_for, small, WAITS, queued)
            await asyncio.to_thread(wait_for, small, RUNS, running + (not queued))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await asyncio.to_thread(wait_for, small, WAITS, 0, 1)
            await asyncio.to_thread(wait_for, small, OURS, running, 1)
            await asyncio.to_thread(wait_for, small, RUNS, running, 2)  # told a step later
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
    wait_for(small, RUNS, 0)


@pytest.mark.parametrize("route", ["/", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_the_request_in_the_engine_too(
    small: Server, route: str, stream: bool
) -> None:
    body = {**(LONG if route == "/" else CHAT), "stream": stream}
    headers = {**bearer("bob"), "X-Request-Timeout": "1.5"}
    began = time.monotonic()
    answer = httpx.post(
        f"{small.url}{route}", json=body, headers=headers, timeout=PATIENCE, trust_env=False
    )
    assert 1.4 < time.monotonic() - began < 5
    assert answer.status_code == (200 if stream else 504)  # a stream had begun
    assert '"type": "deadline_exceeded"' in answer.text
    wait_for(small, RUNS, 0, 2)


def test_the_body_may_ask_for_a_deadline_which_holds_in_the_queue_too(small: Server) -> None:
    async def scenario() -> None:
        async with client_of(small) as client:
            tasks = await fill(small, client, RUNNING)
            body = {"prompt": "hi", "timeout": 0.5}
            answer = await client.post("/", json=body, headers=bearer("bob"))
            assert answer.status_code == 504
            for timeout in ("0", "-1", "nan", "x", "1e9"):
                headers = {**bearer("bob"), "X-Request-Timeout": timeout}
                answer = await client.post("/", json={"prompt": "hi"}, headers=headers)
                assert (answer.status_code, answer.json()["error"]["param"]) == (
                    422,
                    "X-Request-Timeout",
                )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
    wait_for(small, RUNS, 0)


def talk(server: Server, *parts: bytes, pause: float = 0.0, patience: float = 10) -> bytes:
    """What comes back for bytes sent as they are, until the server closes or goes silent."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=patience) as s:
        received = b""
        try:
            for part in parts:
                s.sendall(part)
                time.sleep(pause)
            while data := s.recv(65536):
                received += data
                if b"}" in data and b"Content-Length" not in received:
                    break
        except (TimeoutError, ConnectionError):
            pass
        return received


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-of-bob\r\n"


@hardening(2)
@pytest.mark.parametrize(
    "sent",
    [
        [HEAD + b"Content-Length: 300000000\r\n\r\n"],
        [
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
            *([b"4000\r\n" + b"x" * 16384 + b"\r\n"] * 9),
        ],
    ],
)
def test_a_large_body_is_refused_before_it_is_read(small: Server, sent: list[bytes]) -> None:
    assert b" 413 " in talk(small, *sent).split(b"\r\n")[0]


@hardening(3)
@pytest.mark.parametrize(
    ("status", "sent"),
    [
        (431, [b"GET /health/live HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n"]),
        (431, [b"GET /health/live HTTP/1.1\r\na: " + b"b" * 10**6 + b"\r\n\r\n"]),
        (431, [b"GET /health/live HTTP/1.1\r\na: ", *([b"b" * 16384] * 60)]),
        (431, [b"GET /" + b"x" * 200_000]),
        (408, [b"GET /health/live HTTP/1.1\r\na: b\r\n"]),
        (408, [b""]),
        (408, [HEAD + b"Content-Length: 20\r\n\r\n{"]),
        (408, [HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"]),
        (400, [b"\x00\x01\x02\xff\r\n\r\n"]),
    ],
)
def test_headers_and_slow_clients_have_limits(
    small: Server, status: int, sent: list[bytes]
) -> None:
    began = time.monotonic()
    answer = talk(small, *sent)
    assert f" {status} ".encode() in answer.split(b"\r\n")[0], answer[:200]
    seconds = time.monotonic() - began
    assert seconds < 6 and (status != 408 or seconds > 1.9)  # SERVICE_BODY_TIMEOUT is 2


@hardening(3)
def test_requests_sent_ahead_are_answered_up_to_a_limit(small: Server) -> None:
    host, _, port = small.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as s:
        s.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        answers = b"".join(iter(lambda: s.recv(65536), b""))
    assert answers.count(b"HTTP/1.1 200 ") == 16


@hardening(19)
def test_a_reader_that_never_reads_is_dropped(small: Server) -> None:
    host, _, port = small.url.removeprefix("http://").partition(":")
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.connect((host, int(port)))
        # Its answers fill the socket's buffers: thousands of them, none of which it reads.
        s.settimeout(1)
        request = (
            b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-of-bob\r\n\r\n"
        )
        dropped = False
        deadline = time.monotonic() + 30
        while not dropped and time.monotonic() < deadline:
            try:
                s.send(request)
                time.sleep(0.01)
            except TimeoutError:
                continue
            except ConnectionError:
                dropped = True
        assert dropped


@hardening(18)
@pytest.mark.parametrize("route", ["/", "/v1/chat/completions"])
def test_a_key_may_have_a_prefix_cache_of_its_own(small: Server, route: str) -> None:
    text = (f"{route} " * 200)[:1000]
    body = {"prompt": text, "messages": [{"role": "user", "content": text}], "model": MODEL}

    def hits(name: str) -> float:
        before = gauge(small, "vllm:prefix_cache_hits_total{")
        asked = gauge(small, "vllm:prefix_cache_queries_total{")
        limit = {"max_new_tokens": 1, "max_tokens": 1, "cache_salt": "alice"}
        answer = LOOPBACK.post(f"{small.url}{route}", json={**body, **limit}, headers=bearer(name))
        assert answer.status_code == 200
        while gauge(small, "vllm:prefix_cache_queries_total{") == asked:
            time.sleep(0.05)  # the engine tells after its answer
        return gauge(small, "vllm:prefix_cache_hits_total{") - before

    assert [hits("alice"), hits("bob")] == [0, 0]
    assert hits("alice") > 100 and hits("bob") > 100


@hardening(13)
def test_metrics_need_no_key_where_a_setting_says_so(small: Server) -> None:
    routes = ("/metrics", "/v1/models")
    statuses = [LOOPBACK.get(f"{small.url}{route}").status_code for route in routes]
    assert statuses == [200, 401]


def test_a_key_is_revoked_while_the_server_runs(small: Server, keys_file: Path) -> None:
    def status() -> int:
        return httpx.get(
            f"{small.url}/v1/models", headers=bearer("carol"), trust_env=False
        ).status_code

    assert status() == 200
    kept = keys_file.read_text().splitlines()[:2]
    keys_file.write_text("\n".join(kept) + "\n")
    deadline = time.monotonic() + 5
    while status() != 401:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert logged(small, "API keys read again: 2 in force")
    assert logged(small, "client=bob method=POST")


@hardening(21)
def test_sigterm_finishes_what_was_let_in(small: Server) -> None:
    short = {"prompt": "Count.", "temperature": 2, "max_new_tokens": 100}
    answers: list[httpx.Response] = []

    def ask(route: str, body: dict[str, object]) -> None:
        with httpx.Client(base_url=small.url, timeout=PATIENCE, trust_env=False) as client:
            answers.append(client.post(route, json=body, headers=bearer("bob")))

    chat = {**CHAT, "max_tokens": 100}
    bodies: list[tuple[str, dict[str, object]]] = [
        ("/", short),
        ("/", {**short, "stream": True}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True}),
    ]
    # Twice as many as run at once: what waits is let in too.
    threads = [threading.Thread(target=ask, args=body) for body in bodies * 2]
    for thread in threads:
        thread.start()
    wait_for(small, WAITS, RUNNING)
    small.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    ready = LOOPBACK.get(f"{small.url}/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    refused = LOOPBACK.post(small.url, json=short, headers=bearer("bob"))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    for thread in threads:
        thread.join(PATIENCE)
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all('"finish_reason":"length"' in a.text or '"status": 200' in a.text for a in answers)
    assert small.process.wait(30) == 0
    assert "Traceback" not in small.log.read_text()
