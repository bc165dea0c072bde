"""The commands about a model that is not served: which there are, and will it work."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from service import model_config, settings, weights
from service.cli import options
from service.cli.options import DEFAULT_MODEL, Adapters, Assignments, Model, Verbose
from service.errors import ConfigError
from service.terminal import output

if TYPE_CHECKING:
    from service.preflight.verify import Verification

_MIN_MEMORY = 2**20  # bytes


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

    config, origins = options.load(model, assignments, adapters)
    print(options.ASKING_VLLM, file=sys.stderr, flush=True)
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
        print(output.json_line({"model": config.name, **asdict(report), "rows": rows}))
        raise SystemExit(1 if report.problems else 0)
    output.print_table(("key", "value", "from"), report.rows)
    for line in report.fit:
        output.print_text(line)
    for warning in report.warnings:
        output.print_text(f"warning: {warning}")
    for problem in report.problems:
        output.print_text(f"problem: {problem}")
    if report.problems:
        raise SystemExit(1)
    output.print_text(f"{config.name}: ok")


def download(model: Model = DEFAULT_MODEL, assignments: Assignments = None) -> None:
    """Download a model, and print the folder; then those of its tokenizer and adapters, if any.

    Run again, it resumes. `serve` does the same when the files are not here.

    Examples:

        chat-service download qwen2-7b-instruct

        chat-service download my-model.yaml --set source.revision=v1.0
    """
    config, _ = options.load(model, assignments)
    cache_dir = settings.load().cache_dir
    print(weights.fetch(config.source, cache_dir))
    if config.tokenizer:
        print(weights.fetch(config.tokenizer, cache_dir, weights=False))
    for name, source in config.adapters.items():
        print(weights.fetch_adapter(name, source))


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

    config, origins = options.load(model, assignments)
    result = compile.make(config, origins, settings.load(verbose=verbose))
    if as_json:
        print(output.json_line({**asdict(result), "gain": result.gain, "used": result.worthwhile}))
        return
    rows = zip(compile_cache.BATCHES, result.eager, result.compiled, strict=True)
    output.print_table(
        ("requests at once", "tokens/s eager", "compiled"),
        [(batch, f"{eager:.1f}", f"{compiled:.1f}") for batch, eager, compiled in rows],
    )
    verdict = "`serve` uses it from now on" if result.worthwhile else "`serve` goes on without it"
    print(f"{config.name}: {result.gain:.2f} times as fast; {verdict}")


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

    config, origins = options.load(model, assignments, adapters)
    report = verify.verify(
        config,
        origins,
        settings.load(verbose=verbose),
        prompts=prompts or verify.PROMPTS,
        tokens=tokens,
    )
    if as_json:
        print(output.json_line({**asdict(report), "verdict": report.verdict}))
    else:
        _print_report(report)
    raise SystemExit(3 if report.problems else 0)


def models(
    word: Annotated[
        str | None, typer.Argument(help="Only those with this word in name, family or chapter.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the catalogue, by family. A narrow terminal shows fewer columns than a pipe.

    Examples:

        chat-service models

        chat-service models qwen
    """
    rows = model_config.listing(word or "")
    if as_json:
        print(output.json_line(rows))
        return
    if not rows:
        raise ConfigError(f"no model has {word!r} in its name, family or chapter")
    columns = ("model", "family", "parameters", "weights", "24 GiB card", "chapter", "description")
    table = [tuple(row[column] for column in columns) for row in rows]
    output.print_table(columns, table, optional=("parameters", "weights", "chapter"))


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
