"""Is it alive, is it ready, and if not, why: one state machine, which the health routes read.

Pure: who calls says what time it is and what was seen of the engine.
"""

import time
from collections.abc import Callable
from enum import StrEnum


class Phase(StrEnum):
    """Where a server is between its first second and its last."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    COMPILING = "compiling"
    WARMING = "warming"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"
    FAILED = "failed"


# A step may take long, above all on a CPU, and so may a large request. So many times the stall
# timeout an engine may compute without an answer, or answer without a token, and an API process
# may be busy, before it counts as stalled.
PATIENCE = 6


class Health:
    """Of one API process that serves: ready, stalled, draining or failed.

    The engine is stalled when for `stall_timeout` seconds it has not answered and has not computed
    either; or, for six times as long, it has computed without an answer, or has had work and made
    no token. It has failed when it stays so for `stall_timeout` more, and when it is dead.
    """

    def __init__(self, stall_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = Phase.READY
        self._stall_timeout = stall_timeout
        self._clock = clock
        now = clock()
        self._answered = self._computed = self._progressed = now
        self._stalled_since = now

    def answered(self) -> None:
        """The engine has answered a question: its loop turns."""
        self._answered = self._clock()

    def computed(self) -> None:
        """The engine's processes have used the CPU."""
        self._computed = self._clock()

    def progressed(self) -> None:
        """The engine has made tokens, or has nothing to do."""
        self._progressed = self._clock()

    def drain(self) -> None:
        """It is stopping: what was let in is finished, nothing else."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    def fail(self) -> None:
        """The engine is dead, or as good as."""
        self.phase = Phase.FAILED

    def look(self) -> Phase:
        """The phase now, after a look at the clock."""
        now = self._clock()
        if self.phase in (Phase.DRAINING, Phase.FAILED):
            return self.phase
        silent = now - self._answered
        patience = self._stall_timeout * PATIENCE
        stalled = (
            (silent > self._stall_timeout and now - self._computed > self._stall_timeout)
            or silent > patience
            or now - self._progressed > patience
        )
        if not stalled:
            self.phase = Phase.READY
        elif self.phase is Phase.READY:
            self.phase, self._stalled_since = Phase.STALLED, now
        elif now - self._stalled_since > self._stall_timeout:
            self.phase = Phase.FAILED
        return self.phase
