"""A cluster on real Ray, in a network of its own: several models behind one address, and faults."""

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from testing.cluster import ANSWERED, ENDED, Load
from testing.server import Server, free_port
from tests.conftest import PATIENCE
from tests.namespace import network_of_its_own, wait_for_end
from tests.prometheus import running
from tests.test_monitoring import RULES, Prometheus, concrete, graphs

ROOT = Path(__file__).parent.parent
KEYS = {"anna": "key-of-anna", "ben": "key-of-ben"}
SMALL = {"engine.kv_cache_memory_bytes": "300M", "engine.max_num_seqs": 16}
# What a client sees of a stream that ends without a last event.
CUT = {"stream ReadError", "stream RemoteProtocolError"}
# What the file says. Half a core each: four replicas on a machine of two.
FILE: dict[str, Any] = {
    "default": "a",
    "models": {
        "a": {"model": "smollm2-135m-instruct", "replicas": 2, "cpus": 0.5, "set": SMALL},
        "b": {
            "model": "smollm2-135m-instruct",
            "replicas": [1, 2],
            "queue": 4,
            "cpus": 0.5,
            "set": {**SMALL, "aliases": ["gpt-4"]},
        },
    },
}
QUESTION = {"prompt": "What is the capital of France?", "max_new_tokens": 8}


def wait(condition: Callable[[], Any], seconds: float = PATIENCE) -> float:
    """Wait until a condition holds; return the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it does not come"
        time.sleep(0.5)
    return time.monotonic() - began


def wait_until_all_run(server: Server) -> None:
    """Wait until the command says `Ready`; the address answers before all replicas run."""
    server.wait_until_ready(PATIENCE)
    wait(lambda: "Ready:" in server.log.read_text())


def logged(server: Server, text: str) -> bool:
    return text in server.log.read_text()


def processes(server: Server, title: str) -> list[psutil.Process]:
    """The processes below a command with this in their titles."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


