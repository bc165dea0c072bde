"""A network with nothing but loopback, for programs that listen on all interfaces, as Ray does."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_SECONDS_TO_END = 15.0  # Ray's agents look now and then whether their raylet has ended
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def network_of_its_own(*, must_be_empty: bool = True) -> Iterator[None]:
    """Put this thread, and the processes it starts, into a new network until the context ends.

    With `must_be_empty`, what still runs in it some seconds later fails the test. It is killed.
    """
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if _LIBC.unshare(_CLONE_NEWNET) != 0:
        os.close(before)
        reason = os.strerror(ctypes.get_errno())
        pytest.fail(f"NOT RUN: this user may not make network namespaces ({reason}); root may")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    try:
        yield
        deadline = time.monotonic() + _SECONDS_TO_END
        while (left := _processes()) and must_be_empty and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for pid in _processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _LIBC.setns(before, _CLONE_NEWNET)
        os.close(before)
    assert not (left and must_be_empty), f"still running: {left}"


def _processes() -> dict[int, str]:
    """Return pid -> command of the processes in this network, less this one."""
    network = os.readlink("/proc/thread-self/ns/net")
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(folder.name) != os.getpid() and os.readlink(folder / "ns/net") == network:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")[:150]
    return found


def wait_for_end(pid: int, seconds: float) -> None:
    """Wait until a process has ended. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} runs on")
        time.sleep(0.1)
