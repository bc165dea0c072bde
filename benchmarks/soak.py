"""A long look at a server under more load than it takes, with clients that misbehave.

    python -m benchmarks.soak --minutes 10

Starts `chat-service serve` with a small engine, keeps about three times its capacity in flight, and
lets clients disconnect at random, set deadlines, send bad bodies and flood. Every good answer is
checked to be its own client's. Afterwards: what was answered how, the memory and file descriptors
of the API process over time, and overload against the unloaded peak. Exit status 1 when something
is wrong.
"""

import argparse
import asyncio
import json
import random
import ssl
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from testing.server import Server

SEQUENCES = 16  # that the engine runs at once
TOKENS = 24
# Answers by heart, so that one that came to another's client is seen.
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Germany": "Berlin",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Russia": "Moscow",
}
BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[1]",
    b'{"prompt": 1}',
    b'{"prompt": "hi", "temperature": 9}',
    b"\xff" * 100,
    b'{"prompt": "' + b"x" * 100_000 + b'"}',
)


@dataclass
class Outcome:
    """What became of the requests."""

    ended: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)  # seconds, of good answers
    wrong: list[str] = field(default_factory=list)

    def expect(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what)


async def ask(client: httpx.AsyncClient, outcome: Outcome, country: str, stream: bool) -> None:
    """A well-behaved request whose answer is known."""
    body = {
        "prompt": f"What is the capital of {country}?",
        "stream": stream,
        "max_new_tokens": TOKENS,
    }
    began = time.monotonic()
    answer = await client.post("/", json=body)
    if answer.status_code == 429:
        outcome.ended["429"] += 1
        outcome.expect("retry-after" in answer.headers, "429 without Retry-After")
        await asyncio.sleep(int(answer.headers["retry-after"]))
        return
    last = json.loads(answer.text.strip().rpartition("data: ")[2])
    outcome.ended[str(last["status"])] += 1
    if last["status"] == 200:
        outcome.waits.append(time.monotonic() - began)
        text = last["response"]
        outcome.expect(CAPITALS[country] in text, f"{country}: {text[:100]!r}")
    else:
        outcome.expect(last["status"] == 503, f"status {last['status']}: {answer.text[:200]}")


async def chat(client: httpx.AsyncClient, outcome: Outcome, country: str) -> None:
    """The same on vLLM's own route."""
    messages = [{"role": "user", "content": f"What is the capital of {country}?"}]
    body = {"model": "smollm2-135m-instruct", "messages": messages, "max_tokens": TOKENS}
    answer = await client.post("/v1/chat/completions", json=body)
    outcome.ended[f"chat {answer.status_code}"] += 1
    if answer.status_code == 200:
        text = answer.json()["choices"][0]["message"]["content"]
        outcome.expect(CAPITALS[country] in text, f"chat {country}: {text[:100]!r}")
    else:
        outcome.expect(answer.status_code in (429, 503), f"chat {answer.status_code}")


