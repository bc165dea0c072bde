"""All our metrics; no other module creates one.

vLLM's own metrics have the prefix `vllm:`. With several API processes prometheus-client adds the
processes up; `multiprocess_mode` says how for a gauge. No label value comes from a request: a route
is a template of the application or `unmatched`, a model is a name in the YAML, and a client is a
name in the operator's file of keys.
"""

from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LAYER_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)

REQUESTS = Counter(
    "service_requests_total",
    "HTTP requests answered, by route template and HTTP status (499: the client went away).",
    ["route", "status"],
)
IN_FLIGHT = Gauge(
    "service_requests_in_flight", "HTTP requests being answered now.", multiprocess_mode="livesum"
)
REQUEST_SECONDS = Histogram(
    "service_request_duration_seconds",
    "From the request's headers to the last byte of its answer.",
    ["route"],
    buckets=_SECONDS,
)
LAYER_SECONDS = Histogram(
    "service_layer_duration_seconds",
    "Time of one answered POST / outside the engine: parsing, prompt, tokens, building the answer.",
    buckets=_LAYER_SECONDS,
)
TOKENS = Counter(
    "service_tokens_total",
    "Tokens that a client's requests gave the engine (kind: prompt) and got from it (generation).",
    ["client", "model", "kind"],
)
CLIENT_REQUESTS = Counter(
    "service_client_requests_total",
    "A client's requests to generating routes, by HTTP status; no model: it ended before one was "
    "known.",
    ["client", "model", "status"],
)
RUNNING = Gauge(
    "service_running_sequences",
    "Sequences that the engine runs.",
    multiprocess_mode="livesum",
)
WAITING = Gauge(
    "service_waiting_sequences",
    "Sequences that wait in the queue for the engine.",
    multiprocess_mode="livesum",
)
QUEUE_SECONDS = Histogram(
    "service_queue_duration_seconds",
    "Time in the queue of requests that reached the engine.",
    buckets=_SECONDS,
)
REFUSED = Counter(
    "service_refused_requests_total",
    "Requests refused or given up: queue_full, waited_too_long, rate_limited, bodies, connections.",
    ["reason"],
)
IDLE_CLOSED = Counter(
    "service_idle_connections_closed_total",
    "Idle connections that were closed to make room for new ones.",
)
FRONT_RETRIES = Counter(
    "service_front_retries_total",
    "Requests that the front of a cluster has sent to another replica of a model.",
    ["model"],
)


def show(clients: Iterable[str], models: Iterable[str]) -> None:
    """Begin the series of these clients and models at 0.

    Prometheus sees no increase in a series that begins above 0.
    """
    models = list(models)
    for client in clients:
        CLIENT_REQUESTS.labels(client, "", 429)
        for model in models:
            for kind in ("prompt", "generation"):
                TOKENS.labels(client, model, kind)
            for status in (200, 429):
                CLIENT_REQUESTS.labels(client, model, status)
