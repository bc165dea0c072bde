"""Measures the way through a cluster, on a stub, and what faults lose, on the embedded model.

`python -m benchmarks.cluster` prints a table. Ray listens on all interfaces: run it in a network of
its own (`unshare --net bash -c 'ip link set lo up; ...'`) or on a machine that nobody reaches.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from service.cluster import environment
from testing.cluster import ANSWERED, ENDED, Load
from testing.server import Server, free_port

_REQUESTS = 300  # one after the other
_STREAMS = 64
_CONVERSATIONS = 4
_TURNS = 6
_SMALL = {"engine.kv_cache_memory_bytes": "300M", "engine.max_num_seqs": 16}


@contextmanager
def stub_cluster(replicas: int) -> Iterator[tuple[str, str]]:
    """Run replicas of a stub, and a front. Yields the address, and that of a replica itself."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as path:
        saved = dict(os.environ)
        environment.prepare(path)
        os.environ["RAY_AUTH_TOKEN"] = "0" * 64
        import ray

        ray.init(
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=path,
            log_to_driver=False,
        )
        os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
        from ray import serve

        from benchmarks.cluster.stub import Stub
        from service.cluster.config import PREFIX
        from service.cluster.front_replica import Front
        from service.settings import Settings

        port = free_port()
        serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
        options = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}}
        stub: Any = Stub
        serve.run(
            stub.options(num_replicas=replicas, **options).bind(),
            name=f"{PREFIX}-stub",
            route_prefix="/stub",
        )
        front: Any = Front
        config = {
            "default": "stub",
            "owners": {"stub": "stub"},
            "clients": None,
            "cors": {},
        }
        serve.run(
            front.options(user_config=config, **options).bind(Settings().model_dump_json()),
            name=PREFIX,
        )
        time.sleep(3)  # until HAProxy has its backends
        try:
            yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{_port_of_a_replica()}"
        finally:
            serve.shutdown()
            ray.shutdown()
            os.environ.clear()
            os.environ.update(saved)


def _port_of_a_replica() -> int:
    for process in psutil.Process().children(recursive=True):
        if "ServeReplica:chat-service-stub" in " ".join(process.cmdline()):
            for connection in process.net_connections():
                port: int = connection.laddr.port
                if connection.status == psutil.CONN_LISTEN and 30_000 <= port < 31_000:
                    return port
    raise RuntimeError("no replica listens")


def median_milliseconds(url: str) -> float:
    """Return the median time of small requests, one after the other."""
    times = []
    with httpx.Client(trust_env=False) as client:
        for _ in range(_REQUESTS):
            began = time.perf_counter()
            client.post(url, json={"prompt": "hi"}).raise_for_status()
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def cpu_of_a_chunk(url: str) -> float:
    """Return the CPU milliseconds of all server processes for each chunk of 64 streams."""
    idle = _cpu_seconds()
    time.sleep(2)
    idle = (_cpu_seconds() - idle) / 2
    before, began = _cpu_seconds(), time.monotonic()
    chunks = asyncio.run(_stream(url))
    spent = _cpu_seconds() - before - idle * (time.monotonic() - began)
    return 1000 * spent / chunks


def _cpu_seconds() -> float:
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def _stream(url: str) -> int:
    chunks: list[int] = []
    async with httpx.AsyncClient(
        trust_env=False, timeout=120, limits=httpx.Limits(max_connections=None)
    ) as client:

        async def one() -> None:
            response = await client.post(url, json={"prompt": "hi"})
            response.raise_for_status()
            chunks.append(response.text.count("data: "))

        await asyncio.gather(*(one() for _ in range(_STREAMS)))
    return sum(chunks)


async def _rate(url: str, seconds: float) -> float:
    """Return the answers a second to 8 clients."""
    count = 0
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:

        async def one() -> None:
            nonlocal count
            while time.monotonic() < end:
                (await client.post(url, json={"prompt": "hi"})).raise_for_status()
                count += 1

        await asyncio.gather(*(one() for _ in range(8)))
    return count / seconds


