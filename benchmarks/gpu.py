"""What only a GPU shows, by one command on a machine that has one: is it right, and how fast is it?

    python -m benchmarks.gpu [--folder benchmarks/results/gpu]

First every architecture of ours, on a tiny checkpoint with random weights, beside its reference:
in float32 and bfloat16, eager and compiled (with CUDA graphs on a GPU). Then models of full size,
also with random weights, so that nothing but configurations and tokenizers is downloaded: `POST /`,
vLLM's chat route and the offline engine in turns. It runs on a CPU too, if given smaller models.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from testing import checkpoints

ARCHITECTURES = tuple(checkpoints.BUILDERS)
DTYPES = ("float32", "bfloat16")
MODES = {"eager": "engine.enforce_eager=true", "compiled": "engine.enforce_eager=false"}
MODELS = ("baichuan2-7b-chat", "openelm-3b-instruct", "minicpm-2b-sft")
_CONTENDERS = ("service", "chat", "offline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--architectures", nargs="*", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--models", nargs="*", default=MODELS, help="to time; names or files")
    parser.add_argument("--concurrency", nargs="+", default=["1", "64", "256", "1024"])
    parser.add_argument("--rounds", default="3")
    parser.add_argument("--prompt-tokens", default="220")
    parser.add_argument("--answer-tokens", default="180")
    folder = Path(__file__).parent / "results" / "gpu"
    parser.add_argument("--folder", type=Path, default=folder)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    right = check(options)
    for model in options.models:
        time(model, options)
    raise SystemExit(0 if right else 1)


def check(options: argparse.Namespace) -> bool:
    """Verify each architecture, and write a table; whether all agree with their references."""
    lines = ["| architecture | type | mode | verdict |", "|---|---|---|---|"]
    right = True
    for architecture, dtype, mode, verdict, equal in _verdicts(options):
        right = right and equal
        lines.append(f"| {architecture} | {dtype} | {mode} | {verdict} |")
        print(lines[-1], flush=True)
    if len(lines) > 2:
        (options.folder / "verify.md").write_text("\n".join(lines) + "\n")
    return right


def _verdicts(options: argparse.Namespace) -> Iterator[tuple[str, str, str, str, bool]]:
    for architecture in options.architectures:
        with tempfile.TemporaryDirectory() as name:
            folder = checkpoints.write(architecture, Path(name))
            for dtype in options.dtypes:
                for mode in options.modes:
                    sets = (f"engine.dtype={dtype}", MODES[mode])
                    command = [sys.executable, "-m", "service", "verify", "--json"]
                    command.append(checkpoints.CATALOGUE[architecture])
                    for each in checkpoints.arguments(architecture, folder, *sets):
                        command += ["--set", each]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    try:
                        report = json.loads(done.stdout)
                        verdict = "; ".join([report["verdict"], *report["problems"]])
                    except ValueError:
                        verdict = f"failed: {done.stderr.strip()[-300:]}"
                    yield architecture, dtype, mode, verdict, done.returncode == 0


def time(model: str, options: argparse.Namespace) -> None:
    """The benchmark of one model with random weights, under its name in the folder."""
    command = [sys.executable, "-m", "benchmarks.run", "--model", model]
    command += ["--set", "engine.load_format=dummy", "--contenders", *_CONTENDERS]
    command += ["--concurrency", *options.concurrency, "--rounds", options.rounds]
    command += ["--prompt-tokens", options.prompt_tokens, "--answer-tokens", options.answer_tokens]
    subprocess.run([*command, "--folder", str(options.folder / Path(model).stem)], check=True)


if __name__ == "__main__":
    main()
