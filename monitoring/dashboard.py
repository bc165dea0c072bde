"""The Grafana dashboard; `python monitoring/dashboard.py` writes it to dashboard.json."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("dashboard.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Series of a cluster have labels `model` and `replica`. Those of `serve` have none, and match `.*`.
CHOSEN = 'instance=~"$instance",model=~"$model"'
# What clients ask for: neither probes nor Prometheus itself.
ASKED = f'{CHOSEN},route!~"/health.*|/ping|/metrics"'
FAILED = "429|499|5.."
COLUMNS, HEIGHT = 3, 8
WIDTH = 24 // COLUMNS  # of Grafana's 24


class Panel(NamedTuple):
    """One graph: a query and its legend for each line, or for each kind of line."""

    title: str
    unit: str
    queries: list[tuple[str, str]]
    description: str = ""


def rate(metric: str, *by: str, labels: str = CHOSEN) -> str:
    grouped = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{grouped} (rate({metric}{{{labels}}}[$__rate_interval]))"


def gauge(metric: str) -> str:
    return f"sum ({metric}{{{CHOSEN}}})"


def quantiles(
    histogram: str, *percents: int, name: str = "", labels: str = CHOSEN
) -> list[tuple[str, str]]:
    buckets = rate(f"{histogram}_bucket", "le", labels=labels)
    return [
        (f"histogram_quantile({percent / 100:g}, {buckets})", f"{name} p{percent}".strip())
        for percent in percents
    ]


ROWS: dict[str, list[Panel]] = {
    "Requests": [
        Panel(
            "Requests by route and status",
            "reqps",
            [
                (
                    rate("service_requests_total", "route", "status", labels=ASKED),
                    "{{route}} {{status}}",
                )
            ],
            "As clients saw them, without probes. 499: the client left before its answer.",
        ),
        Panel(
            "Refused by reason",
            "reqps",
            [(rate("service_refused_requests_total", "reason"), "{{reason}}")],
            "queue_full and bodies: 429 at once. rate_limited: 429 by a limit of the key. "
            "waited_too_long: 503 after SERVICE_QUEUE_TIMEOUT.",
        ),
        Panel(
            "Share that did not get an answer",
            "percentunit",
            [
                (
                    rate("service_requests_total", "status", labels=f'{ASKED},status=~"{FAILED}"')
                    + f" / scalar({rate('service_requests_total', labels=ASKED)})",
                    "{{status}}",
                )
            ],
            "429: refused. 499: the client left. 5xx: failed, or waited too long.",
        ),
        Panel(
            "In flight",
            "short",
            [(gauge("service_requests_in_flight"), "requests")],
            "HTTP requests being answered, waiting ones too; the scrape that tells it is one.",
        ),
        Panel(
            "Requests by client",
            "reqps",
            [
                (
                    rate("service_client_requests_total", "client", "status"),
                    "{{client}} {{status}}",
                )
            ],
            "To routes that generate, by the name of the API key. 429 and 503: refused.",
        ),
        Panel(
            "Finished by reason",
            "reqps",
            [(rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}")],
            "stop: the model was done. length: cut at its limit. vLLM does not count who left or "
            "whose deadline passed: they are the statuses 499 and 504.",
        ),
    ],
    "Latency": [
        Panel(
            "Time to first token",
            "s",
            quantiles("vllm:time_to_first_token_seconds", 50, 90, 99),
            "In the engine: add the wait in the service's queue, below.",
        ),
        Panel(
            "Time between tokens (TPOT)",
            "s",
            quantiles("vllm:inter_token_latency_seconds", 50, 90, 99),
        ),
        Panel(
            "Whole request, in the engine",
            "s",
            quantiles("vllm:e2e_request_latency_seconds", 50, 90, 99),
        ),
        Panel(
            "Whole request, as clients see it",
            "s",
            quantiles("service_request_duration_seconds", 50, 90, 99, labels=ASKED),
            "From the headers to the last byte, the queue and refusals included.",
        ),
        Panel(
            "Wait in the queue",
            "s",
            [
                *quantiles("service_queue_duration_seconds", 50, 99, name="service"),
                *quantiles("vllm:request_queue_time_seconds", 50, 99, name="vLLM"),
            ],
            "Of what was let in. vLLM's smallest bucket ends at 0.3 s.",
        ),
        Panel(
            "Time in our layer",
            "s",
            quantiles("service_layer_duration_seconds", 50, 99),
            "Of one POST /: parsing, prompt, tokens, building the answer.",
        ),
    ],
    "Engine": [
        Panel(
            "Tokens",
            "suffix: tokens/s",
            [
                (rate("vllm:prompt_tokens_total"), "in"),
                (rate("vllm:generation_tokens_total"), "out"),
            ],
        ),
        Panel(
            "Tokens by client and model",
            "suffix: tokens/s",
            [
                (
                    rate("service_tokens_total", "client", "model", "kind"),
                    "{{client}} {{model}} {{kind}}",
                )
            ],
            "When a request ends. `chat-service usage` sums them up.",
        ),
        Panel(
            "Running and waiting",
            "short",
            [
                (gauge("service_running_sequences"), "running"),
                (gauge("service_waiting_sequences"), "waiting in the service's queue"),
                (gauge("vllm:num_requests_running"), "running in vLLM"),
                (gauge("vllm:num_requests_waiting"), "waiting in vLLM"),
            ],
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            [(f"vllm:kv_cache_usage_perc{{{CHOSEN}}}", "{{instance}} {{replica}} {{engine}}")],
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            [
                (
                    f"{rate('vllm:prefix_cache_hits_total')} / "
                    f"{rate('vllm:prefix_cache_queries_total')}",
                    "of prompt tokens",
                )
            ],
            "Prompt tokens that need not be computed again.",
        ),
        Panel(
            "Preemptions",
            "suffix: /s",
            [(rate("vllm:num_preemptions_total", "instance"), "{{instance}}")],
            "Requests thrown out of a full KV cache, to be computed again.",
        ),
        Panel(
            "CPU of the API process",
            "suffix: cores",
            [(rate("process_cpu_seconds_total", "instance"), "{{instance}}")],
            "At 1, more engine.api_server_count helps. With several it is not told.",
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The whole document, as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place})
        y += 1
        for i, panel in enumerate(row):
            place = {"x": i % COLUMNS * WIDTH, "y": y + i // COLUMNS * HEIGHT}
            panels.append(_graph(panel, len(panels) + 1, {**place, "w": WIDTH, "h": HEIGHT}))
        y += math.ceil(len(row) / COLUMNS) * HEIGHT
    return {
        "uid": "chat-service",
        "title": "Chat service",
        "tags": ["vllm"],
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "graphTooltip": 1,  # one crosshair on all graphs
        "templating": {"list": [_choose_datasource(), _choose("instance"), _choose("model")]},
        "panels": panels,
    }


def _graph(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": expr,
                "legendFormat": name,
            }
            for i, (expr, name) in enumerate(panel.queries)
        ],
    }


def _choose_datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }


def _choose(label: str) -> dict[str, Any]:
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {
            "query": f"label_values(service_requests_in_flight, {label})",
            "refId": label,
        },
        "refresh": 2,  # when the time range changes
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
