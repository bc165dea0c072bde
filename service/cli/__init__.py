"""The command line: parses arguments, calls the modules that do the work, prints results."""

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from service.cli import asking, models, serving
from service.errors import ServiceError
from service.terminal import output

app = typer.Typer(
    help="Serve the models that the tutorials teach, the way their readers call them, on vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    *(serving.serve, serving.cluster),
    *(models.check, models.download, models.compile_, models.verify),
    *(asking.chat, asking.top, asking.usage),
    models.models,
):
    app.command(_command.__name__.rstrip("_"))(_command)


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


def main() -> None:
    """Run the command line. A ServiceError prints a line for each mistake, and no traceback."""
    output.prepare()
    try:
        try:
            app()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except ServiceError as e:
        print(e.lines(), file=sys.stderr)
        raise SystemExit(e.exit_status) from None
    except BrokenPipeError:  # the reader has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as e:  # no space left, no folder for temporary files, no permission
        place = f": {e.filename}" if e.filename else ""
        print(f"error: {e.strerror or e}{place}", file=sys.stderr)
        raise SystemExit(1) from None
