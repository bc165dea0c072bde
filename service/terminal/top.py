"""`chat-service top`: what a server or a cluster does, in all and by model, replica and client."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from service.terminal import output
from service.terminal.remote import REFUSED, Metrics, Remote

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
# The same for the columns of the other tables.
_COLUMNS = {
    "client": ("client", "{}"),
    "model": ("model", "{}"),
    "replica": ("replica", "{}"),
    "requests_per_second": ("req/s", "{:.1f}"),
    "refused_per_second": ("refused/s", "{:.1f}"),
    "prompt_tokens_per_second": ("in/s", "{:.0f}"),
    "generation_tokens_per_second": ("out/s", "{:.0f}"),
    "running": ("run", "{:.0f}"),
    "waiting": ("wait", "{:.0f}"),
    "ttft_p50": ("p50 s", "{:.2f}"),
    "kv_cache_usage": ("KV", "{:.0%}"),
}
_SHOWN_CLIENTS = 10  # the busiest

# Monitoring routes, which `top` does not count.
_MONITORING = ("/metrics", "/health", "/ping")

_Chosen = Callable[[dict[str, str]], bool]


def top(remote: Remote, interval: float, count: int | None, *, as_json: bool) -> None:
    """Show the server's load `count` times or until Ctrl-C. Raises ServiceError."""
    before = remote.metrics()
    began = time.monotonic()
    live_view = output.is_terminal() and not as_json
    with Live(console=Console(), auto_refresh=False) if live_view else nullcontext() as live:
        while count is None or count > 0:
            time.sleep(interval)
            now, after = time.monotonic(), remote.metrics()
            figures = compare(before, after, now - began)
            if as_json:
                print(output.json_line(figures), flush=True)
            elif live:
                tables = [output.rich_table(*table) for table in _tables(figures)]
                spaced = [part for table in tables for part in (table, "")]
                live.update(Group(Text(remote.url), *spaced[:-1]), refresh=True)
            else:
                lines = ["\n".join(output.plain_rows(*table)) for table in _tables(figures)]
                print(f"{remote.url}\n" + "\n\n".join(lines), flush=True)
            before, began = after, now
            count = None if count is None else count - 1


def compare(before: Metrics, after: Metrics, seconds: float) -> dict[str, Any]:
    """Compute rates and quantiles between two scrapes; None: no data in between.

    `models`, `replicas` and `clients` list some of these figures per model, replica and client.
    `replicas` is empty for a single server.
    """
    look = _Look(before, after, seconds)
    return {
        "requests_per_second": look.rate("service_requests_total", _answered),
        "refused_per_second": look.rate("service_refused_requests_total"),
        "errors_per_second": look.rate(
            "service_requests_total",
            lambda labels: _answered(labels) and labels.get("status", "").startswith("5"),
        ),
        "running": look.sum("vllm:num_requests_running") or 0.0,
        "waiting": look.sum("service_waiting_sequences") or 0.0,
        "prompt_tokens_per_second": look.rate("vllm:prompt_tokens_total"),
        "generation_tokens_per_second": look.rate("vllm:generation_tokens_total"),
        "ttft_p50": look.quantile("vllm:time_to_first_token_seconds", 0.5),
        "ttft_p99": look.quantile("vllm:time_to_first_token_seconds", 0.99),
        "kv_cache_usage": look.mean("vllm:kv_cache_usage_perc") or 0.0,
        "models": look.models(),
        "replicas": look.replicas(),
        "clients": look.clients(),
    }


def _answered(labels: dict[str, str]) -> bool:
    return not labels.get("route", "").startswith(_MONITORING)


def _all(labels: dict[str, str]) -> bool:
    return True


def _has(label: str, value: str) -> _Chosen:
    return lambda labels: labels.get(label) == value


