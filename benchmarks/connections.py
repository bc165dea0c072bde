"""What open connections and a long queue cost: memory, and CPU of the API process per request.

    python -m benchmarks.connections [--folder benchmarks/results/2026-01-31]

First 2,000 connections of which 256 have a request running; then the cost of a request beside 1 to
10,000 idle connections, and while 1 to 10,000 requests stand in the queue. Needs as many file
descriptors (`ulimit -n 20000`).
"""

import argparse
import asyncio
import json
import resource
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from testing.server import Server

MODEL = "smollm2-135m-instruct"
RUNNING = 256
OPEN = 2000
LEVELS = (1, 100, 1000, 10_000)
ROUNDS = 3
REQUESTS = 1024  # measured at a time
AT_ONCE = 64
# One token: the engine does little, and what a request costs beside its tokens is seen.
_SHORT = {"prompt": "hi", "max_new_tokens": 1}
_LONG = {"prompt": "Count from one to a thousand.", "max_new_tokens": 400, "temperature": 1}


class Connection:
    """One kept connection of the simplest HTTP client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, body: dict[str, object] | None = None) -> None:
        """POST / with this body; GET /health/live without."""
        content = json.dumps(body).encode() if body else b""
        line = "POST /" if body else "GET /health/live"
        head = f"{line} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)

    async def answer(self) -> int:
        """The status of the next answer, whose body is read too."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
        await self._reader.readexactly(int(fields[b"content-length"]))
        return int(head.split(b" ", 2)[1])

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def connections(
    port: int, api: psutil.Process, count: int
) -> AsyncIterator[list[Connection]]:
    """So many open connections, on each of which something was asked once."""
    opened = []
    before = api.num_fds()
    try:
        for _ in range(count):
            connection = await Connection.open(port)
            connection.send()
            assert await connection.answer() == 200
            opened.append(connection)
        yield opened
    finally:
        for connection in opened:
            connection.close()
        spent = 0.0
        # Its work on them is none of the next figure's.
        while (now := _cpu(api)) - spent > 0.02 or api.num_fds() > before:
            spent = now
            await asyncio.sleep(0.5)


async def cost(port: int, api: psutil.Process, clients: int) -> float:
    """CPU milliseconds of the API process per short request, with so many closed loops.

    What they are beyond RUNNING stands in the queue all the time.
    """
    answered = 0

    async def ask(connection: Connection) -> None:
        nonlocal answered
        while True:
            connection.send(_SHORT)
            assert await connection.answer() == 200
            answered += 1

    async def until(count: int) -> None:
        while answered < count:
            await asyncio.sleep(0.05)
            for loop in loops:
                if loop.done():
                    loop.result()

    async with connections(port, api, clients) as opened:
        loops = [asyncio.create_task(ask(connection)) for connection in opened]
        await _until(port, "service_waiting_sequences", clients - RUNNING - AT_ONCE)
        await until(answered + RUNNING)  # those that met a shorter queue are through
        before, answered = _cpu(api), 0
        await until(REQUESTS)
        spent = (_cpu(api) - before) / answered * 1000
        for loop in loops:
            loop.cancel()
        return spent


async def _until(port: int, gauge: str, value: float) -> None:
    """Return when this metric of the server has reached so much."""
    async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
        while True:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
            (line,) = (line for line in text.splitlines() if line.startswith(f"{gauge} "))
            if float(line.split()[1]) >= value:
                return
            await asyncio.sleep(0.2)


async def memory(port: int, api: psutil.Process) -> dict[str, float]:
    """MB of the API process before, and with OPEN connections of which RUNNING have a request."""
    before = api.memory_info().rss
    async with connections(port, api, OPEN) as opened:
        asking = opened[:RUNNING]
        for connection in asking:
            connection.send(_LONG)
        await _until(port, "service_running_sequences", RUNNING)
        statuses = await asyncio.gather(*(connection.answer() for connection in asking))
        assert set(statuses) == {200}, statuses
        return {"before": before / 2**20, "with_connections": api.memory_info().rss / 2**20}


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _measure(server: Server) -> dict[str, Any]:
    port = int(server.url.rpartition(":")[2])
    api = server.api_process()
    await cost(port, api, AT_ONCE)  # warm
    held = await memory(port, api)
    print(f"{OPEN} connections, {RUNNING} running: {held}", flush=True)
    costs: dict[str, dict[int, list[float]]] = {
        kind: {level: [] for level in LEVELS} for kind in ("idle", "queued")
    }
    for _ in range(ROUNDS):
        for level in LEVELS:
            async with connections(port, api, level):
                costs["idle"][level].append(await cost(port, api, AT_ONCE))
            costs["queued"][level].append(await cost(port, api, RUNNING + level))
            print(level, {kind: costs[kind][level][-1] for kind in costs}, flush=True)
    return {"open": OPEN, "running": RUNNING, "memory_mb": held, "cpu_ms_per_request": costs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, help="of a run of the benchmark, to add this to")
    asked = parser.parse_args()
    needed = LEVELS[-1] + 1000
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(f"error: at most {hard} files may be open; ulimit -n {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    env = {
        "SERVICE_MAX_CONNECTIONS": str(needed),
        "SERVICE_MAX_WAITING": str(needed),
        "SERVICE_QUEUE_TIMEOUT": "600",
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        Server.service(
            Path(folder) / "log", MODEL, "--set", f"engine.max_num_seqs={RUNNING}", env=env
        ) as server,
    ):
        measured = asyncio.run(_measure(server))
    if asked.folder:
        (asked.folder / "connections.json").write_text(json.dumps(measured) + "\n")
    for kind, levels in measured["cpu_ms_per_request"].items():
        medians = {level: round(statistics.median(costs), 2) for level, costs in levels.items()}
        print(f"API CPU, ms a request beside {kind}: {medians}")


if __name__ == "__main__":
    main()
