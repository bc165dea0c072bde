"""What runs in Ray's processes: a replica of a model, and the front.

`model` and `front` build their Serve applications, for `command` and for a RayService.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import uuid
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, cast

import ray
from grpc.aio import AioRpcError
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import (
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import parent
from service.api.application import Deployment, Host
from service.api.record import REQUEST_ID
from service.clients import Client
from service.cluster import config, exchange
from service.cluster.config import DEREGISTER_SECONDS, Cluster, ClusterModel
from service.cluster.exchange import Part, Request
from service.cluster.front import Front as FrontApplication
from service.cluster.front import ReplicaLost
from service.errors import ConfigError, LaunchError, Unavailable
from service.launch import environment, server
from service.model_config import ModelConfig, Origins
from service.phase import Phase
from service.settings import Settings

# Names of our Serve applications begin with it.
PREFIX = "chat-service"
# How long a replica that has failed may still write the ends of its answers, in seconds.
_LINGER_SECONDS = 0.2
_GRACE_SECONDS = 10
# Serve's own limit on requests of a replica. High, for ours knows when to refuse.
_MAX_ONGOING = 10_000
_METRICS_SECONDS = 5.0


class _Replica(Host):
    """A replica's process belongs to Ray; another replica answers when this one has ended."""

    replaceable = True


class _End:
    """Stands for uvicorn's server, which is Serve's here.

    A replica that has failed ends at once: one that only refuses has the fewest connections, so
    HAProxy would send it whatever comes.
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
        self._stack = contextlib.AsyncExitStack()
        args, folder = self._stack.enter_context(server.prepared(config, origins, loaded))
        with server.explained(loaded, folder):
            await asyncio.to_thread(server.use_files, args, config, loaded)
            deployment = Deployment(
                model=config,
                settings=loaded,
                clients=None if clients is None else dict(clients),
                instance=uuid.uuid4().hex,
            )
            self._asgi = await self._stack.enter_async_context(
                server.running(args, deployment, _Replica())
            )
        self._asgi.state.server = _End()

    def reconfigure(self, keys: dict[str, dict[str, Any]]) -> None:
        """Take the keys of a file that has changed, without a restart."""
        self._asgi.state.service.use_keys(_clients(keys))

    async def drain(self) -> None:
        """Refuse new requests, and finish those that were accepted."""
        service = self._asgi.state.service
        service.health.drain()
        service.admission.close(Unavailable("the server is stopping", retry_after=5))

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
        return _own_metrics()

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
        await self._stack.aclose()


class _Handles:
    """`front.Replicas` over Serve's handles."""

    def __init__(self) -> None:
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def use(self, models: Sequence[str]) -> None:
        """Make handles for these models. Blocks: it asks Serve's controller."""
        self._handles = {name: serve.get_app_handle(f"{PREFIX}-{name}") for name in models}
        # `get_app_handle` waits for the front to run, of which this is a part.
        self._fronts = serve.get_deployment_handle("Front", PREFIX, _check_exists=False)

    async def answer(self, model: str, request: Request) -> AsyncGenerator[Part | None, None]:
        if model not in self._handles:  # an update has just removed it
            raise ReplicaLost
        handle = self._handles[model].options(stream=True, method_name="answer")
        response = cast(DeploymentResponseGenerator[Part | None], handle.remote(request))
        try:
            async for part in response:
                yield part
        except (
            AioRpcError,
            RayActorError,
            ReplicaUnavailableError,
            DeploymentUnavailableError,
        ) as e:
            raise ReplicaLost from e
        except BaseException:
            response.cancel()
            raise

    async def metrics(self) -> list[tuple[dict[str, str], str]]:
        """Ask all replicas, and all fronts, at once."""
        groups: dict[str, DeploymentHandle[Any]] = {**self._handles, "": self._fronts}
        texts = await asyncio.gather(*(_metrics_of(handle) for handle in groups.values()))
        return [
            ({**({"model": name} if name else {}), "replica": replica}, text)
            for name, answers in zip(groups, texts, strict=True)
            for replica, text in answers
        ]


async def _metrics_of(handle: DeploymentHandle[Any]) -> list[tuple[str, str]]:
    """Return id and metrics of the replicas that answer. Ray calls `broadcast` alpha."""
    try:
        answers = await handle.broadcast("metrics").results_async(
            timeout_s=_METRICS_SECONDS, return_exceptions=True
        )
    except (RayServeException, TimeoutError):  # none is up
        return []
    return [answer for answer in answers if not isinstance(answer, Exception)]


def _own_metrics() -> tuple[str, str]:
    return serve.get_replica_context().replica_id.unique_id, generate_latest().decode()


@serve.deployment
@serve.ingress()
class Front:
    """Chooses a replica by `model`."""

    def __init__(self, settings: str) -> None:
        """`settings` is JSON."""
        self._settings = Settings.model_validate_json(settings, strict=False)
        self._handles = _Handles()
        self._front = FrontApplication(self._handles, self._settings)

    async def metrics(self) -> tuple[str, str]:
        """Return this front's id and metrics."""
        return _own_metrics()

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Take models and keys that have changed, without a restart."""
        owners = config["owners"]
        await asyncio.to_thread(self._handles.use, sorted(set(owners.values())))
        keys = config["keys"]
        clients = _clients(keys) if keys is not None else self._settings.clients()
        self._front.configure(config["default"], owners, clients, config["allowed_origins"])

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._front


class Arguments(BaseModel):
    """The arguments of an application in a RayService's `serveConfigV2`."""

    model_config = ConfigDict(extra="forbid")

    file: Path = Field(description="The file of `chat-service cluster`, on every node.")
    name: str = Field("", description="A key of its `models`; empty for the front.")
    revision: str = Field("", description="Change it to have a changed file read.")
    surge: bool = Field(False, description="Whether one more replica fits during an update.")