async def leave(client: httpx.AsyncClient, outcome: Outcome, seconds: float) -> None:
    """A request whose client goes away, queued, at once or in the middle of a stream."""
    body = {"prompt": "Count from one to a thousand.", "stream": True, "max_new_tokens": 500}
    try:
        async with asyncio.timeout(seconds):
            async with client.stream("POST", "/", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    pass
    except TimeoutError:
        outcome.ended["left"] += 1


async def hurry(client: httpx.AsyncClient, outcome: Outcome, seconds: float) -> None:
    """A request with a deadline that it will not meet."""
    body = {"prompt": "Count from one to a thousand.", "temperature": 2, "max_new_tokens": 1000}
    headers = {"X-Request-Timeout": f"{seconds:.2f}"}
    answer = await client.post("/", json=body, headers=headers)
    outcome.ended[f"deadline {answer.status_code}"] += 1
    outcome.expect(answer.status_code in (504, 429, 200), f"deadline: {answer.status_code}")


async def misbehave(client: httpx.AsyncClient, outcome: Outcome, body: bytes) -> None:
    """A body that must be refused."""
    answer = await client.post("/", content=body)
    outcome.ended[f"bad {answer.status_code}"] += 1
    # A full queue is told before the prompt is looked at, a body that is none before that.
    refused = (400, 422, 429) if b"xxx" in body else (400, 422)
    outcome.expect(answer.status_code in refused, f"bad body: {answer.status_code}")


async def load(url: str, seconds: float, clients: int, outcome: Outcome, *, rude: bool) -> None:
    """Clients in a closed loop for a while; rude ones do whatever they like in between."""
    end = time.monotonic() + seconds

    trusting = ssl.create_default_context()  # one for all: to make it costs as much as a request

    async def one(number: int) -> None:
        choose = random.Random(number)
        async with httpx.AsyncClient(
            base_url=url, timeout=180, trust_env=False, verify=trusting
        ) as client:
            while time.monotonic() < end:
                country = choose.choice(list(CAPITALS))
                kind = choose.random() if rude else 1.0
                if kind < 0.15:
                    await leave(client, outcome, choose.uniform(0.01, 3))
                elif kind < 0.25:
                    await hurry(client, outcome, choose.uniform(0.05, 2))
                elif kind < 0.35:
                    await misbehave(client, outcome, choose.choice(BAD_BODIES))
                elif kind < 0.5:
                    await chat(client, outcome, country)
                else:
                    await ask(client, outcome, country, choose.random() < 0.3)

    await asyncio.gather(*(one(number) for number in range(clients)))


async def sample(process: psutil.Process, seconds: float, samples: list[tuple[int, int]]) -> None:
    """Memory in bytes and file descriptors of the API process, ten times a minute."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await asyncio.sleep(6)
        samples.append((process.memory_info().rss, process.num_fds()))


def good_per_second(outcome: Outcome, seconds: float) -> float:
    return outcome.ended["200"] / seconds


async def run(server: Server, minutes: float) -> tuple[dict[str, Any], list[str]]:
    """The soak on a running server: a report, and what was wrong."""
    api = server.api_process()
    phase = min(30.0, minutes * 60 / 5)
    await load(server.url, 5, SEQUENCES, Outcome(), rude=False)  # warm
    peak = Outcome()
    await load(server.url, phase, SEQUENCES, peak, rude=False)
    outcome, samples = Outcome(), list[tuple[int, int]]()
    await asyncio.gather(
        load(server.url, minutes * 60, SEQUENCES * 3, outcome, rude=True),
        sample(api, minutes * 60, samples),
    )
    crowd = Outcome()
    await load(server.url, phase, SEQUENCES * 10, crowd, rude=False)
    await asyncio.sleep(1)
    async with httpx.AsyncClient(trust_env=False) as client:
        metrics = (await client.get(f"{server.url}/metrics")).text
    wrong = outcome.wrong + crowd.wrong
    for name in ("service_running_sequences", "service_waiting_sequences"):
        if f"\n{name} 0.0" not in metrics:
            wrong.append(f"{name} is not 0 afterwards")
    after = Outcome()
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        await ask(client, after, "France", False)
    if after.ended != Counter({"200": 1}):
        wrong.append("the server does not answer afterwards")
    third = max(1, len(samples) // 3)
    first = [statistics.median(column) for column in zip(*samples[:third], strict=True)]
    last = [statistics.median(column) for column in zip(*samples[-third:], strict=True)]
    if last[0] > first[0] * 1.1:
        wrong.append(f"memory grew from {first[0] / 2**20:.0f} to {last[0] / 2**20:.0f} MiB")
    if last[1] > first[1] + 20:
        wrong.append(f"file descriptors grew from {first[1]:.0f} to {last[1]:.0f}")
    peak_rate, crowd_rate = good_per_second(peak, phase), good_per_second(crowd, phase)
    if crowd_rate < 0.95 * peak_rate:
        wrong.append(f"at 10 times the load {crowd_rate:.2f}/s, unloaded {peak_rate:.2f}/s")
    report = {
        "minutes": minutes,
        "requests": dict(sorted(outcome.ended.items())),
        "memory MiB, first and last third": [round(first[0] / 2**20), round(last[0] / 2**20)],
        "file descriptors, first and last third": [first[1], last[1]],
        "answers/s unloaded, and at 10 times": [round(peak_rate, 2), round(crowd_rate, 2)],
        "longest answered wait at 10 times, s": round(max(crowd.waits, default=0), 1),
        "refused at 10 times": crowd.ended["429"],
    }
    return report, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        arguments = ("--set", f"engine.max_num_seqs={SEQUENCES}")
        with Server.service(log, *arguments, env={"SERVICE_MAX_WAITING": str(SEQUENCES)}) as server:
            report, wrong = asyncio.run(run(server, minutes))
            report["exit status after SIGTERM"] = server.stop()
        if "Traceback" in log.read_text():
            wrong.append("a traceback in the server's log")
    print(json.dumps(report, indent=2))
    for line, count in Counter(wrong).most_common(20):
        print(f"wrong ({count} times): {line}", file=sys.stderr)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
