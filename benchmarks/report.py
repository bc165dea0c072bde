"""The report of a run of the benchmark: Markdown and plots.

python -m benchmarks.report benchmarks/results/2026-01-31
"""

import argparse
import gzip
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Cell = dict[str, Any]

NAMES = {
    "service": "this service",
    "int8": "with weights in 8 bits",
    "chat": "its /v1 chat route",
    "vllm": "bare vLLM",
    "offline": "offline engine",
    "tutorial": "tutorial's server",
    "llama.cpp": "llama.cpp's server",
}
_COLOURS = {
    "service": "#0b7285",
    "int8": "#1971c2",
    "chat": "#66a80f",
    "vllm": "#e8590c",
    "offline": "#868e96",
    "tutorial": "#9c36b5",
    "llama.cpp": "#f08c00",
}
# The least tokens/s over the tutorial's server when busy, and over llama.cpp's by concurrent
# requests: of a processor without and with instructions for bfloat16.
_OVER_TUTORIAL = {"service": (6, 20), "int8": (8, 20)}
_OVER_LLAMA_CPP = {
    "service": ({1: 0.25, 8: 0.6, 64: 1.2}, {1: 0.5, 8: 1.0, 64: 1.5}),
    "int8": ({1: 0.6, 8: 1.5, 64: 2.5}, {}),
}
_BUSY = 64  # concurrent requests, at which most targets are set


def cells(folder: Path) -> list[Cell]:
    """What was measured so far, in the order of measuring."""
    file = folder / "cells.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(folder: Path) -> Path:
    """Write report.md and its plots into `folder`; returns report.md."""
    run = _Run(folder)
    plots = dict(run.plots())
    for name, figure in plots.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    text = "\n".join(run.markdown(list(plots)))
    (folder / "report.md").write_text(text)
    return folder / "report.md"


