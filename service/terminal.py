"""Clients of a running server: `chat-service chat` and `chat-service top`."""

import json
import re
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live
from rich.table import Table

from service.errors import ServiceError

# Key in JSON -> (label, format) in the table, in the order shown.
_ROWS = {
    "requests_per_second": ("answered", "{:.1f} requests/s"),
    "refused_per_second": ("refused", "{:.1f} requests/s"),
    "errors_per_second": ("5xx", "{:.1f} requests/s"),
    "running": ("running", "{:.0f} sequences"),
    "waiting": ("waiting", "{:.0f} sequences"),
    "prompt_tokens_per_second": ("tokens in", "{:.0f} /s"),
    "generation_tokens_per_second": ("tokens out", "{:.0f} /s"),
    "ttft_p50": ("first token, p50", "{:.3f} s"),
    "ttft_p99": ("first token, p99", "{:.3f} s"),
    "kv_cache_usage": ("KV cache", "{:.0%}"),
}

# Monitoring routes, which `top` does not count.
_MONITORING = ("/metrics", "/health", "/ping")

Metrics = dict[str, dict[tuple[tuple[str, str], ...], float]]


class Remote:
    """A client of one server, with an optional API key."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        with self._explained():
            self._client = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=30,
                trust_env=False,  # no proxy
                verify=ssl.create_default_context(),  # reads SSL_CERT_FILE
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors into a ServiceError: the server does not answer, or is another program."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            if "CERTIFICATE_VERIFY_FAILED" in str(e):
                raise ServiceError(
                    f"{self.url}: its certificate is not trusted; name it in SSL_CERT_FILE"
                ) from None
            raise ServiceError(f"{self.url}: {e}; is the server running? (--url)") from None
        except UnicodeError as e:
            raise ServiceError(f"this cannot be sent: {e.reason}") from None  # type: ignore[attr-defined]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ServiceError(
                f"{self.url}: this is not the answer of chat-service (--url)"
            ) from None

    def has_history(self) -> bool:
        """Whether the model supports a history of turns. Raises ServiceError."""
        with self._explained():
            response = self._client.get("/", headers={"accept": "application/json"})
            if response.status_code != 200:
                raise ServiceError(_reason(response))
            return bool(response.json()["style"] == "chat")

    def answer(
        self, prompt: str, history: list[Any], options: dict[str, Any]
    ) -> Iterator[str | dict[str, Any]]:
        """Yield new text as it comes, then the whole response object. Raises ServiceError."""
        body = {"prompt": prompt, "history": history, "stream": True, "details": True, **options}
        with self._explained():
            with self._client.stream("POST", "/", json=body, timeout=None) as response:
                if response.status_code != 200:
                    response.read()
                    raise ServiceError(_reason(response))
                for event in map(json.loads, _data(response)):
                    if "error" in event:
                        raise ServiceError(event["error"]["message"])
                    if "delta" in event:
                        yield event["delta"]
                        continue
                    if not {"response", "history"} <= event.keys():
                        raise ValueError
                    yield event
                    return
            raise ServiceError(f"{self.url}: the answer broke off")

    def metrics(self) -> Metrics:
        """Return all samples by name and labels. Raises ServiceError."""
        samples: Metrics = {}
        with self._explained():
            response = self._client.get("/metrics")
            if response.status_code != 200:
                raise ServiceError(_reason(response))
            for family in text_string_to_metric_families(response.text):
                for sample in family.samples:
                    labels = tuple(sorted(sample.labels.items()))
                    samples.setdefault(sample.name, {})[labels] = sample.value
            if "service_requests_in_flight" not in samples:
                raise ValueError
        return samples


def _data(response: httpx.Response) -> Iterator[bytes]:
    """Yield the data of each server-sent event.

    Lines end at CR or LF alone. `iter_lines` of httpx ends them also at U+2028, U+2029 and U+0085,
    which may stand in JSON.
    """
    line = b""
    for chunk in response.iter_bytes():
        *lines, line = re.split(rb"[\r\n]", line + chunk)
        for each in lines:
            if each.startswith(b"data: "):
                yield each.removeprefix(b"data: ")


def _reason(response: httpx.Response) -> str:
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase
    if response.status_code == 401:
        message += " (--key, or SERVICE_API_KEY)"
    retry = response.headers.get("retry-after")
    return f"{response.status_code}: {message}" + (f"; try again in {retry} s" if retry else "")


def chat(remote: Remote, prompt: str | None, options: dict[str, Any], *, as_json: bool) -> None:
    """Answer one prompt, or each line of stdin. Raises ServiceError, except at a terminal."""
    if prompt is not None:
        _turn(remote, prompt, [], options, as_json)
        return
    prompt_text = "> " if sys.stdin.isatty() else ""
    has_history = remote.has_history()
    history: list[Any] = []
    while True:
        try:
            print(prompt_text, end="", file=sys.stderr, flush=True)
            line = input()
        except EOFError:
            return
        if not line.strip():
            continue
        try:
            turns = _turn(remote, line, history, options, as_json)
            history = turns if has_history else []
        except KeyboardInterrupt:  # closes the connection, which cancels the request
            print()
        except ServiceError as e:
            if not prompt_text:
                raise
            print(f"error: {e}", file=sys.stderr)


def _turn(
    remote: Remote, prompt: str, history: list[Any], options: dict[str, Any], as_json: bool
) -> list[Any]:
    for part in remote.answer(prompt, history, options):
        if isinstance(part, str):
            if not as_json:
                print(part, end="", flush=True)
        else:
            print(json.dumps(part, ensure_ascii=False) if as_json else "", flush=True)
            history = part["history"]
    return history


def top(remote: Remote, interval: float, count: int | None, *, as_json: bool) -> None:
    """Show the server's load `count` times or until Ctrl-C. Raises ServiceError."""
    before = remote.metrics()
    began = time.monotonic()
    console = Console()
    with (
        Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live
    ):
        while count is None or count > 0:
            time.sleep(interval)
            now, after = time.monotonic(), remote.metrics()
            figures = compare(before, after, now - began)
            if as_json:
                print(json.dumps(figures), flush=True)
            elif live:
                live.update(_table(remote.url, figures), refresh=True)
            else:
                console.print(_table(remote.url, figures))
            before, began = after, now
            count = None if count is None else count - 1


