"""Is it alive, is it ready, and if not, why: one state machine, which the health routes read.

Pure: who calls says what time it is and what was seen of the engine.
"""

import time
from collections.abc import Callable

from service.phase import PATIENCE, Phase

# A step may take so many times as long as the slowest before it.
_GROWTH = 4
_NOTICEABLE_STEP = 2.0  # seconds


class Health:
    """Of one API process that serves: ready, stalled, draining or failed.

    Slow is not stalled: an engine that computes may take `step_timeout` seconds for a step, or
    four times its slowest step if that is more. It is stalled when it takes longer, or when it does
    nothing: for `stall_timeout` seconds it has not answered and has not computed, or for six times
    as long it has had work and has not computed. It has failed when it stays stalled for
    `stall_timeout` more, and when it is dead.
    """

    def __init__(
        self,
        stall_timeout: float,
        step_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phase = Phase.READY
        self._stall_timeout = stall_timeout
        self._step_timeout = step_timeout
        self._clock = clock
        now = clock()
        self._answered = self._computed = self._progressed = now
        self._stalled_since = now

    @property
    def step_seconds(self) -> float | None:
        """For how long the engine has been at one step; None: not for a time worth telling."""
        seconds = self._clock() - self._answered
        return seconds if seconds > _NOTICEABLE_STEP else None

    def answered(self) -> None:
        """The engine has answered a question, or made a token: it is between two steps."""
        now = self._clock()
        # A process that was stopped for a while has computed nothing meanwhile.
        computed = self._computed - self._answered
        self._step_timeout = max(self._step_timeout, _GROWTH * computed)
        self._answered = now

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
        silent, fruitless = now - self._answered, now - self._progressed
        idle = now - self._computed
        stalled = (
            min(silent, idle) > self._stall_timeout
            or min(fruitless, idle) > self._stall_timeout * PATIENCE
            or max(silent, fruitless) > self._step_timeout
        )
        if not stalled:
            self.phase = Phase.READY
        elif self.phase is Phase.READY:
            self.phase, self._stalled_since = Phase.STALLED, now
        elif now - self._stalled_since > self._stall_timeout:
            self.phase = Phase.FAILED
        return self.phase
