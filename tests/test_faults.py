"""The engine stops, hangs or is killed under load: everyone is answered, and the server says so."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from testing.server import Server
from tests import slow_step, warm
from tests.conftest import LOOPBACK, MODEL, PATIENCE, hardening

LONG = {"prompt": "Count from one to a thousand.", "temperature": 2, "max_new_tokens": 1900}
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Count from one to a thousand."}],
    "max_tokens": 1900,
    "ignore_eos": True,
}
STALL_SECONDS = 3
# And answers as long as asked for: the YAML's limit holds for /v1 too.
EAGER = ("--set", "engine.enforce_eager=true", "--set", "sampling.max_tokens=2000")


def processes(server: Server, title: str = "") -> list[psutil.Process]:
    """The server's processes with this word in their title; one that ends meanwhile has none."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def ready(server: Server) -> tuple[int, str]:
    answer = LOOPBACK.get(f"{server.url}/health/ready")
    return answer.status_code, answer.json()["status"]


@contextmanager
def in_flight(
    server: Server, headers: dict[str, str] | None = None
) -> Iterator[dict[str, httpx.Response]]:
    """Long requests on both routes, whole and streamed; their answers, once it is left."""
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, route: str, body: dict[str, object]) -> None:
        url = f"{server.url}{route}"
        answers[name] = LOOPBACK.post(url, json=body, headers=headers)

    requests = [
        threading.Thread(target=ask, args=(name, route, {**body, "stream": stream}))
        for name, route, body, stream in (
            ("plain", "/", LONG, False),
            ("streamed", "/", LONG, True),
            ("chat", "/v1/chat/completions", CHAT, False),
            ("streamed chat", "/v1/chat/completions", CHAT, True),
        )
    ]
    for request in requests:
        request.start()
    deadline = time.monotonic() + PATIENCE
    metrics = f"{server.url}/metrics"
    while "service_running_sequences 4.0" not in LOOPBACK.get(metrics, headers=headers).text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    yield answers
    for request in requests:
        request.join(PATIENCE)


def check_unavailable(answers: dict[str, httpx.Response], reason: str) -> None:
    """Every request was answered with 503 and the reason, streams in their last event."""
    for name in ("plain", "chat"):
        assert answers[name].status_code == 503, answers[name].text
        assert answers[name].headers["retry-after"]
        assert reason in answers[name].json()["error"]["message"]
    for name in ("streamed", "streamed chat"):
        events = answers[name].text.removesuffix("data: [DONE]\n\n").strip()
        last = json.loads(events.rpartition("data: ")[2])
        status = last["error"].get("code", last.get("status"))
        assert (status, last["error"]["type"]) == (503, "unavailable")


def check_killed_engine(server: Server, headers: dict[str, str] | None = None) -> None:
    children = processes(server)
    with in_flight(server, headers) as answers:
        began = time.monotonic()
        processes(server, "EngineCore")[0].kill()
    assert time.monotonic() - began < 10, server.log.read_text()
    check_unavailable(answers, "the engine")
    check_gone(server, children, 1)
    assert "error: the engine process has ended" in server.log.read_text()


def check_gone(server: Server, children: list[psutil.Process], status: int) -> None:
    assert server.process.wait(60) == status
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    log = server.log.read_text()
    assert "Traceback" not in log, log


