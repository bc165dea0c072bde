"""A small OpenTelemetry collector: takes spans by OTLP over HTTP and keeps them."""

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]


class Collector:
    """Keeps the spans that come to its endpoint on loopback."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def of(self, trace: str, count: int) -> list[Span]:
        """The spans of a trace, once there are so many. Raises TimeoutError."""
        deadline = time.monotonic() + 15
        while len(found := [span for span in self.spans if span.trace == trace]) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(found)} of {count} spans")
            time.sleep(0.1)
        return found

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            values = {
                                a.key: getattr(a.value, a.value.WhichOneof("value"))
                                for a in span.attributes
                            }
                            trace, own = span.trace_id.hex(), span.span_id.hex()
                            parent = span.parent_span_id.hex()
                            spans.append(Span(span.name, trace, own, parent, values))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing to say."""

        return Handler

    @contextmanager
    def listening(self) -> Iterator[Self]:
        """While the body runs."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        yield self
        self._server.shutdown()
        self._server.server_close()
