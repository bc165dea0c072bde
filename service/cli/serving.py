"""`serve` and `cluster`: the commands that run until they are stopped."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from service import settings
from service.cli import options
from service.cli.options import DEFAULT_MODEL, Adapters, Assignments, Host, Model, Port, Verbose
from service.terminal import output


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

    config, origins = options.load(model, assignments, adapters)
    supervisor.serve(config, origins, settings.load(host=host, port=port, verbose=verbose))


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


def _print_cluster(status: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(output.json_line(status))
        return
    columns = ("model", "replica", "phase", "running", "waiting", "node")
    rows: list[tuple[object, ...]] = []
    for name, model in status["models"].items():
        for replica in model["served"]:
            rows.append((name, *(replica[column] for column in columns[1:])))
        rows += [(name, "", "starting", "", "", "")] * model["starting"]
    output.print_table(columns, rows)
    print()
    output.print_table(
        ("node", "address", "cpus", "gpus"), [tuple(node.values()) for node in status["nodes"]]
    )