def the_way() -> list[tuple[str, str]]:
    """Measure what HAProxy and the front add."""
    with stub_cluster(1) as (address, replica):
        roads = {"replica": f"{replica}/stub", "HAProxy": f"{address}/stub", "front": address}
        for url in roads.values():
            median_milliseconds(f"{url}/")  # warms it up
        medians = {name: median_milliseconds(f"{url}/") for name, url in roads.items()}
        chunks = {name: cpu_of_a_chunk(f"{url}/stream") for name, url in roads.items()}
        idle = _cpu_seconds()
        time.sleep(10)
        idle = (_cpu_seconds() - idle) / 10
        memory = sum(p.memory_full_info().uss for p in psutil.Process().children(recursive=True))
        one = asyncio.run(_rate(f"{address}/stub/step", 8))
    with stub_cluster(2) as (address, _):
        two = asyncio.run(_rate(f"{address}/stub/step", 8))
    return [
        ("a small request at the replica's own port, p50", f"{medians['replica']:.2f} ms"),
        ("HAProxy adds", f"{medians['HAProxy'] - medians['replica']:.2f} ms"),
        ("HAProxy and front add", f"{medians['front'] - medians['replica']:.2f} ms"),
        ("CPU of a streamed chunk, replica alone", f"{chunks['replica']:.3f} ms"),
        ("HAProxy and replica", f"{chunks['HAProxy']:.3f} ms"),
        ("HAProxy, front and replica", f"{chunks['front']:.3f} ms"),
        ("two replicas over one, an engine that sleeps", f"{two / one:.2f}"),
        ("Ray and a front, idle", f"{memory / 2**20:.0f} MiB, {idle:.0%} of a core"),
    ]


class _Real:
    """`chat-service cluster` with two replicas of the embedded model."""

    def __init__(
        self,
        folder: Path,
        replicas: object = 2,
        env: dict[str, str] | None = None,
        **options: int,
    ) -> None:
        self.file = folder / "cluster.yaml"
        self.port = free_port()
        self.write(replicas, **options)
        self.command = [sys.executable, "-m", "service", "cluster", str(self.file)]
        self.server = Server(
            self.command, folder / "log", port=self.port, env=env, health="/health/ready"
        )

    def write(self, replicas: object, sequences: int = 16, **options: int) -> None:
        model = {
            "model": "smollm2-135m-instruct",
            "replicas": replicas,
            "cpus": 0.5,
            "set": {**_SMALL, "engine.max_num_seqs": sequences},
            **options,
        }
        content = {"models": {"a": model}, "settings": {"port": self.port}}
        self.file.write_text(yaml.safe_dump(content))

    def __enter__(self) -> "_Real":
        self.server.wait_until_ready()
        while "Ready:" not in self.server.log.read_text():
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.process.send_signal(signal.SIGTERM)
        self.server.process.wait(120)

    def replicas(self) -> list[psutil.Process]:
        return [
            process
            for process in psutil.Process(self.server.process.pid).children(recursive=True)
            if "ServeReplica:chat-service-a:" in " ".join(process.cmdline())
        ]

    def serving(self) -> int:
        text = httpx.get(f"{self.server.url}/metrics", trust_env=False, timeout=60).text
        return len(set(re.findall(r'service_running_sequences\{model="a",replica="(\w+)"', text)))


