"""The command line: parses arguments, calls the modules that do the work, prints results."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service import model_config, own_model, settings, weights
from service.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from service.preflight.verify import Verification

DEFAULT_MODEL = "smollm2-135m-instruct"
_MIN_MEMORY = 2**20  # bytes

app = typer.Typer(
    help="Serve the models that the tutorials teach, the way their readers call them, on vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        help="A name from `chat-service models`, a YAML file, or a folder: a model or an adapter.",
        metavar="MODEL|FILE|FOLDER",
        autocompletion=lambda: list(model_config.catalogue()),
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override one value of the YAML."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME=FOLDER", help="A LoRA adapter to serve too; may be repeated."
    ),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].")]
Port = Annotated[int | None, typer.Option(help="Port to listen on [default: 6006].")]
Url = Annotated[
    str | None,
    typer.Option(help="Of the server [default: where `serve` listens by its SERVICE_ variables]."),
]
Key = Annotated[
    str | None,
    typer.Option(
        envvar="SERVICE_API_KEY", show_envvar=True, help="The API key, if it asks for one."
    ),
]
Verbose = Annotated[
    bool | None, typer.Option("--verbose", help="Show everything that vLLM and its libraries log.")
]


def _print_version(requested: bool) -> None:
    if requested:
        print(version("vllm-chat-service"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    model: Model = DEFAULT_MODEL,
    host: Host = None,
    port: Port = None,
    assignments: Assignments = None,
    adapters: Adapters = None,
    verbose: Verbose = None,
) -> None:
    """Serve a model until Ctrl-C.

    Examples:

        chat-service serve

        chat-service serve qwen2-7b-instruct --port 7000

        chat-service serve my-model.yaml --set engine.max_model_len=2048

        chat-service serve qwen2-7b-instruct --adapter my=/folder
    """
    from service.launch import supervisor

    config, origins = own_model.load(model, assignments or (), adapters or ())
    supervisor.serve(config, origins, settings.load(host=host, port=port, verbose=verbose))


@app.command()
def cluster(
    file: Annotated[
        Path | None,
        typer.Argument(help="Models and replicas [default: two of the embedded model]."),
    ] = None,
    only_check: Annotated[
        bool, typer.Option("--check", help="Say what is wrong with the file, or does not fit.")
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Show the cluster that runs, once.")
    ] = False,
    environment: Annotated[
        bool,
        typer.Option("--environment", help="Print the variables that `ray start` needs on a node."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
) -> None:
    """Serve several models, or several replicas of one, on Ray Serve, until Ctrl-C.

    Run again with a changed file, it updates the models that are served.

    Examples:

        chat-service cluster

        chat-service cluster cluster.yaml --check
    """
    from service.cluster import command
    from service.cluster.environment import VARIABLES

    if environment:
        for name, value in VARIABLES.items():
            print(f"export {name}={shlex.quote(value)}")
    elif status:
        _print_cluster(command.status(), as_json=as_json)
    elif only_check:
        problems = command.check(file)
        for problem in problems:
            print(f"problem: {problem}")
        if problems:
            raise SystemExit(1)
        print("ok")
    else:
        command.run(file)


@app.command()
def check(
    model: Model = DEFAULT_MODEL,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Of each GPU to plan for: 24GiB, 24GB [default: this machine's]."
        ),
    ] = None,
    concurrent: Annotated[
        int, typer.Option(min=1, metavar="N", help="Requests at once that must fit.")
    ] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="L", help="Tokens of each of them [default: the longest allowed]."
        ),
    ] = None,
    assignments: Assignments = None,
    adapters: Adapters = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = None,
) -> None:
    """Validate a model's YAML against vLLM without loading weights; say where each value is from.

    With the model's files here: will it fit, and is its template sane. 1 when not.

    Examples:

        chat-service check

        chat-service check my-model.yaml --memory 24GiB --concurrent 8 --context 2048
    """
    from service.preflight import check as checker

    config, origins = own_model.load(model, assignments or (), adapters or ())
    print("Asking vLLM, which takes a while to import ...", file=sys.stderr, flush=True)
    report = checker.check(
        config,
        origins,
        settings.load(verbose=verbose),
        memory=_size(memory) if memory else None,
        concurrent=concurrent,
        context=context,
    )
    if as_json:
        columns = ("key", "value", "from")
        rows = [dict(zip(columns, map(str, row), strict=True)) for row in report.rows]
        print(json.dumps({"model": config.name, **asdict(report), "rows": rows}))
        raise SystemExit(1 if report.problems else 0)
    _print_table(("key", "value", "from"), report.rows)
    for line in report.fit:
        print(line)
    for warning in report.warnings:
        print(f"warning: {warning}")
    for problem in report.problems:
        print(f"problem: {problem}")
    if report.problems:
        raise SystemExit(1)
    print(f"{config.name}: ok")


@app.command()
def download(model: Model = DEFAULT_MODEL, assignments: Assignments = None) -> None:
    """Download a model, and print the folder; then those of its tokenizer and adapters, if any.

    Run again, it resumes. `serve` does the same when the files are not here.

    Examples:

        chat-service download qwen2-7b-instruct

        chat-service download my-model.yaml --set source.revision=v1.0
    """
    config, _ = own_model.load(model, assignments or ())
    cache_dir = settings.load().cache_dir
    print(weights.fetch(config.source, cache_dir))
    if config.tokenizer:
        print(weights.fetch(config.tokenizer, cache_dir, weights=False))
    for name, source in config.adapters.items():
        print(weights.fetch_adapter(name, source))


@app.command(name="compile")
def compile_(
    model: Model = DEFAULT_MODEL,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = None,
) -> None:
    """Compile a model for this CPU, and measure what it brings; later starts use it if it does.

    It takes some minutes and wants the machine for itself. A GPU needs no such step.

    Examples:

        chat-service compile

        chat-service compile my-model.yaml --set engine.max_model_len=2048
    """
    from service.launch import compile_cache
    from service.preflight import compile

    config, origins = own_model.load(model, assignments or ())
    result = compile.make(config, origins, settings.load(verbose=verbose))
    if as_json:
        print(json.dumps({**asdict(result), "gain": result.gain, "used": result.worthwhile}))
        return
    rows = zip(compile_cache.BATCHES, result.eager, result.compiled, strict=True)
    _print_table(
        ("requests at once", "tokens/s eager", "compiled"),
        [(batch, f"{eager:.1f}", f"{compiled:.1f}") for batch, eager, compiled in rows],
    )
    verdict = "`serve` uses it from now on" if result.worthwhile else "`serve` goes on without it"
    print(f"{config.name}: {result.gain:.2f} times as fast; {verdict}")


@app.command()
def verify(
    model: Model = DEFAULT_MODEL,
    assignments: Assignments = None,
    adapters: Adapters = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Ask this instead; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to compare for each prompt.")] = 24,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Verbose = None,
) -> None:
    """Compare the engine with a plain PyTorch reference on the model's files; exit 3: different.

    Examples:

        chat-service verify

        chat-service verify baichuan2-7b-chat --set engine.dtype=float32 --json
    """
    from service.preflight import verify

    config, origins = own_model.load(model, assignments or (), adapters or ())
    report = verify.verify(
        config,
        origins,
        settings.load(verbose=verbose),
        prompts=prompts or verify.PROMPTS,
        tokens=tokens,
    )
    if as_json:
        print(json.dumps({**asdict(report), "verdict": report.verdict}, ensure_ascii=False))
    else:
        _print_report(report)
    raise SystemExit(3 if report.problems else 0)


@app.command()
def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="One question [default: a conversation until Ctrl-D].")
    ] = None,
    url: Url = None,
    key: Key = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="New tokens at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answers as JSON lines.")
    ] = False,
) -> None:
    """Talk to a running server. Ctrl-C ends an answer, Ctrl-D the conversation.

    Examples:

        chat-service chat

        chat-service chat "What is the capital of France?" --json
    """
    from service import terminal

    flags = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options = {name: value for name, value in flags.items() if value is not None}
    remote = terminal.Remote(url or settings.load().url(), key)
    terminal.chat(remote, prompt, options, as_json=as_json)


@app.command()
def top(
    url: Url = None,
    key: Key = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")
    ] = 1,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line for each look.")] = False,
) -> None:
    """Show what a running server does: throughput, queue, time to first token, KV cache.

    Examples:

        chat-service top

        chat-service top --count 1 --json
    """
    from service import terminal

    remote = terminal.Remote(url or settings.load().url(), key)
    terminal.top(remote, interval, count, as_json=as_json)


@app.command()
def usage(
    url: Url = None,
    key: Key = None,
    prometheus: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask this Prometheus instead, for all servers it knows."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How far back to look, such as 30m or 7d; with --prometheus [default: 24h].",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Show what each client used of each model: since the server's start, or over a time.

    Examples:

        chat-service usage

        chat-service usage --prometheus http://127.0.0.1:9090 --since 7d
    """
    from service import terminal
    from service import usage as used

    if prometheus:
        rows = used.of_prometheus(prometheus, since or "24h")
    elif since:
        raise ConfigError("--since: a server knows only what was since its start; add --prometheus")
    else:
        rows = used.of_server(terminal.Remote(url or settings.load().url(), key))
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    columns = ("client", "model", *used.COUNTS)
    table = [tuple(row[column] if row[column] != "" else "-" for column in columns) for row in rows]
    _print_table(tuple(column.replace("_", " ") for column in columns), table)