def model(arguments: Arguments) -> serve.Application:
    """Build the application of one model, for `import_path` of a RayService."""
    cluster = _load(arguments)
    if arguments.name not in cluster.models:
        raise ConfigError(f"{arguments.file}: models has no key {arguments.name!r}")
    chosen = cluster.models[arguments.name]
    if chosen.gpus is None:  # the nodes with GPUs may not be there yet
        raise ConfigError(f"{arguments.file}: models.{arguments.name} needs `gpus` in a RayService")
    return _model(chosen, cluster.settings, keys=None, has_gpus=True, surge=arguments.surge)


def front(arguments: Arguments) -> serve.Application:
    """Build the front, for `import_path` of a RayService."""
    return _front(_load(arguments), keys=None)


def _load(arguments: Arguments) -> Cluster:
    cluster = config.load(arguments.file)
    if cluster.clients is not None and cluster.settings.api_key_file is None:
        raise ConfigError("a RayService takes keys from a file: set SERVICE_API_KEY_FILE")
    return cluster


def applications(
    cluster: Cluster, *, has_gpus: bool, surge: Collection[str] = ()
) -> list[serve.RunTarget]:
    """Return the Serve applications of a cluster: its models, then the front.

    `surge` are the models of which a new replica fits before an old one ends.
    """
    keys = _keys(cluster.clients)
    targets = [
        serve.RunTarget(
            _model(model, cluster.settings, keys, has_gpus=has_gpus, surge=name in surge),
            name=f"{PREFIX}-{name}",
            route_prefix=f"/{name}",
        )
        for name, model in cluster.models.items()
    ]
    return [*targets, serve.RunTarget(_front(cluster, keys), name=PREFIX, route_prefix="/")]


def _model(
    model: ClusterModel,
    settings: Settings,
    keys: dict[str, dict[str, Any]] | None,
    *,
    has_gpus: bool,
    surge: bool,
) -> serve.Application:
    number: dict[str, Any] = {"num_replicas": model.min_replicas}
    if model.max_replicas > model.min_replicas:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=model.min_replicas,
                max_replicas=model.max_replicas,
                target_ongoing_requests=model.queue,
                upscale_delay_s=3,
                look_back_period_s=11,
                downscale_delay_s=600,
            )
        }
    arguments = {
        "model": model.config.model_dump_json(),
        "file": str(model.origins.file),
        "settings": _as_json(settings, pushed=keys),
        "keyed": keys is not None,
        "files": model.files,
    }
    options = cast(serve.Deployment, Model).options(
        **number,
        **_common_options(settings, arguments),
        ray_actor_options={
            "num_cpus": model.cpus,
            "num_gpus": model.gpus_of_replica(has_gpus=has_gpus),
        },
        max_constructor_retry_count=2,
        max_surge_percent=100 if surge else 0,
        user_config=keys,
    )
    return options.bind(**arguments)


def _front(cluster: Cluster, keys: dict[str, dict[str, Any]] | None) -> serve.Application:
    arguments = {"settings": _as_json(cluster.settings, pushed=keys)}
    nodes = sum(node["Alive"] for node in ray.nodes())
    per_node = math.ceil(cluster.fronts / nodes)
    front = cast(serve.Deployment, Front).options(
        num_replicas=cluster.fronts,
        **_common_options(cluster.settings, arguments),
        ray_actor_options={"num_cpus": 0},
        # A node that dies must not take all of them. On one node new ones come before old ones go.
        **({"max_replicas_per_node": per_node} if nodes > 1 else {"max_surge_percent": 100}),
        user_config={
            "default": cluster.default,
            "owners": cluster.owners(),
            "keys": keys,
            "allowed_origins": cluster.models[cluster.default].config.engine.get(
                "allowed_origins", ["*"]
            ),
        },
    )
    return front.bind(**arguments)


def _common_options(settings: Settings, arguments: Mapping[str, Any]) -> dict[str, Any]:
    version = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
    return {
        # Without a version of ours, Serve would replace all replicas at each update.
        "version": version,
        "_internal": True,
        "max_ongoing_requests": _MAX_ONGOING,
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,
        "graceful_shutdown_timeout_s": (
            DEREGISTER_SECONDS + settings.drain_timeout + _GRACE_SECONDS
        ),
        "graceful_shutdown_wait_loop_s": 0.5,
    }


def _keys(clients: Mapping[str, Client] | None) -> dict[str, dict[str, Any]] | None:
    """Return the hashes of the API keys, as JSON; None if no key is required."""
    return None if clients is None else {key: asdict(client) for key, client in clients.items()}


def _clients(keys: Mapping[str, dict[str, Any]]) -> dict[str, Client]:
    return {key: Client(**values) for key, values in keys.items()}


def _as_json(settings: Settings, pushed: object) -> str:
    """Return the settings without the key; and without its file, where keys are pushed.

    They are null, not absent: for what is absent a node's own variable would count.
    """
    absent = {"api_key": None, **({"api_key_file": None} if pushed else {})}
    return settings.model_copy(update=absent).model_dump_json()
