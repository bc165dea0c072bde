"""Tokens/s with requests that alternate between two LoRA adapters, beside the base's alone.

    python -m benchmarks.adapters [MODEL] [--turns 2] [--concurrency 8 64] [--rank 8]

One server answers both, one after the other in each turn, with the same prompts and as many tokens.
The adapters are random, and change the matrices that the tutorials train.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks import workload
from service import model_config, settings, weights
from testing import checkpoints
from testing.server import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    config, _ = model_config.load(options.model)
    base = weights.fetch(config.source, settings.load().cache_dir)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        words = []
        for seed, name in enumerate(("a", "b")):
            checkpoints.write_adapter(
                folder / name, base, modules="_proj", rank=options.rank, seed=seed
            )
            words += ["--adapter", f"{name}={folder / name}"]
        with Server.service(folder / "log", options.model, *words) as server:
            for concurrency in options.concurrency:
                _compare(server.url, config.name, options.turns, concurrency)


def _compare(url: str, base: str, turns: int, concurrency: int) -> None:
    kinds = {"base": (base,), "two adapters": ("a", "b")}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    asyncio.run(_load(url, ("a", "b"), "warm", concurrency))
    for turn in range(turns):
        for kind, names in kinds.items():
            speed = asyncio.run(_load(url, names, f"turn-{turn}", concurrency))
            found[kind].append(speed)
    for kind, speeds in found.items():
        shown = ", ".join(f"{speed:.0f}" for speed in speeds)
        print(f"{concurrency} at once, {kind}: {statistics.mean(speeds):.0f} ({shown})", flush=True)


async def _load(url: str, names: Sequence[str], seed: str, concurrency: int) -> float:
    """Answer two requests for each place, and return tokens per second."""
    source = workload.requests(seed, workload.Lengths())
    waiting = iter(list(zip(itertools.islice(source, 2 * concurrency), itertools.cycle(names))))
    tokens = 0

    async def user(http: httpx.AsyncClient) -> None:
        nonlocal tokens
        for ask, name in waiting:
            body = {
                "model": name,
                "messages": [{"role": "user", "content": ask.prompt}],
                "max_tokens": ask.max_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            answer = await http.post(f"{url}/v1/chat/completions", json=body)
            answer.raise_for_status()
            tokens += answer.json()["usage"]["completion_tokens"]

    async with httpx.AsyncClient(timeout=None, trust_env=False) as http:
        began = time.perf_counter()
        await asyncio.gather(*(user(http) for _ in range(concurrency)))
        return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
