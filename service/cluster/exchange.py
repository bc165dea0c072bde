"""What the front and a replica send each other: a request, and the parts of its answer."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import NamedTuple

from starlette.types import ASGIApp, Message

# How often a replica that has nothing to send says that it is there.
BEAT_SECONDS = 5.0

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A whole HTTP request."""

    method: str
    path: str
    query: bytes
    headers: Headers
    client: tuple[str, int] | None
    body: bytes


class Part(NamedTuple):
    """A part of an answer. The first has status and headers, the last has not `more`."""

    status: int | None
    headers: Headers
    body: bytes
    more: bool


BEAT = Part(None, (), b"", True)


async def answer(app: ASGIApp, request: Request) -> AsyncGenerator[Part | None, None]:
    """Let an ASGI application answer a request; what is ready together becomes one part.

    First yields None: the application has begun. An empty part says that it still works. When the
    generator is closed, the application sees that the client has left.
    """
    yield None
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": request.method,
        "path": request.path,
        "root_path": "",
        "query_string": request.query,
        "headers": list(request.headers),
        "client": request.client,
    }
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app(scope, receive, messages.put))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        more = True
        while more:
            try:
                async with asyncio.timeout(BEAT_SECONDS):
                    waiting = [await messages.get()]
            except TimeoutError:
                yield BEAT
                continue
            while not messages.empty():
                waiting.append(messages.get_nowait())
            if None in waiting:
                await task  # which raises what has ended the application
            part = _joined(waiting)
            more = part.more
            yield part
    finally:
        left.set()
    await task


def _joined(messages: list[Message | None]) -> Part:
    status: int | None = None
    headers: Headers = ()
    pieces: list[bytes] = []
    more = True
    for message in messages:
        if message is None:  # the application has returned
            more = False
        elif message["type"] == "http.response.start":
            status = message["status"]
            headers = tuple((bytes(name), bytes(value)) for name, value in message["headers"])
        else:
            pieces.append(message.get("body", b""))
            more = more and message.get("more_body", False)
    return Part(status, headers, b"".join(pieces), more)
