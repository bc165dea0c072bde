"""Who is let to the engine, and when: a bounded queue, fair between API keys.

The engine runs a limited number of sequences at once. What comes beyond waits here, where it can
be refused, timed and shared out; vLLM's own queue behind it stays short. Pure asyncio: one
`Admission` belongs to one event loop, and each API process has its own, with its part of the
limits.
"""

import asyncio
import copy
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from service.api import metrics
from service.clients import Client
from service.errors import Overloaded, RequestError, WaitedTooLong

# Clients do not wait longer than this because a header says so (the OpenAI SDK: 60 s).
_MAX_RETRY_AFTER = 60
# Of so many past requests the service rate is taken, or of four times the limit if that is fewer.
_RATE_WINDOW = 64


@dataclass(slots=True, eq=False)
class _Waiter:
    number: int
    cost: int
    started: asyncio.Future[None]


@dataclass(slots=True)
class _Share:
    """One client's part: what it runs, what it has waiting, and how much it was given."""

    weight: float
    running: int = 0
    waiting: int = 0
    # Cost over weight of all that was started: decides between clients that run equally much.
    served: float = 0.0
    # When the requests that were refused have been told to come back, at the latest.
    promised: float = 0.0
    queue: deque[_Waiter] = field(default_factory=deque)


class Admission:
    """A bounded, weighted fair queue in front of the engine.

    `limit` is how many sequences run at once, `queue` how many more may wait, and `queue_timeout`
    for how many seconds. A client alone may use all of both. When several want to run, the next to
    start is of the client that runs least for its weight; and a client that has less than its
    share of the queue is let in though another has filled it, so that at most twice `queue` wait.
    """

    def __init__(
        self,
        limit: int,
        queue: int,
        queue_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self.queue = queue
        self.queue_timeout = queue_timeout
        self.running = 0
        self.waiting = 0
        self._clock = clock
        self._closed: RequestError | None = None
        self._shares: dict[str, _Share] = {}
        # Of what ended by itself lately: its cost, and the seconds for which it ran.
        self._ended: deque[tuple[int, float]] = deque(maxlen=max(8, min(_RATE_WINDOW, 4 * limit)))
        self._busy_since = 0.0
        self._numbers = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self, error: RequestError) -> None:
        """Refuse with `error` what comes from now on; what was let in goes on."""
        self._closed = error

    def open(self) -> None:
        """Let requests in again."""
        self._closed = None

    async def idle(self) -> None:
        """Return when nothing runs or waits."""
        await self._idle.wait()

    def check(self, client: Client, cost: int = 1) -> None:
        """Refuse at once what `slot` would: raises Overloaded, or what `close` was given."""
        if self._closed:
            raise copy.copy(self._closed)
        cost = min(cost, self.limit)
        if self._may_start(cost) or self.waiting + cost <= self.queue:
            return
        share = self._share(client)
        part = self.queue * share.weight / self._active_weight(share)
        if self.queue and share.waiting + cost <= max(1, part):
            return
        metrics.REFUSED.labels("queue_full").inc()
        raise Overloaded(
            f"the server is full: {self.running} sequences run and {self.waiting} wait; "
            "come back after the seconds in the header Retry-After",
            retry_after=self._retry_after(share, cost),
        )

    @asynccontextmanager
    async def slot(self, client: Client, cost: int = 1) -> AsyncIterator[None]:
        """Hold `cost` of the engine's sequences, after waiting for them when it is full.

        Raises Overloaded at once when the queue is full too, WaitedTooLong after `queue_timeout`.
        Cancelling it leaves the queue.
        """
        self.check(client, cost)
        cost = min(cost, self.limit)
        share = self._share(client)
        self._bring_up_to_date(share)
        began = self._clock()
        if self._may_start(cost):
            self._start(share, cost)
        else:
            await self._wait(share, cost)
        metrics.QUEUE_SECONDS.observe(self._clock() - began)
        metrics.ADMITTED.labels(client.name).inc()
        began = self._clock()
        try:
            yield
            # What was given up or failed does not say how long a request takes.
            self._ended.append((cost, self._clock() - began))
        finally:
            self._finish(share, cost)

    async def _wait(self, share: _Share, cost: int) -> None:
        waiter = _Waiter(next(self._numbers), cost, asyncio.get_running_loop().create_future())
        share.queue.append(waiter)
        self._count_waiting(share, cost)
        try:
            async with asyncio.timeout(self.queue_timeout):
                await waiter.started
        except BaseException as e:
            if waiter.started.done() and not waiter.started.cancelled():
                self._finish(share, cost)  # it was its turn, and it is no longer here
            elif waiter in share.queue:
                share.queue.remove(waiter)
                self._count_waiting(share, -cost)
                self._start_waiting()  # what stood behind it may fit
            if isinstance(e, TimeoutError):
                metrics.REFUSED.labels("waited_too_long").inc()
                raise WaitedTooLong(
                    f"it waited {self.queue_timeout:g} s in the queue, which is the limit",
                    retry_after=self._retry_after(share, cost),
                ) from None
            raise

    def _may_start(self, cost: int) -> bool:
        return not self.waiting and self.running + cost <= self.limit

    def _start(self, share: _Share, cost: int) -> None:
        if not self.running:
            self._busy_since = self._clock()
        self.running += cost
        share.running += cost
        share.served += cost / share.weight
        self._idle.clear()
        metrics.RUNNING.set(self.running)

    def _finish(self, share: _Share, cost: int) -> None:
        self.running -= cost
        share.running -= cost
        self._start_waiting()
        if not self.running and not self.waiting:
            self._idle.set()
        metrics.RUNNING.set(self.running)

    def _start_waiting(self) -> None:
        while waiting := [share for share in self._shares.values() if share.queue]:
            share = min(waiting, key=lambda s: (s.running / s.weight, s.served, s.queue[0].number))
            waiter = share.queue[0]
            if waiter.started.cancelled():  # and its task has not run since
                share.queue.popleft()
                self._count_waiting(share, -waiter.cost)
                continue
            if self.running + waiter.cost > self.limit:
                return  # it keeps its turn: smaller ones would pass it for ever
            share.queue.popleft()
            self._count_waiting(share, -waiter.cost)
            self._start(share, waiter.cost)
            waiter.started.set_result(None)

    def _count_waiting(self, share: _Share, cost: int) -> None:
        share.waiting += cost
        self.waiting += cost
        metrics.WAITING.set(self.waiting)

    def _share(self, client: Client) -> _Share:
        share = self._shares.setdefault(client.name, _Share(client.weight))
        share.weight = client.weight  # as it is now: the file of keys may have changed
        return share

    def _bring_up_to_date(self, share: _Share) -> None:
        """No credit for a time in which it asked for nothing."""
        if not share.running and not share.waiting:
            active = [s.served for s in self._shares.values() if s.running or s.waiting]
            share.served = max(share.served, min(active, default=0.0))

    def _active_weight(self, share: _Share) -> float:
        """The weights of the clients that want to run now, `share` among them."""
        return sum(s.weight for s in self._shares.values() if s is share or s.running or s.waiting)

    def _retry_after(self, share: _Share, cost: int) -> int:
        """Seconds until the queue has room for one more of this client's.

        Each refusal is told a later time than the one before, at the rate at which room comes
        free, so that those who obey do not come back all at once.
        """
        now = self._clock()
        if not self._ended:  # nothing says yet how long a request takes, but at least so long
            busy = math.ceil(now - self._busy_since)
            return max(1, min(_MAX_RETRY_AFTER, busy))
        # Little's law: `limit` sequences at a time, each for the mean time that one ran.
        cost_seconds = sum(cost * seconds for cost, seconds in self._ended)
        rate = self.limit * sum(cost for cost, _ in self._ended) / max(cost_seconds, 0.001)
        rate *= share.weight / self._active_weight(share)
        promised = max(share.promised, now) + cost / rate
        share.promised = min(promised, now + _MAX_RETRY_AFTER)
        return max(1, math.ceil(share.promised - now))
