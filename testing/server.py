"""Start a server as its user would, wait until it answers, and stop it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import psutil

# For requests to servers on this machine: no proxy of the environment is asked.
LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """A port that nothing on loopback uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Process(Protocol):
    """The part of subprocess.Popen that a server needs."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


class Server:
    """One server process and its children; its output goes to `log`."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        port: int,
        env: dict[str, str] | None = None,
        health: str = "/health",
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._health = self.url + health
        with log.open("wb") as output:
            self.process = self._start(command, output, {**self.environment(), **(env or {})})

    def _start(self, command: Sequence[str], output: IO[bytes], env: Mapping[str, str]) -> Process:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )

    @classmethod
    def service(
        cls, log: Path, *arguments: str, port: int | None = None, env: dict[str, str] | None = None
    ) -> Self:
        """`chat-service serve` with these arguments."""
        port = port or free_port()
        command = [sys.executable, "-m", "service", "serve", *arguments, "--port", str(port)]
        return cls(command, log, port=port, env=env, health="/health/ready")

    @staticmethod
    def environment() -> dict[str, str]:
        """This process's, less the keys: who asks the servers has none."""
        return {k: v for k, v in os.environ.items() if not k.startswith("SERVICE_API_KEY")}

    def wait_until_ready(self, seconds: float = 400) -> None:
        """Return when the server answers. Raises RuntimeError with its log when it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                LOOPBACK.open(self._health, timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        status = self.process.poll()
        self.stop()
        raise RuntimeError(f"not ready (exit status {status}):\n{self.log.read_text()[-5000:]}")

    def api_process(self) -> psutil.Process:
        """Who answers HTTP: a child of `chat-service serve`, and the first process of bare vLLM."""
        first = psutil.Process(self.process.pid)
        for process in first.children(recursive=True):
            if " ".join(process.cmdline()).startswith("chat-service server"):
                return process
        return first

    def stop(self) -> int:
        """Ask it to stop, insist after 30 s; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> Self:
        self.wait_until_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
