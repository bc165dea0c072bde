"""What this service costs beside bare vLLM: start-up, memory and CPU, interleaved A B A B.

    python -m benchmarks.compare [--rounds 3]

Bare vLLM is `python -m vllm.entrypoints.launchers.api_server.entry` with the same model and
arguments. CPU is the time of the API process alone, not of the engine or the client.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from benchmarks.server import Server, free_port
from service import model_config, settings, weights

MODEL = "smollm2-135m-instruct"
TOKENS = 64
CONCURRENT = 32
REQUESTS = 128


def bare_vllm(log: Path) -> Server:
    """vLLM's own server on the model's files, with the arguments of the YAML."""
    config, _ = model_config.load(MODEL)
    folder = weights.fetch(config.source, settings.load().cache_dir)
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    arguments = {"model": folder, "served-model-name": MODEL, "host": "127.0.0.1", "port": port}
    arguments |= {name.replace("_", "-"): value for name, value in config.engine.items()}
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    return Server(command, log, port=port)


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of one process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def resident_mb(server: Server) -> float:
    """Memory of what is not the engine: the API process, and the supervisor where there is one."""
    processes = {psutil.Process(server.process.pid), server.api_process()}
    resident: int = sum(process.memory_info().rss for process in processes)
    return resident / 2**20


def start_up(rounds: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds from the command to the first answer, and MB without the engine after it."""
    starts: dict[str, Callable[[], Server]] = {
        "service": lambda: Server.service(folder / "service.log"),
        "bare vLLM": lambda: bare_vllm(folder / "vllm.log"),
    }
    measured: dict[str, dict[str, list[float]]] = {
        name: {"start_s": [], "rss_mb": []} for name in starts
    }
    for _ in range(rounds):
        for name, start in starts.items():
            began = time.monotonic()
            with start() as server:
                asyncio.run(_load(server.url, "/v1/chat/completions", requests=1))
                measured[name]["start_s"].append(time.monotonic() - began)
                measured[name]["rss_mb"].append(resident_mb(server))
                print(name, {key: values[-1] for key, values in measured[name].items()}, flush=True)
    return measured


def cpu_per_request(rounds: int, folder: Path) -> dict[str, list[float]]:
    """API-process CPU milliseconds per request, both routes in one server."""
    measured: dict[str, list[float]] = {"/": [], "/v1/chat/completions": []}
    with Server.service(folder / "service.log") as server:
        api = server.api_process()
        for route in measured:
            asyncio.run(_load(server.url, route, requests=CONCURRENT))  # warm both up
        for turn in range(rounds):
            # Each route is the first of a round as often as the other.
            for route in list(measured)[:: 1 if turn % 2 else -1]:
                before = cpu_seconds(api)
                asyncio.run(_load(server.url, route, requests=REQUESTS))
                measured[route].append((cpu_seconds(api) - before) / REQUESTS * 1000)
                print(f"{route} {measured[route][-1]:.2f} ms", flush=True)
    return measured


async def _load(url: str, route: str, *, requests: int) -> None:
    prompt = "Tell me a long story about the sea."
    body: dict[str, object]
    if route == "/":
        body = {"prompt": prompt, "max_new_tokens": TOKENS}
    else:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": MODEL, "messages": messages, "max_tokens": TOKENS}
    gate = asyncio.Semaphore(CONCURRENT)

    kept = httpx.Limits(max_connections=CONCURRENT, max_keepalive_connections=CONCURRENT)
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=kept) as client:

        async def one() -> None:
            async with gate:
                (await client.post(route, json=body)).raise_for_status()

        await asyncio.gather(*(one() for _ in range(requests)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cpu = cpu_per_request(rounds, folder)
        starts = start_up(rounds, folder)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"medians of {rounds} rounds; {TOKENS} tokens, {CONCURRENT} concurrent\n")
    print("| figure | this service | bare vLLM | ratio |\n|---|---|---|---|")
    pairs = {
        "warm start to first answer, s": [starts[name]["start_s"] for name in starts],
        "memory without the engine, MB": [starts[name]["rss_mb"] for name in starts],
        "API process CPU per request, ms (POST / beside chat)": list(cpu.values()),
    }
    for figure, sides in pairs.items():
        a, b = map(statistics.median, sides)
        print(f"| {figure} | {a:.2f} | {b:.2f} | {a / b:.2f} |")
    print(json.dumps({"starts": starts, "cpu_ms": cpu}))


if __name__ == "__main__":
    main()
