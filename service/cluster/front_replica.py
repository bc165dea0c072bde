"""What runs in Ray's process for a front: the application of `front.py` over Serve's handles."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

from grpc.aio import AioRpcError
from prometheus_client import generate_latest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.types import ASGIApp

from service.clients import from_json
from service.cluster import broadcast
from service.cluster.config import PREFIX
from service.cluster.exchange import Part, Request
from service.cluster.front import FrontApplication
from service.cluster.relay import ReplicaLost
from service.launch import log_config
from service.settings import Settings


@serve.deployment
@serve.ingress()
class Front:
    """Chooses a replica by `model`."""

    def __init__(self, settings: str) -> None:
        """`settings` is JSON."""
        self._settings = Settings.model_validate_json(settings, strict=False)
        log_config.log_our_own(verbose=self._settings.verbose)
        self._handles = _Handles()
        self._front = FrontApplication(self._handles, self._settings)

    async def metrics(self) -> tuple[str, str]:
        """Return this front's id and metrics."""
        return serve.get_replica_context().replica_id.unique_id, generate_latest().decode()

    async def reconfigure(self, changed: dict[str, Any]) -> None:
        """Take models and keys that have changed, without a restart."""
        owners = changed["owners"]
        await asyncio.to_thread(self._handles.use, sorted(set(owners.values())))
        pushed = changed["clients"]
        clients = from_json(pushed) if pushed is not None else self._settings.clients()
        self._front.configure(
            changed["default"], owners, clients, changed["cors"], changed["routes"]
        )

    def use_keys(self, clients: dict[str, dict[str, Any]]) -> None:
        """Take keys alone: what else `reconfigure` brings may be changing in an update."""
        self._front.use_keys(from_json(clients))

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._front


class _Handles:
    """`relay.ReplicaHandles` over Serve's handles."""

    def __init__(self) -> None:
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._fronts: DeploymentHandle[Any] | None = None

    def use(self, models: Sequence[str]) -> None:
        """Make handles for these models. Blocks: it asks Serve's controller.

        A new handle does not know its replicas at once, so those that there are stay.
        """
        self._handles = {
            name: self._handles.get(name) or serve.get_app_handle(f"{PREFIX}-{name}")
            for name in models
        }
        # `get_app_handle` waits for the front to run, of which this is a part.
        self._fronts = self._fronts or serve.get_deployment_handle(
            "Front", PREFIX, _check_exists=False
        )

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
        assert self._fronts is not None  # Serve has called `reconfigure`
        groups: dict[str, DeploymentHandle[Any]] = {**self._handles, "": self._fronts}
        texts = await asyncio.gather(
            *(broadcast.answers(handle, "metrics") for handle in groups.values())
        )
        return [
            ({**({"model": name} if name else {}), "replica": replica}, text)
            for name, answers in zip(groups, texts, strict=True)
            for replica, text in answers
        ]
