"""Ready, stalled, failed: what is concluded from what is seen of the engine."""

from service.api.health import Health
from service.phase import Phase


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def health() -> tuple[Health, Clock]:
    clock = Clock()
    return Health(stall_timeout=10, step_timeout=600, clock=clock), clock


def test_an_engine_that_neither_answers_nor_computes_is_stalled_then_failed() -> None:
    state, clock = health()
    clock.now = 10
    assert state.update() is Phase.READY
    clock.now = 10.1
    assert state.update() is Phase.STALLED
    state.answered()
    assert state.update() is Phase.READY
    clock.now = 30
    assert state.update() is Phase.STALLED
    clock.now = 40.1
    assert state.update() is Phase.FAILED
    state.answered()
    assert state.update() is Phase.FAILED


def test_a_step_may_take_long_while_the_engine_computes() -> None:
    state, clock = health()
    for clock.now in range(1, 601):
        state.computed()
        assert state.update() is Phase.READY
    assert state.step_seconds == 600
    clock.now = 601
    state.computed()
    assert state.update() is Phase.STALLED


def test_a_slow_step_lets_later_ones_take_longer() -> None:
    state, clock = health()
    clock.now = 300
    state.computed()
    state.answered()
    state.progressed()
    assert state.step_seconds is None
    for clock.now in range(300, 1501):
        state.computed()
        assert state.update() is Phase.READY
    clock.now = 1501
    state.computed()
    assert state.update() is Phase.STALLED


def test_a_pause_is_no_slow_step() -> None:
    state, clock = health()
    clock.now = 3600  # the service was stopped, and goes on
    state.answered()
    state.progressed()
    for clock.now in range(3600, 4201):
        state.computed()
        assert state.update() is Phase.READY
    clock.now = 4201
    state.computed()
    assert state.update() is Phase.STALLED


def test_an_engine_that_answers_and_does_nothing_about_its_work_is_stalled() -> None:
    state, clock = health()
    for clock.now in range(61):
        state.answered()
        assert state.update() is Phase.READY
    clock.now = 61
    state.answered()
    assert state.update() is Phase.STALLED


def test_an_engine_that_answers_and_computes_for_nothing_is_stalled_later() -> None:
    state, clock = health()
    for clock.now in range(601):
        state.answered()
        state.computed()
        assert state.update() is Phase.READY
    clock.now = 601
    state.answered()
    state.computed()
    assert state.update() is Phase.STALLED


def test_draining_lasts_until_the_end() -> None:
    state, clock = health()
    state.drain()
    clock.now = 1000
    assert state.update() is Phase.DRAINING
    state.fail()
    state.drain()
    assert state.update() is Phase.FAILED
