"""Reads the bodies of requests, within limits on size, time, and all of them together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from service.api import metrics
from service.errors import BodyTooLarge, BodyTooSlow, ClientGone, Overloaded
from service.settings import Settings

# How many bodies of the largest size may be held at once.
_MAX_BODIES = 64
_MIN_COUNTED = 65_536  # bytes; smaller bodies are always accepted


def has_body(scope: Scope) -> bool:
    """Whether a request says that it has a body."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def is_form(scope: Scope) -> bool:
    """Whether the body is a multipart form. vLLM's JSON routes refuse a form unread."""
    return Headers(scope=scope).get("content-type", "").lower().startswith("multipart/form-data")


class Bodies:
    """All bodies that one process holds in memory."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.max_body_bytes
        self._timeout = settings.body_timeout
        self._bytes = 0

    @asynccontextmanager
    async def read(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """Read a whole body. It counts as held until the context ends.

        Raises BodyTooLarge, BodyTooSlow, Overloaded, or ClientGone.
        """
        length = Headers(scope=scope).get("content-length", "")
        # Python reads no number of thousands of digits; zeros may precede this one.
        if length.isdecimal() and int(length.lstrip("0")[:20] or "0") > self._limit:
            raise self._too_large()
        body, size = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(self._timeout):
                    await self._read_into(body, receive)
            except TimeoutError:
                raise BodyTooSlow(f"the body did not come within {self._timeout:g} s") from None
            copy, size = bytes(body), len(body)
            body.clear()
            yield copy
        finally:
            self._bytes -= len(body) + size

    async def _read_into(self, body: bytearray, receive: Receive) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("the client closed the connection")
            part = message.get("body", b"")
            body += part
            self._bytes += len(part)
            if len(body) > self._limit:
                raise self._too_large()
            if len(body) > _MIN_COUNTED and self._bytes > _MAX_BODIES * self._limit:
                metrics.REFUSED.labels("bodies").inc()
                raise Overloaded("the server holds too many long bodies already", retry_after=1)
            if not message.get("more_body"):
                return

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is longer than the limit of {self._limit} bytes")
