"""Answers on the service's port while the model is loading.

It runs in the supervisor, which imports neither torch nor vLLM, so it answers within a second. The
API processes take over from it (`RunFolder.take_over`).
"""

import http.client
import json
import socket
import ssl
import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any

from service import web
from service.errors import Unavailable, refusal_body
from service.launch.run_folder import RunFolder

_MAX_CONNECTIONS = 256
_MAX_HEADER_BYTES = 65_536
_READ_SECONDS = 5  # for one read
_CONNECTION_SECONDS = 10  # for all reads and writes of a connection
_RETRY_AFTER = 5


class ProgressServer(ThreadingHTTPServer):
    """Answers health checks with the phase of the start, and other requests with 503.

    A browser also gets the chat page, which shows the phase and waits.
    """

    daemon_threads = True

    def __init__(
        self,
        listener: socket.socket,
        tls: ssl.SSLContext | None,
        folder: RunFolder,
        model: str,
        instance: str,
        root_path: str = "",
    ) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.tls = tls
        self.folder = folder
        self.model = model
        self.instance = instance
        self.root_path = root_path
        self.connections = threading.Semaphore(_MAX_CONNECTIONS)
        self.handed_over = False  # whether an API process has taken over

    def start(self) -> None:
        """Answer, in threads, until an API process takes over."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.folder.handover_socket))
        listener.listen()
        for function, argument in ((self.serve_forever, 0.05), (self._hand_over, listener)):
            threading.Thread(target=function, args=(argument,), daemon=True).start()

    def _hand_over(self, listener: socket.socket) -> None:
        """Stop answering when an API process connects; it waits until we close the connection."""
        connection, _ = listener.accept()
        with connection, listener:
            self.shutdown()
            self.server_close()
            self.handed_over = True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        timer = threading.Timer(_CONNECTION_SECONDS, lambda: _end(request))
        timer.daemon = True
        try:
            request.settimeout(_READ_SECONDS)
            if self.tls:
                request = self.tls.wrap_socket(request, server_side=True)
            timer.start()
            super().process_request_thread(request, client_address)
        except OSError:  # the handshake failed, or the client left
            self.shutdown_request(request)
        finally:
            timer.cancel()
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback for a client that disconnects."""


def _end(connection: socket.socket) -> None:
    """End what another thread reads or writes, by an error or the end of its data."""
    with suppress(OSError):  # it is closed
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # SSLSocket's own drops its state


class _Headers:
    """The headers of a request, limited together: the library limits each of them alone."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        self._left = _MAX_HEADER_BYTES

    def readline(self, limit: int) -> bytes:
        line = self._file.readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("headers")
        return line


class _Handler(BaseHTTPRequestHandler):
    server: ProgressServer
    protocol_version = "HTTP/1.1"
    server_version = "chat-service"
    sys_version = ""

    def parse_request(self) -> bool:
        """Read the headers; answers 431 if they are too long."""
        file = self.rfile
        self.rfile = _Headers(file)  # type: ignore[assignment]
        try:
            return super().parse_request()
        finally:
            self.rfile = file

    def _answer(self) -> None:
        phase, percent = self.server.folder.phase()
        headers = {"content-type": "application/json"}
        path = self.path.partition("?")[0].removeprefix(self.server.root_path) or "/"
        if path == "/health/live":
            status, body = 200, json.dumps({"status": "alive"}).encode()
        elif path.startswith("/health"):
            content: dict[str, object] = {"status": phase.value, "model": self.server.model}
            if percent is not None:
                content["percent"] = percent
            status = 503
            body = json.dumps({**content, "instance": self.server.instance}).encode()
        elif (
            path == "/"
            and self.command in ("GET", "HEAD")
            and web.wants_page(self.headers.get("accept"))
        ):
            status, body = 503, web.PAGE.encode()  # the page polls until the model is ready
            headers = {**web.HEADERS, "content-type": "text/html; charset=utf-8"}
        else:
            error = Unavailable(f"the model is not ready yet: {phase}", retry_after=_RETRY_AFTER)
            status, body = error.status, refusal_body(error, uuid.uuid4().hex, path)
            headers["retry-after"] = str(_RETRY_AFTER)
        self._read_body()
        self.send_response_only(status)
        for name, value in {
            **headers,
            "date": self.date_time_string(),
            "content-length": str(len(body)),
            "connection": "close",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is not HTTP without a text: the library's repeats the client's words."""
        self.send_response_only(code)
        self.send_header("connection", "close")
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = _answer

    def _read_body(self) -> None:
        """Read what the client has sent: closing with unread bytes would reset the connection."""
        self.connection.settimeout(0.2)
        deadline = time.monotonic() + 2
        try:
            length = int(self.headers.get("content-length", "0"))
            while length > 0 and time.monotonic() < deadline:
                if not (part := self.rfile.read1(min(length, 65536))):
                    break
                length -= len(part)
        except (OSError, ValueError):
            pass
        self.connection.settimeout(_READ_SECONDS)

    def log_message(self, format: str, *args: Any) -> None:
        """Log no request during the start."""
