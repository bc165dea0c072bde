"""The benchmarks run, go on where they were cut off, and report what they measured."""

import json
import re
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest

from benchmarks import workload
from testing import checkpoints
from testing.server import Server
from tests.conftest import PATIENCE

ROOT = Path(__file__).parent.parent


def locust(server: Server, raw: Path, *arguments: str) -> list[dict[str, object]]:
    """What locust measured of 4 requests of two users."""
    command = [sys.executable, "-m", "locust", "-f", "benchmarks/locustfile.py", "--headless"]
    command += ["--host", server.url, "-u", "2", "-r", "2", "--requests", "4", "--raw", str(raw)]
    command += ["--answer-tokens", "6", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in raw.read_text().splitlines()]
    assert len(records) == 4 and not any("error" in record for record in records)
    return records


@pytest.mark.parametrize("users", ["Plain", "Stream", "Chat", "ChatStream"])
@pytest.mark.parametrize("loop", [[], ["--arrival-rate", "4"]])
def test_every_kind_of_user_measures_its_answers(
    service: Server, tmp_path: Path, users: str, loop: list[str]
) -> None:
    for record in locust(service, tmp_path / "raw.jsonl", *loop, users):
        tokens, seconds, arrivals = record["tokens"], record["seconds"], record.get("arrivals", [])
        assert isinstance(tokens, int) and isinstance(seconds, float) and isinstance(arrivals, list)
        assert 0 < tokens <= 24
        assert bool(arrivals) == ("Stream" in users)
        assert len(arrivals) <= tokens + 1
        assert all(a <= b for a, b in pairwise([0.0, *arrivals, seconds + 0.001]))


def test_the_same_seed_asks_the_same_with_lengths_that_spread() -> None:
    lengths = workload.Lengths(prompt=48, answer=32)
    asked, again, other = (list(islice(workload.requests(s, lengths), 200)) for s in "aab")
    assert asked == again != other
    answers = sorted(a.max_tokens for a in asked)
    assert 24 < answers[100] < 42 and answers[-1] <= 128 and answers[-10] > 2 * answers[100]


def test_a_run_goes_on_where_it_was_cut_off_and_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    # The tutorials' server computes in bfloat16, which takes long where a processor has none.
    checkpoint = checkpoints.write("qwen2", tmp_path / "tiny")
    sets = checkpoints.arguments("qwen2", checkpoint, "engine.enforce_eager=true")

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.run", "--folder", str(folder)]
        command += ["--model", checkpoints.CATALOGUE["qwen2"]]
        command += [word for each in sets for word in ("--set", each)]
        command += ["--rounds", "1", "--concurrency", "2", "--answer-tokens", "4"]
        command += ["--contenders", "service", "offline", "tutorial", *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)

    done = run("--prompt-tokens", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    cells = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    measured = [(cell["contender"], cell["mode"]) for cell in map(json.loads, cells)]
    names = ["service", "service", "offline", "tutorial"]
    assert measured == list(zip(names, ["plain", "stream", "plain", "plain"], strict=True))
    (folder / "cells.jsonl").write_text("".join(cells[:-1]))
    done = run("--prompt-tokens", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    again = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    assert again[:-1] == cells[:-1] and json.loads(again[-1])["contender"] == "tutorial"
    report = (folder / "report.md").read_text()
    target = 20 if json.loads((folder / "about.json").read_text())["machine"]["bfloat16"] else 6
    assert f"| tokens/s at 2 over tutorial's server | at least {target} |" in report
    for picture in re.findall(r"\]\((.*\.svg)\)", report):
        assert "<svg" in (folder / picture).read_text()
    refused = run("--prompt-tokens", "9")
    assert refused.returncode == 1 and "other settings" in refused.stderr
