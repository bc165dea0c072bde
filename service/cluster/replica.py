"""What runs in Ray's process for a replica of a model."""

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import AsyncGenerator, Iterator
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import ray
from prometheus_client import generate_latest
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import parent
from service.api.application import Deployment, Host
from service.api.record import REQUEST_ID
from service.clients import from_json
from service.cluster import exchange
from service.cluster.exchange import Part, Request
from service.errors import LaunchError, Unavailable
from service.launch import environment, server
from service.model_config import ModelConfig, Origins
from service.phase import Phase
from service.settings import Settings

# How long a replica that has failed may still write the ends of its answers, in seconds.
_LINGER_SECONDS = 0.2


class _Replica(Host):
    """A replica's process belongs to Ray; another replica answers when this one has ended."""

    replaceable = True


class _End:
    """Stands for uvicorn's server, which is Serve's here.

    A replica that only refuses has the fewest connections, so HAProxy would send it all new
    requests. So one that has failed ends at once.
    """

    def __init__(self) -> None:
        self._should_exit = False

    @property
    def should_exit(self) -> bool:
        return self._should_exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value and not self._should_exit:
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, os._exit, 1)
        self._should_exit = value


@contextlib.contextmanager
def _log_of_serve_kept() -> Iterator[None]:
    """Give Serve's log handler its target back.

    vLLM configures logging by a dictionary, which closes all handlers that there are. Serve's
    controller, when it is started again, takes a replica without a target for a broken one.
    """
    handlers = [h for h in logging.getLogger("ray.serve").handlers if isinstance(h, MemoryHandler)]
    targets = [handler.target for handler in handlers]
    try:
        yield
    finally:
        for handler, target in zip(handlers, targets, strict=True):
            handler.setTarget(target)


@serve.deployment
@serve.ingress()
class Model:
    """One engine, and the application that serves it."""

    _stack: contextlib.AsyncExitStack | None = None  # what ends with it, once it has started

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: str, file: str, settings: str, *, keyed: bool, files: str
    ) -> None:
        """Start the engine. Serve replaces replicas when one of these texts changes.

        `model` and `settings` are JSON, `file` is the YAML for error messages. With `keyed`,
        `reconfigure` brings the API keys. `files` says which files of the model are meant.
        """
        environment.check()
        os.environ[parent.VARIABLE] = str(os.getpid())
        with _log_of_serve_kept():
            await self._start(model, file, settings, keyed=keyed)

    async def _start(self, model: str, file: str, settings: str, *, keyed: bool) -> None:
        config = ModelConfig.model_validate_json(model)
        origins = Origins(Path(file), {}, frozenset())
        loaded = Settings.model_validate_json(settings, strict=False)
        clients = {} if keyed else loaded.clients()
        async with contextlib.AsyncExitStack() as stack:
            args, folder = stack.enter_context(server.prepared(config, origins, loaded))
            with server.explained(loaded, folder):
                await asyncio.to_thread(server.prepare_files, args, config, loaded)
                deployment = Deployment(
                    model=config,
                    settings=loaded,
                    clients=None if clients is None else dict(clients),
                    instance=uuid.uuid4().hex,
                )
                self._asgi = await stack.enter_async_context(
                    server.running(args, deployment, _Replica())
                )
            self._stack = stack.pop_all()
        self._asgi.state.server = _End()

    def reconfigure(self, clients: dict[str, dict[str, Any]]) -> None:
        """Take the keys of a file that has changed, without a restart."""
        self.use_keys(clients)

    def use_keys(self, clients: dict[str, dict[str, Any]]) -> None:
        """As `reconfigure`, for the command while an update runs."""
        self._asgi.state.service.use_keys(from_json(clients))

    async def drain(self) -> None:
        """Refuse new requests, and finish those that were accepted."""
        service = self._asgi.state.service
        service.health.drain()
        service.admission.close(Unavailable("the server is stopping", retry_after=5))

    async def stop(self) -> None:
        """End with an error what has not finished in time."""
        error = Unavailable("the server is stopping", retry_after=5)
        self._asgi.state.service.cancellations.end_all(error)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == scope["root_path"]:
                scope["path"] += "/"  # the model's name without a slash

            async def send_without_id(message: Message) -> None:
                if message["type"] == "http.response.start":  # Serve adds the same id
                    kept = [h for h in message["headers"] if h[0] != REQUEST_ID.encode()]
                    message = {**message, "headers": kept}
                await send(message)

            await self._asgi(scope, receive, send_without_id)

        return application

    async def is_busy(self) -> bool:
        """Whether accepted requests are not finished."""
        admission = self._asgi.state.service.admission
        return bool(admission.running or admission.waiting)

    async def answer(self, request: Request) -> AsyncGenerator[Part | None, None]:
        """Answer a request of the front."""
        async with contextlib.aclosing(exchange.answer(self._asgi, request)) as parts:
            async for part in parts:
                yield part

    async def metrics(self) -> tuple[str, str]:
        """Return this replica's id and metrics."""
        return serve.get_replica_context().replica_id.unique_id, generate_latest().decode()

    async def status(self) -> dict[str, Any]:
        """Return what `chat-service cluster --status` shows of a replica."""
        service = self._asgi.state.service
        return {
            "replica": serve.get_replica_context().replica_id.unique_id,
            "node": ray.get_runtime_context().get_node_id()[:8],
            "phase": service.health.phase.value,
            "running": service.admission.running,
            "waiting": service.admission.waiting,
        }

    async def check_health(self) -> None:
        service = self._asgi.state.service
        if service.engine_dead or service.health.phase is Phase.FAILED:
            raise LaunchError("the engine has ended")

    async def __del__(self) -> None:
        if self._stack is not None:  # else it has not started, and Serve kills its process
            await self._stack.aclose()
