"""The Serve applications of a cluster: its models and its front, with Serve's options for each.

`model` and `front` build one of them for a RayService; `applications` all, for `command`.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig

from service.clients import as_json
from service.cluster import config
from service.cluster.config import DEREGISTER_SECONDS, PREFIX, Cluster, ClusterModel
from service.cluster.front_replica import Front
from service.cluster.replica import Model
from service.errors import ConfigError
from service.settings import Settings

_GRACE_SECONDS = 10
# Serve's own limit of requests per replica. It is high, because our queue decides what to refuse.
_MAX_ONGOING = 10_000


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
    return _model(chosen, cluster.settings, clients=None, has_gpus=True, surge=arguments.surge)


def front(arguments: Arguments) -> serve.Application:
    """Build the front, for `import_path` of a RayService."""
    return _front(_load(arguments), clients=None)


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
    clients = as_json(cluster.clients)
    targets = [
        serve.RunTarget(
            _model(model, cluster.settings, clients, has_gpus=has_gpus, surge=name in surge),
            name=f"{PREFIX}-{name}",
            route_prefix=f"/{name}",
        )
        for name, model in cluster.models.items()
    ]
    return [*targets, serve.RunTarget(_front(cluster, clients), name=PREFIX, route_prefix="/")]


def _model(
    model: ClusterModel,
    settings: Settings,
    clients: dict[str, dict[str, Any]] | None,
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
        "settings": _as_json(settings, pushed=clients),
        "keyed": clients is not None,
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
        user_config=clients,
    )
    return options.bind(**arguments)


def _front(cluster: Cluster, clients: dict[str, dict[str, Any]] | None) -> serve.Application:
    arguments = {"settings": _as_json(cluster.settings, pushed=clients)}
    engine = cluster.models[cluster.default].config.engine
    routes = {route for model in cluster.models.values() for route in model.config.routes}
    nodes = max(1, sum(node["Alive"] for node in ray.nodes()))  # none while a head comes back
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
            "routes": sorted(routes),
            "clients": clients,
            "cors": {
                "allow_origins": engine.get("allowed_origins", []),
                "allow_credentials": engine.get("allow_credentials", False),
            },
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


def _as_json(settings: Settings, pushed: object) -> str:
    """Return the settings without the key; and without its file, where keys are pushed.

    The values are null, not left out. A node's own SERVICE_ variables would replace what is left
    out.
    """
    absent = {"api_key": None, **({"api_key_file": None} if pushed else {})}
    return settings.model_copy(update=absent).model_dump_json()
