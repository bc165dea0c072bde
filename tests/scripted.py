"""A server for the chat page alone: it streams what a test has written, as fast as it is told."""

import json
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from service import prompting, web

TAGS = ("<think>", "</think>")


class ScriptedServer(ThreadingHTTPServer):
    """Answers each prompt with the pieces in `answers`, under the path `prefix`."""

    daemon_threads = True

    def __init__(self, prefix: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.prefix = prefix
        self.url = f"http://127.0.0.1:{self.server_port}{prefix}/"
        self.answers: dict[str, Iterable[str | bytes]] = {}  # bytes are sent as they are
        self.rate = 0.0  # pieces a second; 0: as fast as the page reads
        self.refuses = False
        # Names, or what /v1/models says of one.
        self.models: list[str | dict[str, str]] = ["scripted"]
        self.index: dict[str, Any] = {
            "model": "scripted",
            "style": "chat",
            "think": None,
            "sampling": {"temperature": 0.7},
            "asks_for_key": False,
        }
        self.bodies: list[dict[str, Any]] = []
        self.paths: set[str] = set()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback for a page that has left."""


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, body: object, status: int = 200) -> None:
        content = {"content-type": "application/json", "retry-after": "7"}
        self._send(status, json.dumps(body).encode(), content)

    def do_GET(self) -> None:
        self.server.paths.add(self.path)
        path = self.path.removeprefix(self.server.prefix)
        if path == "/" and web.wants_page(self.headers["accept"]):
            html = {"content-type": "text/html; charset=utf-8"}
            self._send(200, web.PAGE.encode(), {**web.HEADERS, **html})
        elif path == "/":
            self._json(self.server.index)
        elif path == "/v1/models":
            models = self.server.models
            said = [m if isinstance(m, dict) else {"id": m, "root": m} for m in models]
            self._json({"data": said})
        else:
            self._json({"status": "ready"})

    def do_POST(self) -> None:
        self.server.paths.add(self.path)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        if self.server.refuses:
            self._json({"error": {"message": "full"}}, 429)
            return
        self._send(200, b"", {"content-type": "text/event-stream"})
        text = ""
        pieces = 0
        began = time.monotonic()
        for piece in self.server.answers.get(body["prompt"], [f"I heard: {body['prompt']}"]):
            if isinstance(piece, bytes):
                self.wfile.write(piece)
                continue
            text += piece
            pieces += 1
            if self.server.rate:
                time.sleep(max(0.0, began + pieces / self.server.rate - time.monotonic()))
            self._event({"delta": piece})
        whole: dict[str, Any] = {"response": text}
        answer = text
        if self.server.index["think"]:
            think, answer = prompting.split_thinking(text, TAGS, finished=True)
            whole |= {"think": think, "answer": answer}
        if "history" in body:
            whole["history"] = [*body["history"], [body["prompt"], answer]]
        self._event({**whole, "details": {"finish_reason": "stop", "completion_tokens": pieces}})

    def _event(self, event: object) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
