"""/metrics, read by the real promtool and the real Prometheus."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import Server, free_port
from tests.conftest import MODEL


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:  # .ci/run always brings it
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    return path


def test_promtool_finds_nothing_wrong_with_ours(http: httpx.Client) -> None:
    http.post("/", json={"prompt": "hi", "max_new_tokens": 1})
    text = http.get("/metrics").text
    ours = "\n".join(line for line in text.split("\n") if "service_" in line) + "\n"
    assert "service_requests_total" in ours
    check = [program("promtool"), "check", "metrics"]
    done = subprocess.run(check, input=ours, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_prometheus_scrapes_what_was_done(
    service: Server, http: httpx.Client, tmp_path: Path
) -> None:
    before = scrape(service, tmp_path / "before")
    for _ in range(3):
        http.post("/", json={"prompt": "hi", "max_new_tokens": 2})
    http.post("/", json={"prompt": 1})
    http.get("/no/such/route")
    http.get("/no/other/route")
    after = scrape(service, tmp_path / "after")

    def grown(name: str, **labels: str) -> float:
        key = json.dumps({"__name__": name, **labels}, sort_keys=True)
        return after[key] - before.get(key, 0)

    assert grown("service_requests_total", route="/", status="200") == 3
    assert grown("service_requests_total", route="/", status="422") == 1
    assert grown("service_requests_total", route="unmatched", status="404") == 2
    assert grown("service_request_duration_seconds_count", route="/") == 4
    assert grown("service_layer_duration_seconds_count") == 3
    assert grown("service_prompt_tokens_total", model=MODEL) == 30
    assert grown("service_generation_tokens_total", model=MODEL) == 6
    assert grown("vllm:prompt_tokens_total", engine="0", model_name=MODEL) == 30
    assert after[json.dumps({"__name__": "service_requests_in_flight"})] == 1  # the scrape itself


def scrape(service: Server, folder: Path) -> dict[str, float]:
    """Every sample that a real Prometheus has after its first scrape, by its labels."""
    folder.mkdir()
    config = folder / "prometheus.yml"
    target = {"targets": [service.url.removeprefix("http://")]}
    # JSON is YAML.
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s"},
                "scrape_configs": [{"job_name": "service", "static_configs": [target]}],
            }
        )
    )
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
        return _first_samples(f"http://127.0.0.1:{port}/api/v1/query")
    finally:
        prometheus.terminate()
        prometheus.wait()


def _first_samples(query: str) -> dict[str, float]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            answer: dict[str, Any] = httpx.get(
                query, params={"query": '{job="service"}'}, trust_env=False
            ).json()
        except httpx.TransportError:
            answer = {"data": {"result": []}}
        if samples := answer["data"]["result"]:
            return {_labels(sample["metric"]): float(sample["value"][1]) for sample in samples}
        time.sleep(0.2)
    raise AssertionError("Prometheus has no samples after 30 s")


def _labels(metric: dict[str, str]) -> str:
    kept = {name: value for name, value in metric.items() if name not in ("job", "instance")}
    return json.dumps(kept, sort_keys=True)