class ClusterUnderTest:
    """`chat-service cluster FILE`, and the same again to update it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cluster.yaml"
        self.keys = folder / "keys"
        self.write_keys(KEYS)
        self.content = {
            **FILE,
            "settings": {"api_key_file": str(self.keys), "port": free_port(), "drain_timeout": 60},
        }
        self.write(self.content)
        port = self.content["settings"]["port"]
        self.server = Server(
            [sys.executable, "-m", "service", "cluster", str(self.file)],
            folder / "log",
            port=port,
            health="/health/ready",
        )
        self.url = self.server.url

    def write(self, content: dict[str, Any]) -> None:
        self.file.write_text(yaml.safe_dump(content))

    def write_keys(self, keys: dict[str, str]) -> None:
        self.keys.write_text("".join(f"{name} {key}\n" for name, key in keys.items()))

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "service", "cluster", *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def client(self, key: str | None = "key-of-anna") -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False, verify=False
        )

    def processes(self, title: str) -> list[psutil.Process]:
        return processes(self.server, title)

    def replicas(self, model: str = "a") -> list[psutil.Process]:
        return self.processes(f"ServeReplica:chat-service-{model}:")

    def serving(self, model: str = "a") -> set[str]:
        """The replicas of a model that give metrics."""
        with self.client() as client:
            text = client.get("/metrics").text
        series = r'service_running_sequences\{model="%s",replica="(\w+)"\}'
        return set(re.findall(series % model, text))

    def statuses(self, key: str) -> set[int]:
        """What the front and the replicas say to a key."""
        paths = ["/v1/models", *["/a/v1/models"] * 8, "/b/v1/models"]
        with self.client(key) as client:
            return {client.get(path).status_code for path in paths}

    def both(self) -> set[str]:
        """The two replicas of `a`, once both are on the page."""
        deadline = time.monotonic() + 60
        while len(serving := self.serving()) != 2:
            assert time.monotonic() < deadline, serving
            time.sleep(0.5)
        return serving


class Update:
    """`chat-service cluster FILE` beside the one that runs; its output goes to `log`."""

    def __init__(self, file: Path, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", "cluster", str(file)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_until_it_replaces(self, model: str) -> None:
        wait(lambda: f"{model}: deploying" in self._log.read_text())


@pytest.fixture(scope="module", autouse=True)
def files_of_the_model() -> None:
    """Fetch them before there is no network."""
    command = [sys.executable, "-m", "service", "download", "smollm2-135m-instruct"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    with network_of_its_own():
        cluster = ClusterUnderTest(tmp_path_factory.mktemp("cluster"))
        try:
            wait_until_all_run(cluster.server)
            yield cluster
        finally:
            cluster.server.stop()


def test_the_command_says_how_to_ask(cluster: ClusterUnderTest) -> None:
    log = cluster.server.log.read_text()
    assert f"Ready: a, b at {cluster.url}" in log
    assert f"curl -X POST {cluster.url}" in log
    assert "Loading the weights" in log  # of a replica, as a phase


@pytest.mark.parametrize(
    ("path", "model"),
    [("/", None), ("/", "a"), ("/", "b"), ("/", "gpt-4"), ("/a/", None), ("/b", None)],
)
def test_a_model_is_chosen_by_body_and_by_path(
    cluster: ClusterUnderTest, path: str, model: str | None
) -> None:
    with cluster.client() as client:
        response = client.post(path, json={**QUESTION, **({"model": model} if model else {})})
    assert response.status_code == 200
    assert response.json()["response"] == "The capital of France is Paris."
    assert response.headers.get_list("x-request-id") == [response.headers["x-request-id"]]
    line = f"id={response.headers['x-request-id']} client=anna method=POST "
    wait(lambda: line in cluster.server.log.read_text(), 30)  # of the replica


@pytest.mark.parametrize(
    ("path", "where"),
    [("/", "error"), ("/v1/chat/completions", "error"), ("/v1/messages", "error")],
)
def test_an_unknown_model_is_told_the_names(
    cluster: ClusterUnderTest, path: str, where: str
) -> None:
    body = {"model": "c", "prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}
    with cluster.client() as client:
        response = client.post(path, json=body)
        metrics = client.get("/metrics").text
    assert response.status_code == 404
    assert "a, b, gpt-4" in response.json()[where]["message"]
    assert ("type" in response.json()) == (path == "/v1/messages")
    # The front has refused it: it counts and logs it, for its client.
    refused = r'service_client_requests_total\{client="anna",model="",replica="\w+",status="404"\}'
    assert re.search(refused, metrics)
    line = f"id={response.headers['x-request-id']} client=anna method=POST "
    wait(lambda: line in cluster.server.log.read_text(), 30)


def test_openai_clients_see_all_models(cluster: ClusterUnderTest) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="key-of-ben")
    roots = {model.id: model.model_dump()["root"] for model in client.models.list()}
    assert roots == {"a": "a", "b": "b", "gpt-4": "b"}  # the chat page offers a and b
    stream = client.chat.completions.create(
        model="gpt-4",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=8,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == "The capital of France is Paris."


def test_keys_are_asked_for_everywhere(cluster: ClusterUnderTest) -> None:
    with cluster.client(key=None) as client:
        for method, path in (
            ("POST", "/"),
            ("POST", "/a/"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/b/metrics"),
            ("POST", "/v1/chat/completions"),
        ):
            response = client.request(method, path, json=QUESTION if method == "POST" else None)
            assert response.status_code == 401, path
        for path in ("/health", "/health/live", "/health/ready", "/", "/a/health/ready"):
            assert client.get(path).status_code == 200, path


def test_an_answer_ends_when_its_client_leaves(cluster: ClusterUnderTest) -> None:
    def total(series: str) -> float:
        return sum(map(float, re.findall(rf"^{series} (\S+)$", client.get("/metrics").text, re.M)))

    def running() -> float:
        return total(r'service_running_sequences\{model="a".*\}')

    def gone(route: str) -> float:
        return total(rf'service_requests_total\{{.*route="{route}",status="499"\}}')

    # A route of vLLM's, because its answer can be made long: a story may be over after a sentence.
    body = {"model": "a", "prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with cluster.client() as client:
        for path in ("/v1/completions", "/a/v1/completions"):
            with client.stream("POST", path, json=body) as response:
                assert response.status_code == 200
                lines = response.iter_lines()  # given up, it would close the connection
                next(lines)
                assert running() == 1
            wait(lambda: running() == 0, 30)
        wait(lambda: gone("/v1/completions") == 2, 30)
        assert gone("unmatched") == 0  # the front does not count it again


def test_a_changed_key_file_holds_everywhere_within_seconds(cluster: ClusterUnderTest) -> None:
    before = cluster.both(), [p.pid for p in cluster.replicas()]
    assert cluster.statuses("key-of-carl") == {401}
    cluster.write_keys({**KEYS, "carl": "key-of-carl requests=1/min"})
    wait(lambda: cluster.statuses("key-of-carl") == {200}, 30)
    with cluster.client("key-of-carl") as client:
        assert client.post("/b/", json=QUESTION).status_code == 200
        for path in ("/b/", "/"):
            refused = client.post(path, json={**QUESTION, "model": "b"})
            assert refused.status_code == 429, path
            assert 1 <= int(refused.headers["retry-after"]) <= 60
    cluster.write_keys(KEYS)
    wait(lambda: cluster.statuses("key-of-carl") == {401}, 30)
    assert before == (cluster.both(), [p.pid for p in cluster.replicas()])  # no restart


def test_one_page_of_metrics_has_each_replica(cluster: ClusterUnderTest) -> None:
    cluster.both()
    assert len(cluster.serving("b")) == 1
    with cluster.client() as client:
        text = client.get("/metrics").text
    assert text.count("# TYPE service_requests_total ") == 1
    assert re.search(r'vllm:generation_tokens_total\{.*model="a".*replica=', text)


def test_dashboard_and_alerts_work_for_a_cluster(cluster: ClusterUnderTest, tmp_path: Path) -> None:
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {
                "job_name": "chat-service",
                "static_configs": [{"targets": [cluster.url.removeprefix("http://")]}],
                "authorization": {"credentials": KEYS["anna"]},
            }
        ],
    }
    with running(config, tmp_path) as url:
        prometheus = Prometheus(url)
        prometheus.wait_until_it_has_scraped()
        with Load(cluster.url, 4, KEYS["ben"]), Load(f"{cluster.url}/b/", 4, KEYS["ben"]):
            time.sleep(8)
        empty = {
            (graph["title"], model)
            for graph in graphs()
            for target in graph["targets"]
            for model in (".*", "a", "b")
            if not prometheus.query(concrete(target["expr"], model))
        }
        # Nobody was refused, or failed.
        assert {title for title, _ in empty} <= {
            "Refused by reason",
            "Share that did not get an answer",
        }
        per_model = prometheus.query("sum by (model) (service_requests_in_flight)")
        assert {labels.get("model") for labels, _ in per_model} >= {"a", "b"}
        for rule in RULES:
            prometheus.query(rule["expr"])  # which Prometheus understands
        usage = subprocess.run(
            [sys.executable, "-m", "service", "usage", "--prometheus", url, "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
    rows = {(row["client"], row["model"]): row for row in json.loads(usage.stdout)}
    assert rows["ben", "a"]["requests"] > 0
    assert rows["ben", "b"]["generation_tokens"] > 0


def test_the_status_shows_replicas_and_nodes(cluster: ClusterUnderTest) -> None:
    result = cluster.command("--status", "--json")
    assert result.returncode == 0, result.stderr
    status = json.loads(result.stdout)
    assert [len(status["models"][name]["served"]) for name in ("a", "b")] == [2, 1]
    assert {r["phase"] for r in status["models"]["a"]["served"]} == {"ready"}
    assert len(status["nodes"]) == 1


def test_what_a_dead_replica_had_not_begun_another_answers(cluster: ClusterUnderTest) -> None:
    victim = cluster.replicas()[0]
    engines = [c for c in victim.children() if "EngineCore" in " ".join(c.cmdline())]
    by_path = Load(f"{cluster.url}/a/", 8, KEYS["ben"])
    with Load(cluster.url, key=KEYS["ben"]) as load, by_path:
        wait(lambda: load.counts.total() > 24 and by_path.counts.total() > 8)
        victim.kill()
        time.sleep(10)
    assert load.counts.keys() <= {*ANSWERED, ENDED}, load.counts
    assert by_path.counts.keys() <= {*ANSWERED, ENDED, *CUT}, by_path.counts
    for engine in engines:
        wait_for_end(engine.pid, 10)  # it would keep its GPU
    wait(lambda: len(cluster.serving()) == 2)


def test_a_replica_that_hangs_is_replaced_and_hides_no_other(cluster: ClusterUnderTest) -> None:
    before = cluster.both()
    victim = cluster.replicas()[0]
    with Load(cluster.url, key=KEYS["ben"]) as load:
        wait(lambda: load.counts.total() > 24)
        victim.suspend()
        assert len(cluster.serving()) == 1  # of the two
        status = json.loads(cluster.command("--status", "--json").stdout)
        assert len(status["models"]["a"]["served"]) == 1
        wait(lambda: len(cluster.serving() - before) == 1)
        victim.kill()  # as Serve would in a minute
    assert load.counts.keys() <= {*ANSWERED, ENDED}, load.counts


def test_a_replica_without_an_engine_refuses_nobody(cluster: ClusterUnderTest) -> None:
    victim = cluster.replicas()[0]
    (engine,) = (c for c in victim.children() if "EngineCore" in " ".join(c.cmdline()))
    with Load(cluster.url, key=KEYS["ben"]) as load:
        wait(lambda: load.counts.total() > 24)
        engine.kill()
        wait_for_end(victim.pid, 20)
        time.sleep(5)
    assert load.counts.keys() <= {*ANSWERED, ENDED}, load.counts
    wait(lambda: len(cluster.serving()) == 2)


def test_without_its_controller_a_cluster_goes_on_and_it_comes_back(
    cluster: ClusterUnderTest,
) -> None:
    before = cluster.both(), {p.pid for p in cluster.replicas()}
    (controller,) = cluster.processes("ServeController")
    with Load(cluster.url, 8, key=KEYS["ben"]) as load:
        controller.kill()
        wait(lambda: cluster.processes("ServeController"), 30)
        time.sleep(10)
    assert load.counts.keys() == ANSWERED, load.counts
    assert before == (cluster.both(), {p.pid for p in cluster.replicas()})
    assert cluster.server.process.poll() is None


def test_a_killed_haproxy_is_back_within_seconds(cluster: ClusterUnderTest) -> None:
    def answered() -> bool:
        with contextlib.suppress(httpx.HTTPError), cluster.client() as client:
            return client.post("/", json=QUESTION).status_code == 200
        return False

    before = cluster.both(), {p.pid for p in cluster.replicas()}
    children = psutil.Process(cluster.server.process.pid).children(recursive=True)
    for process in children:
        if process.name() == "haproxy":
            process.kill()
    assert wait(answered) < 60
    time.sleep(3)  # some are told 404 until it knows all replicas
    with Load(cluster.url, 8, key=KEYS["ben"]) as load:
        wait(lambda: load.counts.total() > 24)
    assert load.counts.keys() == ANSWERED, load.counts
    assert before == (cluster.both(), {p.pid for p in cluster.replicas()})


def test_load_adds_a_replica_and_a_killed_front_loses_only_streams(
    cluster: ClusterUnderTest,
) -> None:
    def starting() -> bool:
        return len(cluster.replicas("b")) == 2

    def fronts() -> set[int]:
        return {front.pid for front in cluster.processes("ServeReplica:chat-service:")}

    front, *others = cluster.processes("ServeReplica:chat-service:")
    assert len(others) == 1
    with Load(f"{cluster.url}/b/", key=KEYS["ben"]), Load(cluster.url, 8, KEYS["ben"]) as load:
        wait(lambda: load.counts.total() > 8)
        began = time.monotonic()
        front.kill()
        wait(starting)
        assert time.monotonic() - began < 30  # 15 s on an idle machine
        wait(lambda: len(fronts() - {front.pid}) == 2, 60)
    assert load.counts.keys() <= {*ANSWERED, *CUT}, load.counts


def test_a_mistake_in_the_file_changes_nothing(cluster: ClusterUnderTest) -> None:
    models = {**FILE["models"], "b": {"model": "smollm2-135m-instruct", "set": {"engine.dtyp": 1}}}
    cluster.write({**cluster.content, "models": models})
    result = cluster.command(str(cluster.file))
    assert result.returncode == 1
    assert "--set engine.dtyp: vLLM has no such argument; did you mean 'dtype'?" in result.stderr
    assert "nothing was changed" in result.stderr


def test_keys_are_not_switched_off_by_an_update(cluster: ClusterUnderTest) -> None:
    content = {**cluster.content, "settings": {"port": cluster.content["settings"]["port"]}}
    cluster.write(content)
    result = cluster.command(str(cluster.file))
    assert result.returncode == 2
    assert "keys cannot be switched on or off while the cluster runs" in result.stderr


def test_an_update_refuses_and_cuts_nothing_and_keys_change_meanwhile(
    cluster: ClusterUnderTest, tmp_path: Path
) -> None:
    """A setting of one model, the number of another's replicas, and which model is the default."""
    before = cluster.both()
    others = {process.pid for process in cluster.replicas("b")}
    models = {
        "a": {**FILE["models"]["a"], "set": {**SMALL, "engine.max_num_seqs": 12}},
        "b": {**FILE["models"]["b"], "replicas": 1},
    }
    cluster.write({**cluster.content, "default": "b", "models": models})
    cluster.write_keys({**KEYS, "carl": "key-of-carl"})
    wait(lambda: cluster.statuses("key-of-carl") == {200}, 30)
    by_path, log = f"{cluster.url}/a/", tmp_path / "log"
    with (
        Load(cluster.url, 2, KEYS["ben"]) as load,
        Load(by_path, 2, KEYS["ben"]) as busy,
        Load(by_path, 2, KEYS["ben"], pause=8) as idle,
        socket.create_connection(("127.0.0.1", cluster.content["settings"]["port"])) as slow,
    ):
        slow.sendall(b"GET /a/v1/models HTTP/1.1\r\n")
        update = Update(cluster.file, log)
        update.wait_until_it_replaces("a")
        cluster.write_keys(KEYS)
        wait(lambda: cluster.statuses("key-of-carl") == {401}, 30)
        assert update.process.poll() is None
        cluster.keys.write_text("anna key-of-anna weight=99999\n")  # a mistake: those before hold
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")  # after 30 s
        assert update.process.wait(PATIENCE) == 0, log.read_text()
        wait(lambda: len(cluster.replicas("b")) == 1)
    counts = load.counts, busy.counts, idle.counts
    assert all(count.keys() == ANSWERED for count in counts), counts
    assert "the keys read before stay in force" in cluster.server.log.read_text()
    assert cluster.statuses("key-of-carl") == {401}
    cluster.write_keys(KEYS)
    assert not before & cluster.both()
    assert {process.pid for process in cluster.replicas("b")} <= others  # no restart


