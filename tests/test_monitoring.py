"""monitoring/: alerts that fire when they should, and queries that a real Prometheus answers."""

import asyncio
import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from monitoring import dashboard
from testing.server import Server
from tests.conftest import MODEL
from tests.prometheus import program, running
from tests.test_overload import LONG, RUNS, client_of, wait_for

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "monitoring"


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


CONFIG = load(MONITORING / "prometheus.yml")
RULES = [rule for group in load(MONITORING / "alerts.yml")["groups"] for rule in group["rules"]]


def promtool(*arguments: str) -> None:
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_nothing_wrong(tmp_path: Path) -> None:
    promtool("check", "config", "--lint-fatal", str(MONITORING / "prometheus.yml"))
    promtool("check", "rules", "--lint-fatal", str(MONITORING / "alerts.yml"))
    with_key = tmp_path / "prometheus.yml"
    text = (MONITORING / "prometheus.yml").read_text()
    with_key.write_text(text.replace("# authorization:", "authorization:"))
    assert "authorization" in load(with_key)["scrape_configs"][0]
    promtool("check", "config", "--syntax-only", str(with_key))


def test_every_alert_fires_for_its_fault_and_for_nothing_else() -> None:
    promtool("test", "rules", str(MONITORING / "alerts_test.yml"))
    healthy, *others = load(MONITORING / "alerts_test.yml")["tests"]
    fired = re.findall(
        r'alertname="(\w+)",alertstate="firing"', json.dumps(others).replace("\\", "")
    )
    assert set(fired) == {rule["alert"] for rule in RULES}
    # Silence means something only where there is data.
    names = {series["series"].partition("{")[0] for series in healthy["input_series"]}
    for rule in RULES:
        assert set(re.findall(r"\b(?:up|service_\w+|vllm:\w+)\b", rule["expr"])) <= names


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in RULES:
        assert {"alert", "expr", "for", "labels", "annotations"} == set(rule)
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description"} == set(rule["annotations"])


def test_the_dashboard_is_what_its_generator_writes() -> None:
    assert dashboard.FILE.read_text(encoding="utf-8") == dashboard.text(), (
        "run `python monitoring/dashboard.py`"
    )


