"""Ready, stalled, failed: what is concluded from what is seen of the engine."""

from service.health import Health, Phase


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def health() -> tuple[Health, Clock]:
    clock = Clock()
    return Health(stall_timeout=10, clock=clock), clock


def test_an_engine_that_neither_answers_nor_computes_is_stalled_then_failed() -> None:
    state, clock = health()
    clock.now = 10
    assert state.look() is Phase.READY
    clock.now = 10.1
    assert state.look() is Phase.STALLED
    state.answered()
    assert state.look() is Phase.READY
    clock.now = 30
    assert state.look() is Phase.STALLED
    clock.now = 40.1
    assert state.look() is Phase.FAILED
    state.answered()
    assert state.look() is Phase.FAILED


def test_a_long_step_is_no_stall() -> None:
    state, clock = health()
    for clock.now in range(60):
        state.computed()
        state.progressed()
        assert state.look() is Phase.READY
    clock.now = 61
    state.computed()
    assert state.look() is Phase.STALLED


def test_an_engine_that_answers_and_makes_no_tokens_is_stalled() -> None:
    state, clock = health()
    for clock.now in range(60):
        state.answered()
        assert state.look() is Phase.READY
    clock.now = 61
    state.answered()
    assert state.look() is Phase.STALLED


def test_draining_lasts_until_the_end() -> None:
    state, clock = health()
    state.drain()
    clock.now = 1000
    assert state.look() is Phase.DRAINING
    state.fail()
    state.drain()
    assert state.look() is Phase.FAILED
