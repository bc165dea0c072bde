"""`chat`, `top` and `usage`: the commands that ask a running server."""

from typing import TYPE_CHECKING, Annotated

import typer

from service import settings
from service.cli.options import Key, Url
from service.errors import ConfigError
from service.terminal import output

if TYPE_CHECKING:
    from service.terminal.remote import Remote


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
    """Talk to a running server. Ctrl-C ends an answer, Ctrl-D the conversation; /help says more.

    Examples:

        chat-service chat

        chat-service chat "What is the capital of France?" --json
    """
    from service.terminal import chat as conversation

    flags = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options = {name: value for name, value in flags.items() if value is not None}
    conversation.chat(_remote(url, key), prompt, options, as_json=as_json)


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

    In all, by model, by key, and in a cluster by replica.

    Examples:

        chat-service top

        chat-service top --count 1 --json
    """
    from service.terminal import top as load

    load.top(_remote(url, key), interval, count, as_json=as_json)


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
    from service.terminal import usage as used

    if prometheus:
        rows = used.of_prometheus(prometheus, since or "24h")
    elif since:
        raise ConfigError("--since: a server knows only what was since its start; add --prometheus")
    else:
        rows = used.of_server(_remote(url, key))
    if as_json:
        print(output.json_line(rows))
        return
    columns = ("client", "model", *used.COUNTS)
    table = [tuple(row[column] for column in columns) for row in rows]
    output.print_table(tuple(column.replace("_", " ") for column in columns), table)


def _remote(url: str | None, key: str | None) -> "Remote":
    """Return the server that a command asks: by default the one of the settings."""
    from service.terminal.remote import Remote

    return Remote(url or settings.load().url(), key)