def test_what_is_provisioned_exists() -> None:
    """In the containers' folders, as docker-compose.yml mounts them."""
    services = load(ROOT / "docker-compose.yml")["services"]
    mounts = {
        Path(there): ROOT / here
        for name in ("prometheus", "grafana")
        for here, there, *_ in (mount.split(":") for mount in services[name]["volumes"])
        if here.startswith(".")
    }
    provisioning = mounts[Path("/etc/grafana/provisioning")]
    (provider,) = load(provisioning / "dashboards" / "chat-service.yml")["providers"]
    folder = Path(provider["options"]["path"])
    assert [here for there, here in mounts.items() if there.parent == folder] == [dashboard.FILE]
    (datasource,) = load(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert datasource["type"] == dashboard.DATASOURCE["type"]
    assert httpx.URL(datasource["url"]).host in services
    assert datasource["jsonData"]["timeInterval"] == CONFIG["global"]["scrape_interval"]
    config = Path("/etc/prometheus/prometheus.yml")
    assert mounts[config] == MONITORING / "prometheus.yml"
    assert all(mounts[config.parent / name].exists() for name in CONFIG["rule_files"])
    (target,) = CONFIG["scrape_configs"][0]["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert services[name]["ports"][0].endswith(f":{port}")


class Prometheus:
    """A running Prometheus, asked through its API."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=f"{url}/api/v1", trust_env=False)

    def get(self, path: str, **parameters: str) -> Any:
        response = self._client.get(path, params=parameters)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """What there is now, by labels; NaN, such as a quantile of nothing, is no data."""
        result = self.get("/query", query=expr)["result"]
        values = [(sample["metric"], float(sample["value"][1])) for sample in result]
        return [(labels, value) for labels, value in values if not math.isnan(value)]

    def wait_until_it_has_scraped(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if self.query("up == 1"):
                    return
            except (httpx.HTTPError, AssertionError):  # not listening yet, or 503: it has not begun
                pass
            time.sleep(0.2)
        raise AssertionError("Prometheus has no samples after 30 s")


@pytest.fixture(scope="module")
def prometheus(service: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """monitoring/prometheus.yml at work while the service answers, fails and refuses."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = load(MONITORING / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    target = service.url.removeprefix("http://")
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    with running(config, folder) as url:
        prometheus = Prometheus(url)
        prometheus.wait_until_it_has_scraped()
        for _ in range(2):  # a rate needs a second look, also at what the first round began
            asyncio.run(a_little_of_everything(service))
            wait_for(service, RUNS, 0)
            time.sleep(2)
        yield prometheus


async def a_little_of_everything(service: Server) -> None:
    """Answers, a deadline that passes, refusals by a full queue, and clients that leave it."""
    async with client_of(service) as client:
        short = [{"prompt": f"Say {i}.", "max_new_tokens": 4} for i in range(8)]
        answers = await asyncio.gather(*(client.post("/", json=body) for body in short))
        assert {answer.status_code for answer in answers} == {200}
        late = await client.post("/", json={**LONG, "timeout": 0.5})
        assert late.status_code == 504
        # 6400 sequences: more than run and wait together, on a GPU too.
        many = {"model": MODEL, "prompt": "Count", "n": 64, "temperature": 1, "ignore_eos": True}
        crowd = [asyncio.create_task(client.post("/v1/completions", json=many)) for _ in range(100)]
        await asyncio.wait(crowd, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(2)  # of a full queue Prometheus is to see something
        assert {task.result().status_code for task in crowd if task.done()} == {429}
        inside = [task for task in crowd if not task.done()]
        assert inside
        for task in inside:
            task.cancel()
        await asyncio.gather(*inside, return_exceptions=True)


def concrete(expr: str, model: str = ".*") -> str:
    """A query of the dashboard as Grafana asks it, for all instances."""
    for variable, value in (("rate_interval", "1m"), ("instance", ".*"), ("model", model)):
        expr = expr.replace(f"$__{variable}", value).replace(f"${variable}", value)
    assert "$" not in expr
    return expr


def graphs() -> list[dict[str, Any]]:
    document = json.loads(dashboard.FILE.read_text(encoding="utf-8"))
    return [panel for panel in document["panels"] if panel["type"] == "timeseries"]


def test_every_graph_has_data(prometheus: Prometheus) -> None:
    for graph in graphs():
        for target in graph["targets"]:
            samples = prometheus.query(concrete(target["expr"]))
            assert samples, f"{graph['title']}: {target['expr']}"
            for label in set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"replica"}:
                assert all(label in labels for labels, _ in samples), graph["title"]
    _, instance, model = dashboard.dashboard()["templating"]["list"]
    for variable in (instance, model):
        choice = re.fullmatch(r"label_values\((\w+), \w+\)", variable["query"]["query"])
        assert choice and prometheus.query(choice[1])


def test_a_graph_tells_who_was_refused_left_or_failed(prometheus: Prometheus) -> None:
    shares = [panel for row in dashboard.ROWS.values() for panel in row if "Share" in panel.title]
    ((expr, _),) = shares[0].queries
    samples = prometheus.query(concrete(expr))
    seen = {labels["status"]: value for labels, value in samples}
    assert {"429", "499", "504"} <= set(seen)
    assert 0.1 < sum(seen.values()) < 1


def test_every_alert_has_data_to_judge(prometheus: Prometheus) -> None:
    """With `bool` a comparison says 0 or 1 where it would say nothing."""
    for rule in RULES:
        if rule["alert"] in ("ModelGone", "ReplicasLost"):
            continue  # of a cluster: test_cluster.py
        expr, comparisons = re.subn(r" (==|>) ", r" \1 bool ", rule["expr"])
        assert comparisons
        samples = prometheus.query(expr)
        assert samples, rule["alert"]
        assert {value for _, value in samples} <= {0, 1}
    groups = prometheus.get("/rules")["groups"]
    judged = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert judged == {rule["alert"]: "ok" for rule in RULES}
