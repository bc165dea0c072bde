"""A real Prometheus, run for one look at a server's metrics."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from testing.server import Server, free_port


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:  # .ci/run always brings it
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    return path


def scrape(service: Server, folder: Path, key: str | None = None) -> dict[str, float]:
    """Every sample that Prometheus has after its first scrape, by its labels as sorted JSON."""
    folder.mkdir()
    target = {"targets": [service.url.removeprefix("http://")]}
    # JSON is YAML.
    job: dict[str, Any] = {"job_name": "service", "static_configs": [target]}
    if key:
        job["authorization"] = {"credentials": key}
    document = {"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}
    with running(document, folder) as url:
        return _first_samples(f"{url}/api/v1/query")


@contextmanager
def running(document: dict[str, Any], folder: Path) -> Iterator[str]:
    """The address of a Prometheus with this configuration, which may not listen yet."""
    config = folder / "prometheus.yml"
    config.write_text(json.dumps(document))
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log:
        prometheus = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        prometheus.terminate()
        prometheus.wait()


def _first_samples(query: str) -> dict[str, float]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            response = httpx.get(query, params={"query": '{job="service"}'}, trust_env=False)
            answer: dict[str, Any] = response.raise_for_status().json()
        except httpx.HTTPError:  # it is not listening yet, or answers 503 until it has begun
            answer = {"data": {"result": []}}
        if samples := answer["data"]["result"]:
            return {
                series(**_ours(sample["metric"])): float(sample["value"][1]) for sample in samples
            }
        time.sleep(0.2)
    raise AssertionError("Prometheus has no samples after 30 s")


def series(**labels: str) -> str:
    """The key of one series in what `scrape` returns."""
    return json.dumps(labels, sort_keys=True)


def _ours(metric: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in metric.items() if name not in ("job", "instance")}
