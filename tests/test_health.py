"""Ready, stalled, failed: what is concluded from what is seen of the engine."""

import socket
import threading
from pathlib import Path

import httpx
import pytest

from service.api.health import Health
from service.launch import progress_server
from service.launch.progress_server import ProgressServer
from service.launch.run_folder import RunFolder
from service.phase import Phase
from tests.conftest import hardening


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def health() -> tuple[Health, Clock]:
    clock = Clock()
    return Health(stall_timeout=10, step_timeout=600, clock=clock), clock


def test_an_engine_that_neither_answers_nor_computes_is_stalled_then_failed() -> None:
    state, clock = health()
    clock.now = 10
    assert state.update() is Phase.READY
    clock.now = 10.1
    assert state.update() is Phase.STALLED
    state.answered()
    assert state.update() is Phase.READY
    clock.now = 30
    assert state.update() is Phase.STALLED
    clock.now = 40.1
    assert state.update() is Phase.FAILED
    state.answered()
    assert state.update() is Phase.FAILED


def test_a_step_may_take_long_while_the_engine_computes() -> None:
    state, clock = health()
    for clock.now in range(1, 601):
        state.computed()
        assert state.update() is Phase.READY
    assert state.step_seconds == 600
    clock.now = 601
    state.computed()
    assert state.update() is Phase.STALLED


def test_a_slow_step_lets_later_ones_take_longer() -> None:
    state, clock = health()
    clock.now = 300
    state.computed()
    state.answered()
    state.progressed()
    assert state.step_seconds is None
    for clock.now in range(300, 1501):
        state.computed()
        assert state.update() is Phase.READY
    clock.now = 1501
    state.computed()
    assert state.update() is Phase.STALLED


def test_a_pause_is_no_slow_step() -> None:
    state, clock = health()
    clock.now = 3600  # the service was stopped, and goes on
    state.answered()
    state.progressed()
    for clock.now in range(3600, 4201):
        state.computed()
        assert state.update() is Phase.READY
    clock.now = 4201
    state.computed()
    assert state.update() is Phase.STALLED


def test_an_engine_that_answers_and_does_nothing_about_its_work_is_stalled() -> None:
    state, clock = health()
    for clock.now in range(61):
        state.answered()
        assert state.update() is Phase.READY
    clock.now = 61
    state.answered()
    assert state.update() is Phase.STALLED


def test_an_engine_that_answers_and_computes_for_nothing_is_stalled_later() -> None:
    state, clock = health()
    for clock.now in range(601):
        state.answered()
        state.computed()
        assert state.update() is Phase.READY
    clock.now = 601
    state.answered()
    state.computed()
    assert state.update() is Phase.STALLED


def test_draining_lasts_until_the_end() -> None:
    state, clock = health()
    state.drain()
    clock.now = 1000
    assert state.update() is Phase.DRAINING
    state.fail()
    state.drain()
    assert state.update() is Phase.FAILED


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_while_it_loads_health_and_page_are_at_the_same_paths(tmp_path: Path, prefix: str) -> None:
    folder = RunFolder(tmp_path)
    folder.set_phase(Phase.LOADING)
    listener = socket.create_server(("127.0.0.1", 0))
    with ProgressServer(listener, None, folder, "a-model", "this one", "/llm") as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}{prefix}"
        with httpx.Client(base_url=url, trust_env=False) as http:
            assert http.get("/health/live").status_code == 200
            assert http.head("/health/live").status_code == 200
            assert http.get("/health/ready").json()["status"] == "loading"
            assert "<!doctype html>" in http.get("/", headers={"accept": "text/html"}).text
            refused = http.post("/v1/messages", json={})
            assert (refused.status_code, refused.json()["type"]) == (503, "error")
        server.shutdown()


@hardening(3)
def test_while_it_loads_who_sends_byte_by_byte_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_server, "_CONNECTION_SECONDS", 1)
    folder = RunFolder(tmp_path)
    folder.set_phase(Phase.LOADING)
    listener = socket.create_server(("127.0.0.1", 0))
    with ProgressServer(listener, None, folder, "a-model", "this one") as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with socket.create_connection(listener.getsockname()) as slow:
            slow.settimeout(0.1)
            ended = False
            for _ in range(100):  # each byte comes within the time for a read
                try:
                    slow.sendall(b"a")
                    ended = slow.recv(1) == b""
                except TimeoutError:
                    continue
                except ConnectionError:
                    ended = True
                if ended:
                    break
            assert ended
        server.shutdown()


@hardening(3)
@pytest.mark.parametrize(("size", "status"), [(65_536, b"200"), (65_537, b"431")])
def test_while_it_loads_headers_are_limited_together(
    tmp_path: Path, size: int, status: bytes
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with ProgressServer(listener, None, RunFolder(tmp_path), "a-model", "this one") as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with socket.create_connection(listener.getsockname()) as client:
            headers = b"a: %s\r\n" % (b"x" * 40_000)
            headers += b"b: %s\r\n\r\n" % (b"x" * (size - len(headers) - 7))
            assert len(headers) == size
            client.sendall(b"GET /health/live HTTP/1.1\r\n" + headers)
            assert client.recv(65_536).startswith(b"HTTP/1.1 " + status)
        server.shutdown()
