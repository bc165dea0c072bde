"""The queue: bounded, fair, and honest about when to come back."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from service.api.admission import Admission
from service.clients import Client
from service.errors import Overloaded, Unavailable, WaitedTooLong
from tests.conftest import hardening

ALICE, BOB = Client("alice"), Client("bob")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


class Requests:
    """Requests that hold their slot until they are told to end, in the order they started."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.running: list[tuple[str, asyncio.Event]] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def add(self, client: Client, count: int = 1, cost: int = 1) -> None:
        async def hold() -> None:
            async with self.admission.slot(client, cost):
                end = asyncio.Event()
                self.running.append((client.name, end))
                await end.wait()

        self.tasks += [asyncio.create_task(hold()) for _ in range(count)]
        await asyncio.sleep(0)

    async def end(self, count: int = 1) -> None:
        for _ in range(count):
            self.running.pop(0)[1].set()
            for _ in range(4):
                await asyncio.sleep(0)

    def names(self) -> Counter[str]:
        return Counter(name for name, _ in self.running)


@hardening(22)
def test_what_does_not_fit_waits_and_then_is_refused() -> None:
    async def scenario() -> None:
        admission = Admission(limit=2, queue=3, queue_timeout=60)
        requests = Requests(admission)
        await requests.add(ALICE, 5)
        assert (admission.running, admission.waiting) == (2, 3)
        with pytest.raises(Overloaded) as refused:
            async with admission.slot(ALICE):
                pass
        assert refused.value.retry_after == 1
        await requests.end(5)
        assert (admission.running, admission.waiting) == (0, 0)
        await admission.idle()

    run(scenario)


@hardening(22)
def test_the_next_is_of_who_runs_least_for_its_weight() -> None:
    async def scenario() -> None:
        admission = Admission(limit=8, queue=500, queue_timeout=60)
        requests = Requests(admission)
        await requests.add(ALICE, 500)
        await requests.add(BOB, 20)
        await requests.end(8)  # Alice's first eight, who had come before Bob
        assert requests.names() == {"alice": 4, "bob": 4}
        await requests.end(8)
        assert requests.names() == {"alice": 4, "bob": 4}
        await requests.add(Client("carol", weight=2), 20)
        await requests.end(8)
        assert requests.names() == {"alice": 2, "bob": 2, "carol": 4}

    run(scenario)


@hardening(22)
def test_a_full_queue_still_has_room_for_a_client_below_its_share() -> None:
    async def scenario() -> None:
        admission = Admission(limit=1, queue=10, queue_timeout=60)
        requests = Requests(admission)
        await requests.add(ALICE, 11)
        await requests.add(BOB, 5)
        assert admission.waiting == 15
        for client in (ALICE, BOB):  # both have their half now, or more
            with pytest.raises(Overloaded):
                admission.check(client)

    run(scenario)


def test_a_large_request_is_not_passed_for_ever_by_small_ones() -> None:
    async def scenario() -> None:
        admission = Admission(limit=4, queue=20, queue_timeout=60)
        requests = Requests(admission)
        await requests.add(ALICE, 4)
        await requests.add(BOB, cost=4)
        await requests.add(ALICE, 4)
        await requests.end(3)
        assert (admission.running, requests.names()) == (1, {"alice": 1})
        await requests.end()
        assert (admission.running, requests.names()) == (4, {"bob": 1})
        await requests.add(BOB, cost=100)  # as much as there is, no more
        await requests.end(1)
        await requests.end(4)
        assert (admission.running, requests.names()) == (4, {"bob": 1})

    run(scenario)


def test_who_leaves_the_queue_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        admission = Admission(limit=1, queue=10, queue_timeout=60)
        requests = Requests(admission)
        await requests.add(ALICE, 4)
        requests.tasks[1].cancel()
        await asyncio.sleep(0)
        assert admission.waiting == 2
        requests.tasks[2].cancel()
        await requests.end()  # its turn comes before it has noticed
        assert (admission.running, admission.waiting) == (1, 0)
        await requests.add(ALICE, 2)
        # Its turn comes and it leaves, in one step of the loop.
        requests.running[0][1].set()
        await asyncio.sleep(0)
        requests.tasks[4].cancel()
        await asyncio.sleep(0.01)
        assert (admission.running, admission.waiting) == (1, 0)
        requests.tasks[5].cancel()
        await asyncio.sleep(0.01)
        assert (admission.running, admission.waiting) == (0, 0)

    run(scenario)


def test_waiting_has_an_end() -> None:
    async def scenario() -> None:
        admission = Admission(limit=1, queue=10, queue_timeout=0.01)
        requests = Requests(admission)
        await requests.add(ALICE)
        with pytest.raises(WaitedTooLong) as refused:
            async with admission.slot(BOB):
                pass
        assert (refused.value.status, refused.value.retry_after) == (503, 1)
        assert admission.waiting == 0

    run(scenario)


def test_the_end_of_waiting_moves_while_the_engine_is_at_one_step() -> None:
    async def scenario() -> None:
        admission = Admission(limit=1, queue=10, queue_timeout=0.1)
        requests = Requests(admission)
        await requests.add(ALICE)
        await requests.add(BOB)
        admission.extend(10)
        await asyncio.sleep(0.3)
        assert admission.waiting == 1 and not requests.tasks[1].done()

    run(scenario)


@hardening(22)
def test_retry_after_is_when_there_is_room_at_the_rate_measured() -> None:
    async def scenario() -> None:
        clock = Clock()
        admission = Admission(limit=4, queue=4, queue_timeout=60, clock=clock)
        requests = Requests(admission)

        def told(client: Client = ALICE) -> int:
            with pytest.raises(Overloaded) as refused:
                admission.check(client)
            assert refused.value.retry_after is not None
            return refused.value.retry_after

        await requests.add(ALICE, 8)
        clock.now = 7
        assert told() == 7  # nothing has ended yet, so nothing will sooner
        for _ in range(10):  # one ends every two seconds
            clock.now += 2
            await requests.end()
            await requests.add(ALICE)
        # They ran 9.6 s on average, four at a time: those who obey come back one by one.
        assert [told() for _ in range(4)] == [3, 5, 8, 10]
        clock.now += 60
        assert [told() for _ in range(50)][-1] == 60
        await requests.end(8)
        clock.now += 3600  # the rate is that of a full engine, whatever was between
        await requests.add(ALICE, 8)
        await requests.end(4)
        await requests.add(ALICE, 4)
        assert told() < 10
        # Half of the rate is Bob's, whose refusals do not count for Alice's.
        await requests.add(BOB, 2)
        assert told(BOB) < told()

    run(scenario)


def test_a_closed_queue_finishes_what_it_has() -> None:
    async def scenario() -> None:
        admission = Admission(limit=1, queue=10, queue_timeout=60)
        requests = Requests(admission)
        await requests.add(ALICE, 3)
        admission.close(Unavailable("stopping", retry_after=5))
        with pytest.raises(Unavailable, match="stopping"):
            admission.check(ALICE)
        await requests.end(3)
        await asyncio.wait_for(admission.idle(), 1)
        admission.open()
        admission.check(ALICE)

    run(scenario)