@hardening(20)
def test_a_hung_engine_is_noticed_forgiven_when_it_wakes_and_given_up_when_not(
    tmp_path: Path,
) -> None:
    env = {"SERVICE_STALL_TIMEOUT": str(STALL_SECONDS)}
    with warm.Server.service(tmp_path / "log", *EAGER, env=env) as server:
        children = processes(server)
        (engine,) = processes(server, "EngineCore")
        with in_flight(server) as answers:
            engine.send_signal(signal.SIGSTOP)
            began = time.monotonic()
        assert time.monotonic() - began < STALL_SECONDS + 5
        check_unavailable(answers, "the engine makes no progress")
        assert ready(server) == (503, "stalled")
        assert LOOPBACK.get(f"{server.url}/health").status_code == 503
        assert LOOPBACK.get(f"{server.url}/health/live").status_code == 200
        refused = LOOPBACK.post(server.url, json={"prompt": "hi"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        engine.send_signal(signal.SIGCONT)
        while ready(server) != (200, "ready"):
            assert time.monotonic() - began < 20
            time.sleep(0.1)
        body = {"prompt": "What is the capital of France?"}
        answer = LOOPBACK.post(server.url, json=body)
        assert answer.json()["response"] == "The capital of France is Paris."
        engine.send_signal(signal.SIGSTOP)  # nobody asks for anything this time
        check_gone(server, children, 1)
    assert "error: the engine has stopped making progress" in server.log.read_text()


@hardening(20)
def test_a_slow_step_is_waited_for_and_one_that_does_nothing_is_not(tmp_path: Path) -> None:
    body = {"prompt": "What is the capital of France?"}
    seconds = 24  # twice as long as an engine may answer without doing anything
    # On a busy machine an engine may get no processor for a second.
    env = {"SERVICE_STALL_TIMEOUT": "2", **slow_step.environment(tmp_path)}
    with (
        warm.Server.service(tmp_path / "log", *EAGER, env=env) as server,
        ThreadPoolExecutor() as pool,
    ):
        children = processes(server)
        slow_step.make_next_step(tmp_path, "compute", seconds)
        began = time.monotonic()
        first = pool.submit(LOOPBACK.post, server.url, json=body)
        time.sleep(seconds * 0.7)
        second = pool.submit(LOOPBACK.post, server.url, json=body)
        state = LOOPBACK.get(f"{server.url}/health/ready")
        assert (state.status_code, state.json()["status"]) == (200, "ready")
        assert seconds * 0.4 < state.json()["step_seconds"] < seconds
        assert LOOPBACK.get(f"{server.url}/health").status_code == 200
        for answer in (first.result(), second.result()):
            assert answer.json()["response"] == "The capital of France is Paris."
        assert time.monotonic() - began > seconds
        while "step_seconds" in LOOPBACK.get(f"{server.url}/health/ready").json():
            assert time.monotonic() - began < seconds + 20
            time.sleep(0.1)
        log = server.log.read_text()
        assert "the engine has been at one step for" in log
        assert "no progress" not in log

        slow_step.make_next_step(tmp_path, "sleep", 60)
        answer = LOOPBACK.post(server.url, json=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")
        check_gone(server, children, 1)
    assert "error: the engine has stopped making progress" in server.log.read_text()


@hardening(20)
def test_an_api_process_that_hangs_is_ended(tmp_path: Path) -> None:
    env = {"SERVICE_STALL_TIMEOUT": "1"}
    with warm.Server.service(tmp_path / "log", *EAGER, env=env) as server:
        children = processes(server)
        server.api_process().send_signal(signal.SIGSTOP)
        began = time.monotonic()
        check_gone(server, children, 1)
        assert time.monotonic() - began < 15
    assert "error: the API process has hung; start it again" in server.log.read_text()


@hardening(20)
def test_a_killed_engine_answers_everyone_and_ends(tmp_path: Path) -> None:
    with warm.Server.service(tmp_path / "log", *EAGER) as server:
        check_killed_engine(server)


@hardening(21)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("start", "line", "seconds"),
    [
        (Server.service, "Starting ", 3),  # it imports vLLM
        (warm.Server.service, "Loading the weights", 0),
    ],
)
def test_a_stop_while_loading_ends_at_once(
    tmp_path: Path,
    number: signal.Signals,
    start: Callable[..., Server],
    line: str,
    seconds: float,
) -> None:
    server = start(tmp_path / "log", *EAGER)
    deadline = time.monotonic() + PATIENCE
    while line not in server.log.read_text():
        assert time.monotonic() < deadline and server.process.poll() is None
        time.sleep(0.02)
    time.sleep(seconds)
    children = processes(server)
    began = time.monotonic()
    server.process.send_signal(number)
    check_gone(server, children, 0)
    assert time.monotonic() - began < 5


@hardening(20)
def test_a_killed_supervisor_or_server_leaves_nothing_behind(tmp_path: Path) -> None:
    victims = ("supervisor", "server")
    servers = {victim: warm.Server.service(tmp_path / victim, *EAGER) for victim in victims}
    deadline = time.monotonic() + PATIENCE
    while not all(processes(server, "EngineCore") for server in servers.values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = {victim: processes(server) for victim, server in servers.items()}
    servers["supervisor"].process.kill()
    check_gone(servers["supervisor"], children["supervisor"], -signal.SIGKILL)
    servers["server"].api_process().kill()
    check_gone(servers["server"], children["server"], 1)
    assert "was killed by SIGKILL" in servers["server"].log.read_text()
