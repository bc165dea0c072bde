"""Connection limits that uvicorn lacks: count, header size and time, clients that do not read."""

import asyncio
import socket
import uuid
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, ClassVar

import uvicorn
from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api import metrics
from service.api.keys import HEALTH
from service.errors import (
    HeadersTooLarge,
    HeadersTooSlow,
    LaunchError,
    MalformedBody,
    RequestError,
    Unavailable,
    refusal_body,
)
from service.settings import Settings

_MAX_HEADERS = 128
_MAX_HEADER_BYTES = 65_536
# So many parts of a body, such as chunks, may be short: each costs the event loop the same time.
_MAX_SHORT_PARTS = 1_000
_SHORT_PART = 64  # bytes, in the mean
_MAX_PIPELINED = 16  # requests that a client sends ahead on one connection
# How long to read and drop what a refused client still sends. Closing at once would reset the
# connection, and the client would lose our response.
_LINGER_SECONDS = 2.0
# Connections above the limit, which accept only health checks.
_SPARE_CONNECTIONS = 64
# How long uvicorn waits at shutdown for responses that are being written.
_GRACE_SECONDS = 5


def guard(
    config: uvicorn.Config,
    settings: Settings,
    max_connections: int,
    route_of: Callable[[str], str] = lambda path: path,
) -> None:
    """Make uvicorn apply the limits, with `max_connections`, to the server of `config`.

    `route_of` returns the route for a path, whose protocol an error takes. Raises
    LaunchError when uvicorn does not use its httptools protocol.
    """
    if config.http_protocol_class is not HttpToolsProtocol:
        raise LaunchError("uvicorn does not use its httptools protocol; install httptools")

    limit = max_connections

    class Limited(GuardedProtocol):
        max_connections = limit
        idle: ClassVar[dict[GuardedProtocol, None]] = {}
        header_timeout = settings.body_timeout
        write_timeout = settings.write_timeout
        route = staticmethod(route_of)

    config.http_protocol_class = Limited
    config.ws_protocol_class = None
    config.timeout_graceful_shutdown = _GRACE_SECONDS


class _Parser:
    """httptools' parser, but it goes on after a request with Upgrade, as RFC 9110, 7.8 allows.

    httptools takes what follows the head for the other protocol, and so loses the body. Java's
    HttpClient offers h2c with each first request.
    """

    def __init__(self, protocol: "GuardedProtocol", parser: HttpRequestParser) -> None:
        self._protocol = protocol
        self._parser = parser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as e:
            protocol = self._protocol
            if protocol._refused:
                return
            if not protocol._ignores_upgrade():
                raise
            again = protocol._head_without_upgrade() + data[e.args[0] :]
            self._parser = HttpRequestParser(protocol)
            self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
            self.feed_data(again)


def _unchunked(cycle: RequestResponseCycle) -> Any:
    """Return a `send` for a client of HTTP/1.0, which knows no chunks (RFC 9112, 6.1).

    A body of unknown length ends with the connection.
    """
    send, ends_with_connection = cycle.send, False

    async def send_unchunked(message: Any) -> None:
        nonlocal ends_with_connection
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message["headers"]}
            ends_with_connection = b"content-length" not in names
            if ends_with_connection:
                cycle.chunked_encoding = False
        elif ends_with_connection:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_unchunked


