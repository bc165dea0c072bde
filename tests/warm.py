"""`chat-service` commands without the import of vLLM: in forks of a process that has imported it.

The import takes more processor time than most commands do besides. All else is as a user has it:
`serve` is a supervisor, a fork server that is its child, and what that forks. What a test shows of
the start itself, it shows with the command as it is typed.
"""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from testing import server
from tests import forker


class Process:
    """A command that was forked, with the part of subprocess.Popen that the tests use."""

    def __init__(
        self, words: Sequence[str], env: Mapping[str, str], files: Sequence[IO[Any] | int]
    ) -> None:
        """`files` are its stdin, stdout and stderr."""
        self._status, theirs = socket.socketpair()
        request = {"words": list(words), "env": dict(env), "folder": os.getcwd()}
        with theirs:
            given = [file if isinstance(file, int) else file.fileno() for file in files]
            forker.send(_forker()[0], request, [theirs.fileno(), *given])
        self.pid = int.from_bytes(self._status.recv(4), "little")
        self.returncode: int | None = None
        assert self.pid, "the process that has imported vLLM has ended"

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                status = self._status.recv(4)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("chat-service", timeout or 0) from None
            self._status.close()
            assert status, "nobody has waited for the end of this process"
            self.returncode = int.from_bytes(status, "little", signed=True)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server(server.Server):
    """`chat-service serve`, whose fork server has nothing left to import."""

    def _start(
        self, command: Sequence[str], output: IO[bytes], env: Mapping[str, str]
    ) -> server.Process:
        assert list(command[1:3]) == ["-m", "service"]
        with open(os.devnull) as nothing:
            return Process(command[3:], env, [nothing, output, output])


def run(
    *words: str, typed: str = "", env: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """`chat-service` with these words, or `python` where the first is "-c".

    `typed` is its input, and `env` goes over the environment of this process.
    """
    with (
        tempfile.TemporaryFile("w+") as input,
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as error,
    ):
        input.write(typed)
        input.seek(0)
        process = Process(words, {**os.environ, **(env or {})}, [input, output, error])
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        output.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(words, status, output.read(), error.read())


@functools.cache
def _forker() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """The process that forks the commands; it ends when the other side of its socket does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forker", str(theirs.fileno())],
            cwd=Path(__file__).parent.parent,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return ours, process
