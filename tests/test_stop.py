"""Stopping a server under load: everyone is answered, and the process ends."""

import json
import signal
import threading
import time
from pathlib import Path

import httpx

from benchmarks.server import Server
from tests.conftest import MODEL


def test_sigint_answers_those_who_wait_and_ends(tmp_path: Path) -> None:
    long = {"prompt": "Count from one to a thousand.", "temperature": 2, "max_new_tokens": 1900}
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, route: str, body: dict[str, object]) -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            answers[name] = client.post(route, json=body)

    with Server.service(tmp_path / "log", "--set", "engine.enforce_eager=true") as server:
        requests = [
            threading.Thread(target=ask, args=("plain", "/", long)),
            threading.Thread(target=ask, args=("streamed", "/", {**long, "stream": True})),
        ]
        for request in requests:
            request.start()
        deadline = time.monotonic() + 20
        running = f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 2.0'
        while running not in httpx.get(f"{server.url}/metrics", trust_env=False).text:
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGINT)
        server.process.wait(20)
        for request in requests:
            request.join(5)
    assert answers["plain"].status_code == 503
    assert answers["plain"].json()["error"]["type"] == "unavailable"
    last = json.loads(answers["streamed"].text.strip().rpartition("data: ")[2])
    assert (last["status"], last["error"]["type"]) == (503, "unavailable")
    assert "Traceback" not in (tmp_path / "log").read_text()
