"""OpenTelemetry: a span for each request, the parent of the engine's own span.

vLLM sets up the exporter if `engine.otlp_traces_endpoint` is set.
"""

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import MutableHeaders
from starlette.types import Scope

from service.api.record import RequestRecord

_PROPAGATOR = TraceContextTextMapPropagator()


def begin(scope: Scope, record: RequestRecord) -> trace.Span:
    """Start the request's span, as a child of the client's span if it sends one.

    Write it to the request headers, where vLLM's routes look for a parent.
    """
    headers = MutableHeaders(scope=scope)
    parent = _PROPAGATOR.extract(headers)
    tracer = trace.get_tracer("chat_service")
    span = tracer.start_span(scope["method"], parent, kind=trace.SpanKind.SERVER)
    record.trace_headers = {}
    _PROPAGATOR.inject(record.trace_headers, trace.set_span_in_context(span))
    headers.update(record.trace_headers)
    return span


def end(span: trace.Span, scope: Scope, record: RequestRecord, route: str) -> None:
    """End the request's span, with the data of the log line under vLLM's attribute names."""
    span.update_name(f"{scope['method']} {route}")
    attributes = {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": record.status,
        "gen_ai.request.id": record.id,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.generation_tokens,
        "gen_ai.response.finish_reason": record.finish_reason,
        "error.type": record.error,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    if record.status >= 500:
        span.set_status(trace.StatusCode.ERROR)
    span.end()
