"""The state machine behind the health routes. Pure: the caller passes what it observes."""

import time
from collections.abc import Callable

from service.phase import PATIENCE, Phase

# A step may take this many times as long as the slowest step before it.
_GROWTH = 4
_NOTICEABLE_STEP = 2.0  # seconds


class Health:
    """The phase of one API process: ready, stalled, draining or failed.

    Slow is not stalled: an engine that uses the CPU may take `step_timeout` seconds for a step, or
    four times its slowest step if that is more. The engine is stalled when a step takes longer, or
    when it does nothing. It does nothing when it has neither answered nor used the CPU for
    `stall_timeout` seconds, or has had work but made no progress and used no CPU for six times as
    long. The engine has failed when it is dead, or stays stalled for another `stall_timeout`.
    """

    def __init__(
        self, stall_timeout: float, step_timeout: float, clock: Callable[[], float] = time.monotonic
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
        """How long the current step has taken so far; None below 2 s."""
        seconds = self._clock() - self._answered
        return seconds if seconds > _NOTICEABLE_STEP else None

    def answered(self) -> None:
        """Note that the engine has answered a call or made a token: it is between two steps."""
        now = self._clock()
        # Count only up to the last CPU use: a process that was stopped has not computed.
        computed = self._computed - self._answered
        self._step_timeout = max(self._step_timeout, _GROWTH * computed)
        self._answered = now

    def computed(self) -> None:
        """Note that the engine's processes have used the CPU."""
        self._computed = self._clock()

    def progressed(self) -> None:
        """Note that the engine has made tokens, or has no work."""
        self._progressed = self._clock()

    def drain(self) -> None:
        """Note that the server is stopping and only finishes accepted requests."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.DRAINING

    def fail(self) -> None:
        """Note that the engine is dead or cannot recover."""
        self.phase = Phase.FAILED

    def update(self) -> Phase:
        """Update the phase by the clock and return it."""
        now = self._clock()
        if self.phase in (Phase.DRAINING, Phase.FAILED):
            return self.phase
        silent, unproductive = now - self._answered, now - self._progressed
        idle = now - self._computed
        stalled = (
            min(silent, idle) > self._stall_timeout
            or min(unproductive, idle) > self._stall_timeout * PATIENCE
            or max(silent, unproductive) > self._step_timeout
        )
        if not stalled:
            self.phase = Phase.READY
        elif self.phase is Phase.READY:
            self.phase, self._stalled_since = Phase.STALLED, now
        elif now - self._stalled_since > self._stall_timeout:
            self.phase = Phase.FAILED
        return self.phase
