"""`chat-service` at a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence

import psutil

from tests.conftest import PATIENCE

# Begins a command that Ctrl-C ends also where the tests ignore it, as in the background of a shell.
INTERRUPTED = ("env", "--default-signal=INT")


def run(
    *words: str,
    width: int = 80,
    typed: Sequence[bytes] = (),
    prompt: bytes = b"",
    env: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """The status of a command, and what its terminal shows, without colours.

    Each of `typed` is typed at the next `prompt`.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        # Ctrl-C reaches the processes of which this is the terminal.
        ["setsid", "--ctty", *INTERRUPTED, sys.executable, "-m", "service", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**inherited, "TERM": "xterm", **(env or {})},
    )
    os.close(theirs)
    shown, waiting = b"", list(typed)
    seen = 0
    try:
        while piece := os.read(ours, 10_000):
            shown += piece
            if waiting and (place := shown.find(prompt, seen)) >= 0:
                seen = place + len(prompt)
                # Python reads a Ctrl-C that comes before it waits only with the next key.
                busy = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
                while psutil.Process(process.pid).status() in busy:
                    time.sleep(0.01)
                os.write(ours, waiting.pop(0))
    except OSError:  # how Linux tells that nobody has the other side any more
        pass
    os.close(ours)
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode(errors="replace")
    return process.wait(PATIENCE), text