def _closing(cycle: RequestResponseCycle) -> Any:
    """Return a `send` that closes the connection if the client still waits for `100 Continue`.

    Else it is unknown what comes next: the body, or another request (RFC 9110, 10.1.1).
    """
    send = cycle.send

    async def send_closing(message: Any) -> None:
        if message["type"] == "http.response.start" and cycle.waiting_for_100_continue:
            headers = [*message["headers"], (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return send_closing


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits on connections, headers and slow readers."""

    max_connections: ClassVar[int]
    # Connections without a request, longest idle first. A dict as an ordered set.
    idle: ClassVar[dict["GuardedProtocol", None]]
    header_timeout: ClassVar[float]
    write_timeout: ClassVar[float]
    route: Callable[[str], str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self, self.parser)  # type: ignore[assignment]
        self._unparsed_bytes = 0  # received since headers were complete or a body part came
        self._in_headers = False
        self._header_bytes = 0
        self._parts = 0  # of this request's body
        self._part_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refused = False
        self._spare = False
        # Responses that are not finished. There are several if the client sends requests ahead.
        self._cycles: deque[RequestResponseCycle] = deque()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1)  # call `pause_writing` for any unsent byte
        if (peer := transport.get_extra_info("socket")) is not None and self.client:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # detects vanished clients
        self._start_header_timer()
        if len(self.connections) > self.max_connections:
            self._make_room()
        if not self._refused:
            self.idle[self] = None

    def _make_room(self) -> None:
        """Close the longest idle connection; if none is idle, make this one spare or refuse it."""
        if self.idle:
            metrics.IDLE_CLOSED.inc()
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.transport.close()
            return
        self._spare = True
        if len(self.connections) > self.max_connections + _SPARE_CONNECTIONS:
            self._refuse_connection()

    def _refuse_connection(self, path: str = "/") -> None:
        metrics.REFUSED.labels("connections").inc()
        self._refuse(
            Unavailable(
                f"the server has {self.max_connections} connections open, which is the limit",
                retry_after=1,
            ),
            path,
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self.idle.pop(self, None)
        self._cancel(self._header_timer)
        self._cancel(self._write_timer)
        for cycle in self._cycles:  # uvicorn notifies only the last one
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > _MAX_HEADER_BYTES:
            self._refuse_headers()
        elif not self._cycles and self._header_timer is None:
            self._start_header_timer()  # data came, but not yet complete headers

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.idle.pop(self, None)
        self._in_headers = True
        self._header_bytes = self._parts = self._part_bytes = 0
        self._stop_header_timer()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # uvicorn must not take a trailer for a header (RFC 9110, 6.5.1)
            super().on_header(name, value)
        self._header_bytes += len(name) + len(value)
        if len(self.headers) > _MAX_HEADERS or self._header_bytes > _MAX_HEADER_BYTES:
            self._refuse_headers()

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = 0
        self._in_headers = False
        self._stop_header_timer()
        if self._ignores_upgrade():
            return  # `_Parser` gives the request again
        path = self.url.partition(b"?")[0].decode("latin-1")
        self._spare = self._spare and len(self.connections) > self.max_connections
        if self._spare and not path.endswith(tuple(HEALTH)):  # a proxy may keep its prefix
            self._refuse_connection(self.route(path))
        if len(self._cycles) >= _MAX_PIPELINED:
            self._refuse(HeadersTooLarge(f"at most {_MAX_PIPELINED} requests may be sent ahead"))
        if not self._refused:
            if self.parser.get_http_version() == "1.0":  # which knows no 1xx (RFC 9110, 10.1.1)
                self.expect_100_continue = False
            super().on_headers_complete()
            if self.scope["http_version"] == "1.0":
                self.cycle.send = _unchunked(self.cycle)  # type: ignore[method-assign]
            elif self.expect_100_continue:
                self.cycle.send = _closing(self.cycle)  # type: ignore[method-assign]
            self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        if self._refused:
            return
        self._parts += 1
        self._part_bytes += len(body)
        if self._parts > max(_MAX_SHORT_PARTS, self._part_bytes // _SHORT_PART):
            self._refuse_parts()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused and not self._ignores_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        cycle = self._cycles.popleft()
        super().on_response_complete()
        if cycle.more_body:  # it was answered before its body was read
            self._stop_header_timer()
            self._header_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
        elif self._in_headers and not self._cycles:
            self._start_header_timer()  # of the next request, sent ahead
        elif not self._cycles and not self.transport.is_closing():
            self.idle[self] = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel(self._write_timer)
        self._write_timer = self.loop.call_later(self.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel(self._write_timer)

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            super().send_400_response(msg)

    def _ignores_upgrade(self) -> bool:
        """Whether this request asks for an upgrade, which we ignore."""
        upgrades: bool = self.parser.should_upgrade()
        return upgrades and self.parser.get_method() != b"CONNECT"

    def _head_without_upgrade(self) -> bytes:
        """Return the head of the request that has just come, without the header Upgrade."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % (name, v) for name, v in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _stop_header_timer(self) -> None:
        self._cancel(self._header_timer)
        self._header_timer = None

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout, self._refuse_slow_headers)

    def _refuse_slow_headers(self) -> None:
        self._refuse(HeadersTooSlow(f"the headers did not come within {self.header_timeout:g} s"))

    def _refuse_headers(self) -> None:
        self._refuse(
            HeadersTooLarge(
                f"a request has at most {_MAX_HEADERS} headers, of {_MAX_HEADER_BYTES} bytes"
            )
        )

    def _refuse_parts(self) -> None:
        """Answer in place of the application, for which the client has left."""
        if self.cycle.response_started:
            self._refused = True
            self.transport.close()
            return
        cycle = self._cycles.pop()
        cycle.disconnected = True
        cycle.message_event.set()
        error = MalformedBody(
            f"a body has at most {_MAX_SHORT_PARTS} parts of less than {_SHORT_PART} bytes; send "
            "it in longer ones"
        )
        self._refuse(error, self.route(self.scope["path"]))

    def _refuse(self, error: RequestError, path: str = "/") -> None:
        """Answer with an error in the form of `path`, "/" where none is known yet, and close."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if self._cycles:  # let these finish; uvicorn closes after the last one
            self._cycles[-1].keep_alive = False
            return
        body = refusal_body(error, uuid.uuid4().hex, path)
        retry_after = f"retry-after: {error.retry_after}\r\n" if error.retry_after else ""
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            f"content-type: application/json\r\n{retry_after}"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    @staticmethod
    def _cancel(timer: asyncio.TimerHandle | None) -> None:
        if timer:
            timer.cancel()
