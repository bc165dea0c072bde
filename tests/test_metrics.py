"""/metrics, read by the real promtool and the real Prometheus."""

import subprocess
from pathlib import Path

import httpx

from testing.server import Server
from tests.conftest import MODEL
from tests.prometheus import program, scrape, series


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
        key = series(__name__=name, **labels)
        return after[key] - before.get(key, 0)

    assert grown("service_requests_total", route="/", status="200") == 3
    assert grown("service_requests_total", route="/", status="422") == 1
    assert grown("service_requests_total", route="unmatched", status="404") == 2
    assert grown("service_request_duration_seconds_count", route="/") == 4
    assert grown("service_layer_duration_seconds_count") == 3
    mine = {"client": "anonymous", "model": MODEL}
    assert grown("service_tokens_total", **mine, kind="prompt") == 30
    assert grown("service_tokens_total", **mine, kind="generation") == 6
    assert grown("service_client_requests_total", **mine, status="200") == 3
    refused = {"client": "anonymous", "status": "422"}  # Prometheus drops what is empty
    assert grown("service_client_requests_total", **refused) == 1
    assert grown("vllm:prompt_tokens_total", engine="0", model_name=MODEL) == 30
    assert after[series(__name__="service_requests_in_flight")] == 1  # the scrape itself
