"""Arguments and options that several commands have."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from service import model_config, own_model, settings
from service.model_config import InvalidConfig, ModelConfig, Origins

DEFAULT_MODEL = "smollm2-135m-instruct"
ASKING_VLLM = "Asking vLLM, which takes a while to import ..."

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


def load(
    model: str, assignments: Sequence[str] | None, adapters: Sequence[str] | None = None
) -> tuple[ModelConfig, Origins]:
    """Load the model of a command. Raises ServiceError, with vLLM's mistakes beside ours."""
    try:
        return own_model.load(model, assignments or (), adapters or ())
    except InvalidConfig as e:
        error = e
        if e.engine:  # import vLLM, which is slow, only if the YAML has engine keys
            from service.launch import server

            print(ASKING_VLLM, file=sys.stderr, flush=True)
            with suppress(Exception):  # whatever fails there, ours are told
                error = server.with_those_of_vllm(e, settings.load())
    raise error
