"""Admits requests to the engine: a bounded queue, fair between API keys.

The engine runs a limited number of sequences at once. Other requests wait here, so that they can be
refused, time out and take turns; vLLM's own queue stays short. Pure asyncio: an `Admission` belongs
to one event loop. Each API process has its own, with its part of the limits.
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

# Seconds. Clients ignore a longer Retry-After (the OpenAI SDK's maximum is 60 s).
_MAX_RETRY_AFTER = 60
# The service rate is computed from this many past requests, or from 4 * limit if that is fewer.
_RATE_WINDOW = 64


@dataclass(slots=True, eq=False)
class _Waiter:
    number: int
    cost: int
    started: asyncio.Future[None]
    timeout: asyncio.Timeout


@dataclass(slots=True)
class _Share:
    """One client's running and waiting sequences, and what it was served so far."""

    weight: float
    running: int = 0
    waiting: int = 0
    # Sum of cost / weight of all started requests: decides between clients that run equally much.
    served: float = 0.0
    # Clock time of the latest Retry-After that a refused request was sent.
    retry_at: float = 0.0
    queue: deque[_Waiter] = field(default_factory=deque)


class Admission:
    """A bounded, weighted fair queue in front of the engine.

    `limit` is how many sequences run at once, `queue` how many more may wait, and `queue_timeout`
    how many seconds one may wait. A single client may use all of both. With several clients, the
    one with the fewest running sequences for its weight starts next. A client below its share of
    the queue, which is one at least, is accepted even when others have filled it. So more than
    `queue` may wait: of each client at most its share among those that are here when it comes.
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
        # (cost, seconds) of recently finished requests.
        self._finished: deque[tuple[int, float]] = deque(
            maxlen=max(8, min(_RATE_WINDOW, 4 * limit))
        )
        self._busy_since = 0.0
        self._numbers = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self, error: RequestError) -> None:
        """Refuse new requests with `error`; accepted ones go on."""
        self._closed = error

    def open(self) -> None:
        """Accept requests again."""
        self._closed = None

    def extend(self, seconds: float) -> None:
        """Let all that wait do so for longer: the engine is at one long step."""
        for share in self._shares.values():
            for waiter in share.queue:
                if (end := waiter.timeout.when()) and not waiter.timeout.expired():
                    waiter.timeout.reschedule(end + seconds)

    async def idle(self) -> None:
        """Wait until nothing runs or waits."""
        await self._idle.wait()

    def check(self, client: Client, cost: int = 1) -> None:
        """Raise what `slot` would raise at once: Overloaded, or the error passed to `close`."""
        if self._closed:
            raise copy.copy(self._closed)
        cost = min(cost, self.limit)
        if self._may_start(cost) or self.waiting + cost <= self.queue:
            return
        share = self._share(client)
        fair_share = self.queue * share.weight / self._active_weight(share)
        if self.queue and share.waiting + cost <= max(1, fair_share):
            return
        metrics.REFUSED.labels("queue_full").inc()
        raise Overloaded(
            f"the server is full: {self.running} sequences run and {self.waiting} wait; "
            "come back after the seconds in the header Retry-After",
            retry_after=self._retry_after(share, cost),
        )

    @asynccontextmanager
    async def slot(self, client: Client, cost: int = 1) -> AsyncIterator[None]:
        """Wait for `cost` of the engine's sequences, and hold them in the context.

        Raises Overloaded at once when the queue is full, WaitedTooLong after `queue_timeout`.
        Cancelling it leaves the queue.
        """
        self.check(client, cost)
        cost = min(cost, self.limit)
        share = self._share(client)
        self._drop_credit(share)
        began = self._clock()
        if self._may_start(cost):
            self._start(share, cost)
        else:
            await self._wait(share, cost)
        metrics.QUEUE_SECONDS.observe(self._clock() - began)
        began = self._clock()
        try:
            yield
            # Only on success: a cancelled or failed request does not show how long one takes.
            self._finished.append((cost, self._clock() - began))
        finally:
            self._finish(share, cost)

    async def _wait(self, share: _Share, cost: int) -> None:
        started = asyncio.get_running_loop().create_future()
        timeout = asyncio.timeout(self.queue_timeout)
        waiter = _Waiter(next(self._numbers), cost, started, timeout)
        share.queue.append(waiter)
        self._count_waiting(share, cost)
        try:
            async with timeout:
                await waiter.started
        except BaseException as e:
            if waiter.started.done() and not waiter.started.cancelled():
                self._finish(share, cost)  # it was started, but will not run
            elif waiter in share.queue:
                share.queue.remove(waiter)
                self._count_waiting(share, -cost)
                self._start_waiting()  # the next in the queue may fit
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
            if waiter.started.cancelled():  # its task has not yet removed it
                share.queue.popleft()
                self._count_waiting(share, -waiter.cost)
                continue
            if self.running + waiter.cost > self.limit:
                return  # it keeps its turn, or smaller ones would overtake it for ever
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
        share.weight = client.weight  # the file of keys may have changed
        return share

    def _drop_credit(self, share: _Share) -> None:
        """Give a client no credit for the time in which it had no requests."""
        if not share.running and not share.waiting:
            active = [s.served for s in self._shares.values() if s.running or s.waiting]
            share.served = max(share.served, min(active, default=0.0))

    def _active_weight(self, share: _Share) -> float:
        """Return the sum of weights of all clients with requests, including `share`."""
        return sum(s.weight for s in self._shares.values() if s is share or s.running or s.waiting)

    def _retry_after(self, share: _Share, cost: int) -> int:
        """Return the seconds until the queue has room for one more request of this client.

        Each refusal gets a later time than the one before, spaced at the service rate, so that
        obedient clients do not all retry at once.
        """
        now = self._clock()
        if not self._finished:  # a request takes at least as long as the engine has been busy
            busy = math.ceil(now - self._busy_since)
            return max(1, min(_MAX_RETRY_AFTER, busy))
        # Little's law: `limit` sequences run at once, each for the mean duration.
        cost_seconds = sum(cost * seconds for cost, seconds in self._finished)
        rate = self.limit * sum(cost for cost, _ in self._finished) / max(cost_seconds, 0.001)
        rate *= share.weight / self._active_weight(share)
        retry_at = max(share.retry_at, now) + cost / rate
        share.retry_at = min(retry_at, now + _MAX_RETRY_AFTER)
        return max(1, math.ceil(share.retry_at - now))