@app.command()
def models(
    word: Annotated[
        str | None,
        typer.Argument(help="Only those with this word in name, family or chapter."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the catalogue, by family.

    Examples:

        chat-service models

        chat-service models qwen
    """
    rows = model_config.listing(word or "")
    if as_json:
        print(json.dumps(rows))
        return
    if not rows:
        raise ConfigError(f"no model has {word!r} in its name, family or chapter")
    columns = ("model", "parameters", "weights", "24 GiB card", "chapter", "description")
    _print_table(columns, [tuple(row[column] for column in columns) for row in rows])


def _size(text: str) -> int:
    """Parse a size such as 24GiB or 24GB into bytes. Raises ConfigError."""
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        size = ByteSize(0)
    if size < _MIN_MEMORY:  # a number alone is bytes
        raise ConfigError(f"--memory {text[:40]!r}: expected a size, such as 24GiB, 24GB or 512MiB")
    return size


def _print_report(report: "Verification") -> None:
    for number, comparison in enumerate(report.comparisons, 1):
        if comparison.adapter:
            print(f"With the adapter {comparison.adapter}, merged in the reference:")
        print(
            f"{number}. {comparison.agreeing} of {comparison.tokens} tokens agree, log "
            f"probabilities within {comparison.largest_difference:.2g} nats "
            f"(mean {comparison.mean_difference:.2g})\n"
            f"   prompt     {comparison.rendered!r}\n"
            f"   token ids  {' '.join(map(str, comparison.token_ids))}"
        )
        if divergence := comparison.divergence:
            print(
                f"   token {divergence.position}    engine {divergence.engine!r}, reference "
                f"{divergence.reference!r}, likelier by {divergence.gap:.2g} nats"
            )
    stops = ", ".join(f"{stop.id} {stop.token!r}" for stop in report.stop_tokens)
    print(f"an answer ends at: {stops}")
    for problem in report.problems:
        print(f"problem: {problem}")
    print(f"{report.model}: {report.verdict} ({report.dtype} engine, float32 reference)")


def _print_cluster(status: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(status))
        return
    columns = ("model", "replica", "phase", "running", "waiting", "node")
    rows: list[tuple[object, ...]] = []
    for name, model in status["models"].items():
        for replica in model["served"]:
            rows.append((name, *(replica[column] for column in columns[1:])))
        rows += [(name, "", "starting", "", "", "")] * model["starting"]
    _print_table(columns, rows)
    print()
    _print_table(
        ("node", "address", "cpus", "gpus"), [tuple(node.values()) for node in status["nodes"]]
    )


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")  # never truncate a path
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    # A pipe has no width: make it wide, so that no cell wraps.
    Console(width=None if sys.stdout.isatty() else 400).print(table)


def main() -> None:
    """Run the command line. A ServiceError prints one line on stderr instead of a traceback."""
    try:
        app()
    except ServiceError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(e.exit_status) from None
    except OSError as e:  # no space left, no folder for temporary files, no permission
        place = f": {e.filename}" if e.filename else ""
        print(f"error: {e.strerror or e}{place}", file=sys.stderr)
        raise SystemExit(1) from None
