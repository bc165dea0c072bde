"""An API process as a whole: vLLM's application with our guards, contract, health and metrics.

`launch` imports only this module. `build` makes the application for an engine client. Where vLLM
starts the API processes itself, `configure` makes vLLM's own `build_app` build the same
application.
"""

import argparse
import copy
import os
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

from service import vllm_plugins
from service.clients import Client
from service.model_config import ModelConfig
from service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.engine.protocol import EngineClient

# Innermost first. The user's own middleware goes between the gate and the others.
_GATE = "service.api.gate.Gate"
_MIDDLEWARE = [
    f"service.api.middleware.{name}" for name in ("Body", "ApiKey", "Refusals", "Observe")
]


class Deployment(BaseModel):
    """The model and the settings that an API process serves."""

    model_config = ConfigDict(frozen=True)

    model: ModelConfig
    settings: Settings
    # SHA-256 of each API key -> its owner. None: no key is required.
    clients: dict[str, Client] | None
    instance: str  # id of this run, to distinguish it from another on the same port


class Server(Protocol):
    """What ends an API process: uvicorn's server, or what stands for it in another host."""

    should_exit: bool


class Host:
    """How an API process reports to the process that runs it. This base class drops reports."""

    # Whether the service owns this process, so may handle SIGTERM and drain.
    handles_signals = False
    # Whether the process ends when the engine stalls. Another replica answers then; this one could
    # only refuse.
    replaceable = False

    def __init__(self) -> None:
        self._progress = 0

    def engine_ancestor(self) -> int:
        """Return the pid of an ancestor of the engine's processes."""
        return os.getpid()

    def take_over(self) -> None:
        """Called just before the application accepts connections. May block."""

    def beat(self) -> None:
        """Called every second while the API process is alive."""

    def mark_progress(self) -> None:
        """Called when the engine makes progress. vLLM reports it to only one API process."""
        self._progress += 1

    def progress(self) -> int:
        """Return a number that changes after `mark_progress` in any API process."""
        return self._progress

    def report_failure(self, reason: str) -> None:
        """Called when the server ends because of a failure."""


def configure(args: argparse.Namespace, deployment: Deployment, host: Host) -> None:
    """Change `args` so that vLLM's `build_app` and `init_app_state` build our application."""
    vllm_plugins.choose()
    args.middleware = [_GATE, *args.middleware, *_MIDDLEWARE]
    args.chat_service = (deployment, host)


async def build(
    args: argparse.Namespace,
    deployment: Deployment,
    client: "EngineClient",
    host: Host | None = None,
) -> "FastAPI":
    """Return the complete ASGI application for a running engine.

    `args` are vLLM's (`vllm_arguments.arguments`) and name the model's files. The caller must put
    its `Server` into `app.state.server` before the lifespan starts. Raises ServiceError.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    args = copy.copy(args)
    configure(args, deployment, host or Host())
    tasks = await client.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    return app
