"""An API process as a whole: vLLM's application with our guards, contract, health and metrics.

Who runs one imports this module and nothing else of this package. `build` makes the application
for an engine client. Where vLLM starts API processes by itself, `configure` makes vLLM's own
`build_app` add the same.
"""

import argparse
import os
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from service import vllm_plugins
from service.clients import Client
from service.model_config import ModelConfig
from service.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.engine.protocol import EngineClient

# The first is innermost. The user's own middleware stands between the gate and the others.
_GATE = "service.api.gate.Gate"
_MIDDLEWARE = [
    f"service.api.middleware.{name}" for name in ("Body", "ApiKey", "Refusals", "Observe")
]


class Deployment(BaseModel):
    """What an API process serves, and how."""

    model_config = ConfigDict(frozen=True)

    model: ModelConfig
    settings: Settings
    # SHA-256 of each API key, and whose it is; None: no key is asked for.
    clients: dict[str, Client] | None
    instance: str  # tells this run's answers from those of another on the same port


class Host:
    """What an API process tells the process that runs it. This one listens to nothing."""

    # Whether the process is the service's own: it then drains at SIGTERM.
    handles_signals = False

    def __init__(self) -> None:
        self._progress = 0

    def engine_ancestor(self) -> int:
        """The process id below which the engine's processes are."""
        return os.getpid()

    def take_over(self) -> None:
        """The application is about to accept connections. May block."""

    def beat(self) -> None:
        """The API process is alive."""

    def mark_progress(self) -> None:
        """The engine makes progress. vLLM tells it to one API process of several."""
        self._progress += 1

    def progress(self) -> int:
        """A number that differs after each `mark_progress`, in whichever API process."""
        return self._progress

    def report_failure(self, reason: str) -> None:
        """The server ends though nobody asked it to."""


def configure(args: argparse.Namespace, deployment: Deployment, host: Host) -> None:
    """Let vLLM's `build_app` and `init_app_state` make our application of these arguments."""
    vllm_plugins.choose()
    args.middleware = [_GATE, *args.middleware, *_MIDDLEWARE]
    args.chat_service = (deployment, host)


async def build(
    args: argparse.Namespace,
    deployment: Deployment,
    client: "EngineClient",
    host: Host | None = None,
) -> "FastAPI":
    """The complete ASGI application on an engine that runs.

    `args` are vLLM's (`vllm_arguments.arguments`), with the model's files in them. Whoever serves
    the application puts its uvicorn.Server, or what stands for it, into `app.state.server` before
    the lifespan begins. Raises ServiceError.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    configure(args, deployment, host or Host())
    tasks = await client.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    return app