class _Run:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text())
        self.cells = cells(folder)
        self.levels = sorted({cell["concurrency"] for cell in self.cells})
        self.busy = _BUSY if _BUSY in self.levels else self.levels[-1]

    def select(self, contender: str, mode: str, concurrency: int) -> list[Cell]:
        wanted = (contender, mode, concurrency)
        found = [c for c in self.cells if (c["contender"], c["mode"], c["concurrency"]) == wanted]
        return sorted(found, key=lambda cell: int(cell["round"]))

    def records(self, cell: Cell) -> list[dict[str, Any]]:
        """Each request of a cell."""
        name = "{round}-{contender}-{mode}-{concurrency}".format_map(cell)
        packed = (self.folder / "raw" / f"{name}.json.gz").read_bytes()
        records: list[dict[str, Any]] = json.loads(gzip.decompress(packed))
        return records

    def series(self) -> Iterator[tuple[str, str]]:
        """Contenders and modes, in the order of NAMES."""
        for contender in NAMES:
            for mode in ("plain", "stream"):
                if any((c["contender"], c["mode"]) == (contender, mode) for c in self.cells):
                    yield contender, mode

    def markdown(self, plots: Sequence[str]) -> Iterator[str]:
        about = self.about
        machine = about["machine"]
        yield f"# Benchmark of {about['settings']['model']}\n"
        yield from self._summary()
        kind = [] if machine.get("bfloat16", True) else ["no instructions for bfloat16"]
        hardware = [machine["cpu"], *kind]
        hardware += [f"{machine['cores']} cores", f"{machine['memory_gb']} GB"]
        yield f"- Machine: {', '.join(hardware + machine['gpu'])}, {machine['system']}"
        yield "- Versions: " + ", ".join(f"{k} {v}" for k, v in about["versions"].items())
        yield f"- Begun {about['date']}, with `{about['command']}`"
        yield (
            "- Figures are medians over rounds, then (least-most). In a round all contenders get "
            "the same requests, one contender after the other.\n"
        )
        yield "## Targets\n"
        yield (
            "Ours over the other's, compared within each round; what holds a figure back is in "
            "[docs/performance.md](../../../docs/performance.md).\n"
        )
        yield "| figure | target | measured | met |\n|---|---|---|---|"
        yield from self._targets()
        yield "\n## Everything\n"
        yield (
            "| | | at once | tokens/s | answer p50, s | p99, s | first token p50, s | p99, s "
            "| between tokens p50, ms | p99, ms | API CPU, ms a request | ms a token | memory, MB |"
        )
        yield "|---" * 13 + "|"
        for contender, mode in self.series():
            for level in self.levels:
                if found := self.select(contender, mode, level):
                    yield self._row(contender, mode, level, found)
        yield (
            "\nAPI CPU and memory are of the process that answers HTTP, without the engine, where "
            "that has a process of its own. Of the "
            "tutorial's server only the first answers are waited for, which say nothing of the "
            "times of all.\n"
        )
        starts = self._starts()
        if starts:
            yield "## Start\n\nSeconds from the command to the first token, caches warm.\n"
            yield "| | seconds |\n|---|---|"
            for contender, seconds in starts.items():
                yield f"| {NAMES[contender]} | {_spread(seconds, 1)} |"
        yield "\n## Pictures\n"
        for name in plots:
            yield f"![{name}]({name}.svg)\n"

    def _summary(self) -> Iterator[str]:
        """The answer for who has the tutorial's server and more users."""
        level = self.busy
        ours = self.select("service", "plain", level)
        theirs = self.select("tutorial", "plain", level)
        if not (ours and theirs):
            return
        waits = [r["seconds"] for cell in ours for r in self.records(cell)]
        rate, their_rate = (statistics.median(map(_rate, side)) for side in (ours, theirs))
        tokens = statistics.mean(c["tokens"] / c["requests"] for c in ours)
        yield (
            f"With {level} users at once this service makes {rate:.0f} tokens/s, the tutorial's "
            f"server {their_rate:.0f}: {rate / their_rate:.0f} times as many. An answer of "
            f"{tokens:.0f} tokens takes {_quantile(waits, 0.5):.1f} s; the tutorial's server, "
            f"which answers one after the other, would be through with all {level} in "
            f"{level * tokens / their_rate:.0f} s.\n"
        )

    def _targets(self) -> Iterator[str]:
        """A row for each figure of ours over another's, and what it should be."""

        def over(
            other: str,
            level: int,
            figure: Callable[[Cell], float],
            mode: str = "plain",
            ours: str = "service",
        ) -> list[float]:
            theirs = {c["round"]: figure(c) for c in self.select(other, mode, level)}
            cells = self.select(ours, mode, level)
            return [figure(c) / theirs[c["round"]] for c in cells if c["round"] in theirs]

        def first(cell: Cell) -> float:
            arrivals = [r["arrivals"] for r in self.records(cell) if r.get("arrivals")]
            return _quantile([times[0] for times in arrivals], 0.99)

        busy, vllm = self.busy, NAMES["vllm"]
        starts = self._starts()
        both = zip(starts.get("service", []), starts.get("vllm", []), strict=False)
        plain, token = "API CPU per plain request over", "API CPU per streamed token over"
        fast = self.about["machine"].get("bfloat16", True)
        rows: list[tuple[str, str, float, list[float]]] = []
        for ours, name in (("service", ""), ("int8", f"{NAMES['int8']}, ")):
            ratios = over("tutorial", busy, _rate, ours=ours)
            what = f"{name}tokens/s at {busy} over tutorial's server"
            rows.append((what, "least", _OVER_TUTORIAL[ours][fast], ratios))
            for level, least in _OVER_LLAMA_CPP[ours][fast].items():
                ratios = over("llama.cpp", level, _rate, ours=ours)
                rows.append((f"{name}tokens/s at {level} over llama.cpp's", "least", least, ratios))
        for level in (level for level in self.levels if level >= busy):
            ratios = over("offline", level, _rate)
            rows.append((f"tokens/s at {level} over the offline engine", "least", 0.97, ratios))
        token_ratios = over("vllm", busy, _cpu_per_token, "stream")
        first_ratios = over("vllm", busy, first, "stream")
        rows += [
            (f"tokens/s at {busy} over {vllm}", "least", 1.4, over("vllm", busy, _rate)),
            (f"{plain} {vllm}, at {busy}", "most", 0.5, over("vllm", busy, _cpu_per_request)),
            (f"{token} {vllm}, at {busy}", "most", 0.6, token_ratios),
            (f"time to first token, p99 at {busy}, over {vllm}", "most", 1, first_ratios),
            (f"warm start to first token over {vllm}", "most", 0.8, [a / b for a, b in both]),
        ]
        for name, bound, value, ratios in rows:
            if ratios:
                ratio = statistics.median(ratios)
                met = (
                    "yes" if (ratio >= value if bound == "least" else ratio <= value) else "**no**"
                )
                yield f"| {name} | at {bound} {value:g} | {_spread(ratios, 2)} | {met} |"

    def _starts(self) -> dict[str, list[float]]:
        """Seconds to the first token of each start, by contender."""
        starts: dict[str, dict[int, float]] = {}
        for cell in self.cells:
            if seconds := cell.get("first_token_seconds"):
                starts.setdefault(cell["contender"], {}).setdefault(cell["round"], seconds)
        return {name: list(by_round.values()) for name, by_round in starts.items()}

    def _row(self, contender: str, mode: str, level: int, found: list[Cell]) -> str:
        columns = [_spread([_rate(cell) for cell in found], 0)]
        if contender == "offline":
            columns += [""] * 9
        else:
            records = [record for cell in found for record in self.records(cell)]
            waits = [record["seconds"] for record in records]
            if contender == "tutorial" and level > 1:
                columns += ["", ""]
            else:
                columns += [f"{_quantile(waits, q):.2f}" for q in (0.5, 0.99)]
            if mode == "stream":
                first = [r["arrivals"][0] for r in records if r.get("arrivals")]
                gaps = [b - a for r in records for a, b in pairwise(r.get("arrivals", []))]
                columns += [f"{_quantile(first, q):.2f}" for q in (0.5, 0.99)]
                columns += [f"{_quantile(gaps, q) * 1000:.0f}" for q in (0.5, 0.99)]
            else:
                columns += [""] * 4
            if contender in ("tutorial", "llama.cpp"):  # their CPU is the model's
                columns += ["", ""]
            else:
                columns.append(_spread([_cpu_per_request(cell) for cell in found], 1))
                columns.append(_spread([_cpu_per_token(cell) for cell in found], 3))
            columns.append(f"{statistics.median(cell['resident_mb'] for cell in found):.0f}")
        return f"| {NAMES[contender]} | {mode} | {level} | {' | '.join(columns)} |"

    def plots(self) -> Iterator[tuple[str, Figure]]:
        """By name; each is drawn from the same cells as the tables."""
        figure, axes = _axes("concurrent requests", "tokens/s", "Throughput")
        self._lines(axes, lambda cells: [statistics.median(map(_rate, cells))])
        yield "throughput", figure
        figure, axes = _axes("concurrent requests", "seconds", "Time of an answer, p50 and p99")
        self._lines(
            axes, lambda cells: self._quantiles(cells, (0.5, 0.99)), skip=("offline", "tutorial")
        )
        yield "latency", figure
        figure, axes = _axes("seconds", "share of answers", f"Time of an answer at {self.busy}")
        for contender, mode in self.series():
            if found := self.select(contender, mode, self.busy):
                if contender in ("service", "vllm"):
                    waits = [r["seconds"] for cell in found for r in self.records(cell)]
                    at = [i / 100 for i in range(101)]
                    axes.plot([_quantile(waits, q) for q in at], at, **_line(contender, mode))
        axes.legend()
        yield "latency-cdf", figure
        figure, axes = _axes("concurrent requests", "seconds", "Time to first token, p50 and p99")

        def first(cells: list[Cell]) -> list[float]:
            found = [r["arrivals"][0] for c in cells for r in self.records(c) if r.get("arrivals")]
            return [_quantile(found, q) for q in (0.5, 0.99)]

        self._lines(axes, first, modes=("stream",))
        yield "first-token", figure
        figure, axes = _axes("concurrent requests", "milliseconds", "API process CPU a request")
        self._lines(
            axes,
            lambda cells: [statistics.median(map(_cpu_per_request, cells))],
            skip=("offline", "tutorial"),
        )
        yield "cpu", figure

    def _quantiles(self, found: list[Cell], at: Iterable[float]) -> list[float]:
        waits = [record["seconds"] for cell in found for record in self.records(cell)]
        return [_quantile(waits, q) for q in at]

    def _lines(
        self,
        axes: Axes,
        values: Callable[[list[Cell]], list[float]],
        skip: Sequence[str] = (),
        modes: Sequence[str] = ("plain", "stream"),
    ) -> None:
        for contender, mode in self.series():
            if contender in skip or mode not in modes:
                continue
            at = [level for level in self.levels if self.select(contender, mode, level)]
            rows = [values(self.select(contender, mode, level)) for level in at]
            for number, column in enumerate(zip(*rows, strict=True)):
                line = _line(contender, mode)
                if number:
                    line |= {"label": None, "alpha": 0.45}
                axes.plot(at, column, marker="o", markersize=3, **line)
        axes.set_xscale("log", base=2)
        axes.set_xticks(self.levels, [str(level) for level in self.levels])
        axes.set_ylim(bottom=0)
        axes.legend()


def _axes(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _line(contender: str, mode: str) -> dict[str, Any]:
    label = NAMES[contender] + (", streamed" if mode == "stream" else "")
    style = "--" if mode == "stream" else "-"
    return {"label": label, "color": _COLOURS[contender], "linestyle": style}


def _rate(cell: Cell) -> float:
    return float(cell["tokens"] / cell["seconds"])


def _cpu_per_request(cell: Cell) -> float:
    return float(cell["cpu_seconds"] / cell["requests"] * 1000)


def _cpu_per_token(cell: Cell) -> float:
    return float(cell["cpu_seconds"] / cell["tokens"] * 1000)


def _quantile(values: Sequence[float], at: float) -> float:
    """The smallest value that at least this share does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(at * len(ordered)) - 1)] if ordered else math.nan


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of a run again.")
    parser.add_argument("folder", type=Path, help="such as benchmarks/results/2026-01-31")
    folder: Path = parser.parse_args().folder
    if not (folder / "about.json").is_file():
        parser.error(f"{folder} has no about.json: not the folder of a run")
    print(write(folder))


if __name__ == "__main__":
    main()