def test_a_version_that_does_not_start_is_taken_back(cluster: ClusterUnderTest) -> None:
    # A replica finds out, when it looks for its files.
    broken = {**FILE["models"]["a"], "set": {**SMALL, "tokenizer": {"path": "/not/here"}}}
    cluster.write({**cluster.content, "models": {**FILE["models"], "a": broken}})
    with Load(cluster.url, 2, KEYS["ben"]) as load:
        result = cluster.command(str(cluster.file))
    assert result.returncode == 1
    assert "what was served before is served on" in result.stderr
    assert "/not/here" in result.stderr  # the reason
    assert load.counts.keys() == ANSWERED, load.counts


def test_a_signal_finishes_what_was_accepted_and_ends_everything(
    cluster: ClusterUnderTest,
) -> None:
    body = {"prompt": "Tell me a long story.", "max_new_tokens": 200, "stream": True}
    with cluster.client() as client, client.stream("POST", "/", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        cluster.server.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line.startswith("data: ")][-1]
    assert json.loads(last.removeprefix("data: "))["status"] == 200
    assert cluster.server.process.wait(120) == 0
    # The fixture says what still runs in this network.


def test_a_node_that_dies_takes_no_answer_with_it(tmp_path: Path) -> None:
    """Two nodes that `ray start` made, on addresses of this machine, with one replica each."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("0" * 64)
    shown = subprocess.run(
        [sys.executable, "-m", "service", "cluster", "--environment"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    variables = dict(word.split("=", 1) for word in shlex.split(shown) if word != "export")
    environment = {**os.environ, **variables, "RAY_AUTH_TOKEN_PATH": str(token)}
    content = {
        "models": {"a": {"model": "smollm2-135m-instruct", "replicas": 2, "set": SMALL}},
        "settings": {"port": 6006, "drain_timeout": 2},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))

    def start(*arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", *arguments, "--num-cpus=1"]
        subprocess.run(command, env=environment, check=True, capture_output=True)

    empty = network_of_its_own(must_be_empty=False)  # Ray stays: the command has not started it
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, empty:
        start(
            *("--head", "--node-ip-address=127.0.0.1", "--port=6379"),
            *(f"--temp-dir={folder}", "--include-dashboard=false"),
        )
        start("--address=127.0.0.1:6379", "--node-ip-address=127.0.0.2")
        server = Server(
            [sys.executable, "-m", "service", "cluster", str(tmp_path / "cluster.yaml")],
            tmp_path / "log",
            port=6006,
            env={**environment, "RAY_ADDRESS": "127.0.0.1:6379"},
            health="/health/ready",
        )
        try:
            wait_until_all_run(server)
            connect = "from ray._raylet import GcsClient; GcsClient(address='127.0.0.1:6379')"
            for token_of, message in (({}, ""), ({"RAY_AUTH_TOKEN": "1" * 64}, "InvalidAuthToken")):
                caller = subprocess.run(
                    [sys.executable, "-c", connect],
                    env={**environment, **token_of},
                    capture_output=True,
                    text=True,
                )
                assert (caller.returncode == 0) == (not message), caller.stderr
                assert message in caller.stderr
            (raylet,) = (
                process
                for process in psutil.process_iter(["name", "cmdline"])
                if process.info["name"] == "raylet"
                and "--node_ip_address=127.0.0.2" in process.info["cmdline"]
            )
            engines = [
                process
                for process in raylet.children(recursive=True)
                if "EngineCore" in " ".join(process.cmdline())
            ]
            assert len(engines) == 1
            with Load(server.url, 8) as load:
                wait(lambda: load.counts.total() > 8)
                raylet.kill()
                wait_for_end(engines[0].pid, 15)  # it would keep its GPU
                time.sleep(15)
            # Here both nodes' HAProxies share one port; the connections of the dead one are lost.
            refused = [kind for kind in load.counts if re.search(r" \d+$", kind)]
            assert {*refused} <= {*ANSWERED, ENDED}, load.counts
            with Load(server.url, 8) as load:
                wait(lambda: load.counts.total() > 8)
            assert load.counts.keys() == ANSWERED, load.counts
            body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}
            url = f"{server.url}/v1/completions"
            with httpx.stream("POST", url, json=body, timeout=PATIENCE, trust_env=False) as answer:
                lines = answer.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                last = [line for line in lines if line.startswith("data: {")][-1]  # before [DONE]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert error["code"] == 503
            assert error["message"].startswith("the server is stopping")
            server.process.wait(60)
        finally:
            status = server.stop()
        assert status == 0, server.log.read_text()
        after = httpx.get(f"{server.url}/health/live", trust_env=False)
        assert after.status_code == 404  # HAProxy is Ray's, and the models are gone


def test_the_readme_s_command_serves_two_replicas_and_leaves_nothing_when_it_or_ray_is_killed(
    tmp_path: Path,
) -> None:
    models = {"smollm2-135m-instruct": {"replicas": 2, "set": {"engine.max_num_seqs": 12}}}
    changed = tmp_path / "cluster.yaml"
    changed.write_text(yaml.safe_dump({"models": models}))
    with network_of_its_own():
        for name in ("first", "second"):  # which ends what the first has left
            server = Server(["make", "-C", str(ROOT), "cluster"], tmp_path / name, port=6006)
            wait_until_all_run(server)
            children = psutil.Process(server.process.pid).children(recursive=True)
            try:
                log = server.log.read_text()
                assert "replicas: 2 running" in log
                curl = log.partition("Try:")[2].partition("OpenAI")[0]
                answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True)
                assert "The capital of France is Paris." in answer.stdout
                wait(lambda server=server: len(processes(server, "EngineCore")) == 2, 30)  # type: ignore[misc]
                engines = processes(server, "EngineCore")
                log_of_update = tmp_path / f"{name}-update"
                update = Update(changed, log_of_update)
                update.wait_until_it_replaces("smollm2-135m-instruct")
                if name == "first":
                    children[0].kill()
                    server.process.wait(60)
                    assert update.process.wait(30) == 1
                    assert "error: Ray has ended on this machine" in log_of_update.read_text()
                else:
                    update.process.terminate()
                    assert update.process.wait(60) == 1
                    last = log_of_update.read_text().splitlines()[-1]
                    assert last == "error: interrupted; what was served before is served on"
                    update = Update(changed, log_of_update)
                    update.wait_until_it_replaces("smollm2-135m-instruct")
                    update.process.kill()
                    wait(functools.partial(logged, server, "An update was cut off"), 30)
                    for process in psutil.Process(server.process.pid).children(recursive=True):
                        with contextlib.suppress(psutil.Error):  # a replica that was replaced
                            if process.name() == "raylet":
                                process.kill()
                    assert server.process.wait(120) == 2  # make's; the command's is 1
                for engine in engines:
                    wait_for_end(engine.pid, 30)
            finally:
                if server.process.poll() is None:
                    children[0].terminate()  # make passes no signal on
                    server.process.wait(120)