def compare(before: Metrics, after: Metrics, seconds: float) -> dict[str, float | None]:
    """Compute rates and quantiles between two scrapes; None: no data in between."""

    def rate(name: str, status: str = "") -> float:
        return _increase(before, after, name, status) / seconds

    return {
        "requests_per_second": rate("service_requests_total"),
        "refused_per_second": rate("service_refused_requests_total"),
        "errors_per_second": rate("service_requests_total", status="5"),
        "running": _sum(after, "vllm:num_requests_running"),
        "waiting": _sum(after, "service_waiting_sequences"),
        "prompt_tokens_per_second": rate("vllm:prompt_tokens_total"),
        "generation_tokens_per_second": rate("vllm:generation_tokens_total"),
        "ttft_p50": _quantile(before, after, "vllm:time_to_first_token_seconds", 0.5),
        "ttft_p99": _quantile(before, after, "vllm:time_to_first_token_seconds", 0.99),
        "kv_cache_usage": _sum(after, "vllm:kv_cache_usage_perc"),
    }


def _sum(metrics: Metrics, name: str) -> float:
    return sum(metrics.get(name, {}).values())


def _increase(before: Metrics, after: Metrics, name: str, status: str = "") -> float:
    """Return a counter's increase without monitoring routes; `status` filters by prefix."""
    increase = 0.0
    for labels, value in after.get(name, {}).items():
        by_name = dict(labels)
        if by_name.get("route", "").startswith(_MONITORING):
            continue
        if not by_name.get("status", "").startswith(status):
            continue
        earlier = before.get(name, {}).get(labels, 0.0)
        increase += value - earlier if value >= earlier else value  # the server has restarted
    return increase


def _quantile(before: Metrics, after: Metrics, name: str, q: float) -> float | None:
    """Estimate a quantile like Prometheus's histogram_quantile: linear within a bucket."""
    buckets: dict[float, float] = {}
    for labels, value in after.get(f"{name}_bucket", {}).items():
        bound = float(dict(labels)["le"])
        earlier = before.get(f"{name}_bucket", {}).get(labels, 0.0)
        buckets[bound] = buckets.get(bound, 0.0) + value - (earlier if value >= earlier else 0.0)
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    rank = q * buckets[bounds[-1]]
    below, low = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (rank - below) / (buckets[bound] - below)
        below, low = buckets[bound], bound
    return low


def _table(url: str, figures: dict[str, float | None]) -> Table:
    table = Table(box=None, pad_edge=False, title=url, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right", min_width=18)
    for key, (name, form) in _ROWS.items():
        value = figures[key]
        table.add_row(name, "-" if value is None else form.format(value))
    return table
