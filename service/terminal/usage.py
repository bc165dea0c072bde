"""`chat-service usage`: who asked how much of which model.

From one server's /metrics since its start, or from a Prometheus over a time and all replicas.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from service.errors import ConfigError, ServiceError
from service.terminal.remote import REFUSED, Remote, client, without_password

# The columns after client and model.
COUNTS = ("requests", "refused", "prompt_tokens", "generation_tokens")
_REQUESTS = "service_client_requests_total"
_TOKENS = "service_tokens_total"
_SINCE = re.compile(r"[1-9][0-9]{0,5}[smhdw]")

Labels = dict[str, str]


def of_server(remote: Remote) -> list[dict[str, Any]]:
    """Return a row for each client and model since the server's start. Raises ServiceError."""
    metrics = remote.metrics()
    return _rows(
        (dict(labels), value)
        for name in (_REQUESTS, _TOKENS)
        for labels, value in metrics.get(name, {}).items()
    )


def of_prometheus(url: str, since: str) -> list[dict[str, Any]]:
    """Return a row for each client and model, of the time `since` until now. Raises ServiceError.

    `since` is a duration as Prometheus writes it.
    """
    if not _SINCE.fullmatch(since):
        raise ConfigError(f"--since {since[:40]!r}: expected a duration, such as 30m, 24h or 7d")
    samples = [
        sample
        for name, label in ((_REQUESTS, "status"), (_TOKENS, "kind"))
        for sample in _query(url, f"sum by (client, model, {label}) (increase({name}[{since}]))")
    ]
    if not samples:
        raise ServiceError(
            f"{without_password(url)}: Prometheus has nothing of {_REQUESTS} in the last {since}; "
            "does it scrape chat-service?"
        )
    return _rows(samples)


def _rows(samples: Iterable[tuple[Labels, float]]) -> list[dict[str, Any]]:
    """Add up samples of both metrics. Who has asked nothing has no row."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for labels, value in samples:
        # Skip other programs' series, and the NaN of a replica that is gone.
        if "client" not in labels or not math.isfinite(value):
            continue
        # Prometheus leaves out a label that is empty.
        row = rows.setdefault((labels["client"], labels.get("model", "")), dict.fromkeys(COUNTS, 0))
        if kind := labels.get("kind"):
            if (count := f"{kind}_tokens") in row:
                row[count] += value
        else:
            row["requests"] += value
            row["refused"] += value if labels.get("status") in REFUSED else 0
    return [
        # `increase` extrapolates, so it is not whole.
        {"client": client, "model": model, **{count: round(row[count]) for count in COUNTS}}
        for (client, model), row in sorted(rows.items())
        if any(round(row[count]) for count in COUNTS)
    ]


def _query(url: str, expr: str) -> Iterator[tuple[Labels, float]]:
    """Yield labels and value of each series that Prometheus answers. Raises ServiceError."""
    try:
        with client(url, timeout=60) as prometheus:
            response = prometheus.get("/api/v1/query", params={"query": expr})
        answer = response.json()
        if answer["status"] != "success":
            raise ServiceError(
                f"{without_password(url)}: Prometheus says: {str(answer['error'])[:200]}"
            )
        for series in answer["data"]["result"]:
            yield series["metric"], float(series["value"][1])
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as e:
        reason = "" if isinstance(e, httpx.InvalidURL) else f" {e};"  # it may quote a password
        raise ServiceError(
            f"{without_password(url)}:{reason} is Prometheus running? (--prometheus)"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ServiceError(
            f"{without_password(url)}: this is not the answer of Prometheus (--prometheus)"
        ) from None
