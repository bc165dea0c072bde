"""Cancel a request: client gone, deadline, engine dead."""

import asyncio
import copy
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive, Scope

from service.errors import ClientGone, DeadlineExceeded, InvalidRequest, RequestError

TIMEOUT_HEADER = "X-Request-Timeout"
MAX_TIMEOUT = 86400.0


def deadline_of(scope: Scope, timeout: float | None = None) -> float | None:
    """Return the request's deadline, in event loop time, or None.

    It comes from `timeout`, which is the body's, or from the header, both in seconds. The shorter
    one counts. Raises InvalidRequest.
    """
    name = TIMEOUT_HEADER.lower().encode()
    for header, value in scope["headers"]:
        if header == name:
            try:
                seconds = float(value)
            except ValueError:
                seconds = math.nan
            if not 0 < seconds <= MAX_TIMEOUT:
                raise InvalidRequest(
                    f"{TIMEOUT_HEADER} is a number of seconds above 0, at most {MAX_TIMEOUT:.0f}",
                    param=TIMEOUT_HEADER,
                )
            timeout = min(seconds, timeout or seconds)
    return None if timeout is None else asyncio.get_running_loop().time() + timeout


class Cancellations:
    """The requests in flight, each of which can be cancelled with its own error."""

    def __init__(self) -> None:
        self._requests: set[_Request] = set()

    def end_all(self, error: RequestError) -> None:
        """Raise `error` in all requests in flight."""
        for request in list(self._requests):
            request.end(copy.copy(error))

    @asynccontextmanager
    async def watch(self, receive: Receive, deadline: float | None) -> AsyncIterator[None]:
        """Run the context until the client disconnects or `deadline` passes.

        Raises ClientGone, DeadlineExceeded, or the error passed to `end_all`, by cancelling the
        current task, and with it the engine's request. Read the HTTP body first.
        """
        task = asyncio.current_task()
        assert task is not None
        request = _Request(task)

        async def watch_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            request.end(ClientGone("the client closed the connection"))

        watcher = asyncio.create_task(watch_client())
        timer = None
        if deadline is not None:
            timer = asyncio.get_running_loop().call_at(deadline, request.end, DeadlineExceeded())
        self._requests.add(request)
        try:
            yield
        except asyncio.CancelledError:
            if request.error is None:
                raise
            task.uncancel()
            raise request.error from None
        finally:
            self._requests.discard(request)
            watcher.cancel()
            if timer:
                timer.cancel()


class _Request:
    def __init__(self, task: "asyncio.Task[object]") -> None:
        self.task = task
        self.error: RequestError | None = None

    def end(self, error: RequestError) -> None:
        if self.error is None:
            self.error = error
            self.task.cancel()