class _Look:
    """Two scrapes. `chosen` says which series of a metric count."""

    def __init__(self, before: Metrics, after: Metrics, seconds: float) -> None:
        self._before = before
        self._after = after
        self._seconds = seconds
        # A single server has one base model; series without a model label belong to it. The
        # engine's series name it in `model_name`, in a cluster also in `model`.
        bases = self._values("vllm:num_requests_running", "model_name")
        self._base = next(iter(bases)) if len(bases) == 1 else ""

    def models(self) -> list[dict[str, Any]]:
        names = self._values("vllm:num_requests_running", "model_name", "model")
        names |= self._values("service_tokens_total", "model")
        return [{"model": name, **self._of_model(name)} for name in sorted(names)]

    def _of_model(self, name: str) -> dict[str, Any]:
        def mine(labels: dict[str, str]) -> bool:
            return labels.get("model", labels.get("model_name", self._base)) == name

        return {
            **self._of_engine(mine),
            "ttft_p50": self.quantile("vllm:time_to_first_token_seconds", 0.5, mine),
            "ttft_p99": self.quantile("vllm:time_to_first_token_seconds", 0.99, mine),
        }

    def replicas(self) -> list[dict[str, Any]]:
        series = [dict(labels) for labels in self._after.get("vllm:num_requests_running", {})]
        keys = {(s.get("model", ""), s["replica"]) for s in series if s.get("replica")}
        return [
            {"model": model, "replica": replica, **self._of_engine(_has("replica", replica))}
            for model, replica in sorted(keys)
        ]

    def clients(self) -> list[dict[str, Any]]:
        """Rows of all clients, the busiest first."""
        names = self._values("service_client_requests_total", "client")
        names |= self._values("service_tokens_total", "client")
        rows = [
            {"client": name, **self._of_requests(_has("client", name))} for name in sorted(names)
        ]
        busy = ("generation_tokens_per_second", "requests_per_second")
        return sorted(rows, key=lambda row: [row[figure] for figure in busy], reverse=True)

    def _of_engine(self, mine: _Chosen) -> dict[str, Any]:
        return {
            **self._of_requests(mine),
            "running": self.sum("vllm:num_requests_running", mine),
            "waiting": self.sum("service_waiting_sequences", mine),
            "kv_cache_usage": self.mean("vllm:kv_cache_usage_perc", mine),
        }

    def _of_requests(self, mine: _Chosen) -> dict[str, float]:
        def tokens(kind: str) -> float:
            return self.rate("service_tokens_total", lambda s: mine(s) and s.get("kind") == kind)

        requests = "service_client_requests_total"
        return {
            "requests_per_second": self.rate(requests, mine),
            "refused_per_second": self.rate(
                requests, lambda s: mine(s) and s.get("status") in REFUSED
            ),
            "prompt_tokens_per_second": tokens("prompt"),
            "generation_tokens_per_second": tokens("generation"),
        }

    def _values(self, name: str, *labels: str) -> set[str]:
        """Return the values of the first of these labels that a series has."""
        series = [dict(each) for each in self._after.get(name, {})]
        found = {next((s[label] for label in labels if label in s), "") for s in series}
        return found - {""}

    def _chosen(self, name: str, chosen: _Chosen) -> list[float]:
        series = self._after.get(name, {}).items()
        return [value for labels, value in series if chosen(dict(labels))]

    def sum(self, name: str, chosen: _Chosen = _all) -> float | None:
        """Return the sum of a gauge; None if no series is chosen, as of an adapter."""
        values = self._chosen(name, chosen)
        return sum(values) if values else None

    def mean(self, name: str, chosen: _Chosen = _all) -> float | None:
        """Return the mean of a gauge over all engines."""
        values = self._chosen(name, chosen)
        return sum(values) / len(values) if values else None

    def rate(self, name: str, chosen: _Chosen = _all) -> float:
        """Return a counter's increase in a second."""
        return sum(grown for _, grown in self._grown(name, chosen)) / self._seconds

    def _grown(self, name: str, chosen: _Chosen) -> Iterable[tuple[dict[str, str], float]]:
        for key, value in self._after.get(name, {}).items():
            if chosen(labels := dict(key)):
                earlier = self._before.get(name, {}).get(key, 0.0)
                # A server that has restarted counts from 0.
                yield labels, value - earlier if value >= earlier else value

    def quantile(self, name: str, q: float, chosen: _Chosen = _all) -> float | None:
        """Estimate a quantile like Prometheus's histogram_quantile: linear within a bucket."""
        buckets: dict[float, float] = {}
        for labels, grown in self._grown(f"{name}_bucket", chosen):
            bound = float(labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + grown
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


_Table = tuple[Sequence[str], list[list[str]]]


def _tables(figures: dict[str, Any]) -> list[_Table]:
    """Return columns and cells of all tables: the figures in all, then those of each part."""
    rows = [[name, _format(form, figures[key])] for key, (name, form) in _ROWS.items()]
    tables: list[_Table] = [((), rows)]
    for part in ("models", "replicas", "clients"):
        entries = figures[part]
        more = len(entries) - _SHOWN_CLIENTS if part == "clients" else 0
        if more > 0:
            entries = entries[:_SHOWN_CLIENTS]
        if not entries:
            continue
        keys = [key for key in _COLUMNS if key in entries[0]]
        if part != "clients":  # else they do not fit 80 columns
            keys.remove("refused_per_second")
        cells = [[_format(_COLUMNS[key][1], entry[key]) for key in keys] for entry in entries]
        if more > 0:
            cells.append([f"and {more} more", *[""] * (len(keys) - 1)])
        tables.append(([_COLUMNS[key][0] for key in keys], cells))
    return tables


def _format(form: str, value: Any) -> str:
    return "-" if value is None else form.format(value)