def the_faults(folder: Path, kills: int, updates: int) -> list[tuple[str, str]]:
    """Count what is lost when replicas die, and when they are replaced."""
    rows = []
    (folder / "a").mkdir()
    with _Real(folder / "a") as real:
        counts: Counter[str] = Counter()
        for _ in range(kills):
            with Load(real.server.url) as load:
                time.sleep(8)
                real.replicas()[0].kill()
                time.sleep(8)
            counts += load.counts
            while real.serving() < 2:
                time.sleep(1)
        lost = {kind: n for kind, n in counts.items() if kind not in {*ANSWERED, ENDED}}
        shown = f"{counts.total()} answers, {counts[ENDED]} streams ended by an event, lost: "
        rows.append(
            (f"kill -9 of one of two replicas, 24 clients, {kills}x", f"{shown}{lost or 0}")
        )
        counts = Counter()
        for number in range(updates):
            real.write(2, sequences=12 + number % 2)
            with Load(real.server.url, 8) as load:
                subprocess.run(real.command, check=True, capture_output=True)
            counts += load.counts
        cut = {kind: n for kind, n in counts.items() if kind not in ANSWERED}
        rows.append(
            (f"rolling update, 8 clients, {updates}x", f"{counts.total()}, lost: {cut or 0}")
        )
    (folder / "b").mkdir()
    with _Real(folder / "b", replicas=[1, 2], queue=4) as real, Load(real.server.url):
        began = time.monotonic()
        while len(real.replicas()) < 2:
            time.sleep(0.2)
        rows.append(("from 1 to 2 replicas by load, decided", f"{time.monotonic() - began:.0f} s"))
    return rows


async def _conversations(url: str, run: int) -> list[float]:
    """Hold conversations at once; return the seconds to the first token of each later turn."""
    waits: list[float] = []

    async def one(client: httpx.AsyncClient, number: int) -> None:
        history: list[list[str]] = []
        headers = {"x-session-id": f"{run}-{number}"}
        for turn in range(_TURNS):
            question = f"{run} {number} {turn}: " + "tell me one more thing about this town. " * 4
            body = {"prompt": question, "history": history, "max_new_tokens": 24, "stream": True}
            began = time.monotonic()
            first, text = None, ""
            async with client.stream("POST", url, json=body, headers=headers) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        first, text = first or time.monotonic() - began, line
            if turn and first is not None:
                waits.append(first)
            history = json.loads(text.removeprefix("data: "))["history"]

    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:
        await asyncio.gather(*(one(client, number) for number in range(_CONVERSATIONS)))
    return waits


def the_conversations(folder: Path) -> list[tuple[str, str]]:
    """Measure what a conversation loses whose turns go to any of two replicas."""
    rows = []
    for name, algorithm in (("any replica", "leastconn"), ("one replica", "hdr(x-session-id)")):
        (folder / algorithm).mkdir()
        env = {"RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": algorithm}
        with _Real(folder / algorithm, env=env) as real:
            url = f"{real.server.url}/a/"
            asyncio.run(_conversations(url, 0))  # warms it up
            hits, queries = _prefix_cache(real)
            waits = [wait for run in (1, 2, 3) for wait in asyncio.run(_conversations(url, run))]
            hits, queries = (
                n - b for n, b in zip(_prefix_cache(real), (hits, queries), strict=True)
            )
        rows.append(
            (
                f"{_CONVERSATIONS} conversations of {_TURNS} turns at once, each at {name}",
                f"{hits / queries:.0%} of the prompts cached, first token after "
                f"{1000 * statistics.median(waits):.0f} ms (p50)",
            )
        )
    return rows


def _prefix_cache(real: _Real) -> tuple[float, float]:
    """Return how many prompt tokens were found in the caches, and how many were looked for."""
    text = httpx.get(f"{real.server.url}/metrics", trust_env=False, timeout=60).text
    hits, queries = (
        re.findall(rf"^vllm:prefix_cache_{kind}_total{{.*}} (\S+)$", text, re.M)
        for kind in ("hits", "queries")
    )
    return sum(map(float, hits)), sum(map(float, queries))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.cluster", description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--updates", type=int, default=5)
    arguments = parser.parse_args()
    rows = the_way()
    with tempfile.TemporaryDirectory() as folder:
        rows += the_conversations(Path(folder))
        rows += the_faults(Path(folder), arguments.kills, arguments.updates)
    print("| measured | here |\n|---|---|")
    print("".join(f"| {name} | {value} |\n" for name, value in rows))


if __name__ == "__main__":
    main()
