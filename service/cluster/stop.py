"""Signals that ask a command for its end."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any


def on_signals(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Let `handler` have SIGTERM, SIGINT, and SIGHUP unless `nohup` has it ignored.

    To be called after Ray has started, which takes SIGTERM for itself.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Stop:
    """Notes a signal; a second one ends the command at once."""

    def __init__(self) -> None:
        self.requested = False
        on_signals(self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
