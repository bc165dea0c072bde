"""Sends one request to a replica, and to another where the first is lost before it answers."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.types import Receive, Send

from service.api import metrics
from service.api.cancellation import TIMEOUT_HEADER
from service.api.record import REQUEST_ID
from service.api.refusal import refusal_event
from service.cluster.exchange import BEAT, BEAT_SECONDS, Part, Request
from service.errors import (
    ClientGone,
    DeadlineExceeded,
    RequestError,
    Unavailable,
    WaitedTooLong,
)

_logger = logging.getLogger("service")

# How many replicas a request is offered to, and the pause between two, in seconds.
_ATTEMPTS = 4
_PAUSE = 0.25
# A request may be what ends replicas, so it does not get them all.
_MAX_LOST = 2
# A replica that has sent nothing for so long has hung, or its machine has.
_SILENCE = 4 * BEAT_SECONDS
# A replica answers 503 with these words to a request that has waited as long as any may.
_WAITED = b"in the queue, which is the limit"
# And with these words of `EngineDead` when it is about to end.
_ENDED = b"the server is restarting"
# A stream's body is counted in events for the sequence number of an error event.
_EVENT_END = b"\n\n"


class ReplicaLost(Exception):
    """The replica has ended before its answer was complete."""


class ReplicaHandles(Protocol):
    """The replicas of all models."""

    def answer(self, model: str, request: Request) -> AsyncGenerator[Part | None, None]:
        """Let one replica of a model answer. The first part is None: the replica has begun.

        Raises ReplicaLost.
        """

    async def metrics(self) -> Sequence[tuple[dict[str, str], str]]:
        """Return labels and text of the metrics of each replica."""


async def forward(
    replicas: ReplicaHandles,
    model: str,
    request: Request,
    exchange: "Exchange",
    queue_timeout: float,
    deadline: float | None,
) -> None:
    """Let replicas of `model` answer, until one does. Raises RequestError.

    `queue_timeout` is how long it may wait for one, in seconds; `deadline` is the client's, in the
    event loop's time.
    """
    try:
        async with asyncio.timeout_at(deadline) as limit:
            await _offer(replicas, model, request, exchange, queue_timeout, limit)
    except TimeoutError:
        raise DeadlineExceeded from None


async def _offer(
    replicas: ReplicaHandles,
    model: str,
    request: Request,
    exchange: "Exchange",
    queue_timeout: float,
    limit: asyncio.Timeout,
) -> None:
    """As `forward`. `limit` holds while no replica has the request, which keeps the time itself.

    One that hangs does not, so it has little more.
    """
    client_deadline = limit.when()
    deadline = time.monotonic() + queue_timeout
    tried = lost = 0
    while tried < _ATTEMPTS and lost < _MAX_LOST and not exchange.started:
        offered = _with_deadline(request, client_deadline)
        async with aclosing(replicas.answer(model, offered)) as parts:
            if not await _begun(parts, deadline):
                continue
            limit.reschedule(None if client_deadline is None else client_deadline + BEAT_SECONDS)
            exchange.at_replica = True
            if tried:
                metrics.FRONT_RETRIES.labels(model).inc()
            tried += 1
            try:
                if await _relayed(parts, exchange, last=tried == _ATTEMPTS):
                    return
            except ReplicaLost:
                _logger.warning("a replica of %s was lost during a request", model)
                lost += 1
        exchange.at_replica = False
        limit.reschedule(client_deadline)
        deadline = time.monotonic() + queue_timeout
        await asyncio.sleep(_PAUSE * tried)
    raise Unavailable("the replica that answered was lost; send it again", retry_after=5)


async def _begun(parts: AsyncGenerator[Part | None, None], deadline: float) -> bool:
    """Wait for a replica to begin. Returns whether it did; else another may. Raises WaitedTooLong.

    A replica that hangs or ends before it begins does so whatever the request is. It does not count
    as an attempt. It gets no more than half of the time, so that another has some.
    """
    try:
        async with asyncio.timeout(min(_SILENCE, max(0, deadline - time.monotonic()) / 2)):
            await anext(parts)
    except (ReplicaLost, TimeoutError):
        if time.monotonic() + _PAUSE > deadline:
            raise WaitedTooLong("no replica is up; send it again later", retry_after=10) from None
        await asyncio.sleep(_PAUSE)
        return False
    return True


async def _relayed(
    parts: AsyncGenerator[Part | None, None], exchange: "Exchange", *, last: bool
) -> bool:
    """Send what a replica answers. Returns whether it did; else another may. Raises ReplicaLost.

    A head goes with the first piece of the body: until then another replica may still answer.
    """
    head: Part | None = None
    while True:
        try:
            async with asyncio.timeout(_SILENCE):
                part = await anext(parts, None)
        except (ReplicaLost, TimeoutError):
            if exchange.complete:
                return True
            raise ReplicaLost from None
        if part is None:
            return True
        if part.status == 503 and _ENDED in part.body:
            raise ReplicaLost
        if part.status == 503 and not last and _WAITED not in part.body:
            return False
        if part == BEAT:
            continue
        if head is not None:
            part = part._replace(status=head.status, headers=head.headers)
            head = None
        elif part.status is not None and part.more and not part.body:
            head = part
            continue
        await exchange.send(part)


class Exchange:
    """The answer to one request, as far as it was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.complete = False
        self.at_replica = False  # whether a replica has begun with it
        self._events: int | None = None  # of a stream

    async def run(self, work: Coroutine[Any, Any, None], receive: Receive) -> None:
        """Do `work`, which answers, and cancel it when the client leaves before the end.

        Serve does so too, unless a header of the request tells it not to. Raises ClientGone.
        """

        async def left() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not (tasks[0].done() or self.complete):
                raise ClientGone("the client closed the connection")
            await tasks[0]
        finally:
            for task in tasks:
                task.cancel()

    async def send(self, part: Part) -> None:
        if part.status is not None:
            self.started = True
            if any(value.startswith(b"text/event-stream") for _, value in part.headers):
                self._events = 0
            await self._send(
                {
                    "type": "http.response.start",
                    "status": part.status,
                    # Serve sets the id.
                    "headers": [h for h in part.headers if h[0] != REQUEST_ID.encode()],
                }
            )
        if self._events is not None:
            self._events += part.body.count(_EVENT_END)
        self.complete = not part.more
        await self._send({"type": "http.response.body", "body": part.body, "more_body": part.more})

    async def end(self, error: RequestError, request_id: str, path: str) -> None:
        """End an answer that has begun: a stream with an error, in the form of its protocol."""
        if self._events is not None and not self.complete:
            event = refusal_event(error, request_id, path, self._events)
            await self._send({"type": "http.response.body", "body": event})


def _with_deadline(request: Request, deadline: float | None) -> Request:
    """Return the request with the time that it has left: a replica counts from when it begins."""
    if deadline is None:
        return request
    left = max(deadline - asyncio.get_running_loop().time(), 0.001)
    header = (TIMEOUT_HEADER.lower().encode(), f"{left:.3f}".encode())
    return dataclasses.replace(request, headers=(*request.headers, header))
