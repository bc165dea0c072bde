"""`chat-service cluster`: starts or joins a Ray cluster, and applies a file to it."""

import dataclasses
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from service import settings
from service.clients import Version, version_of
from service.cluster import applications, config, placement
from service.cluster.applications import CHECK_INTERVAL
from service.cluster.config import Cluster
from service.cluster.connection import (
    RayGone,
    check_installed,
    connected,
    end_orphans,
    is_alive,
)
from service.cluster.state import State
from service.errors import ConfigError, LaunchError
from service.launch import environment as launch_environment
from service.launch.listener import is_loopback, listener_of, ready_message, warn_if_open


def run(file: Path | None) -> None:
    """Serve the models of a file until SIGTERM or Ctrl-C.

    Where such a command runs already, update its models instead, and return. Raises ServiceError.
    """
    launch_environment.check()
    check_installed()
    cluster = config.load(file)
    keys = version_of(cluster.settings.api_key_file)
    os.environ.pop("SERVICE_API_KEY", None)  # Ray's processes need only its hash
    state = State(cluster.settings.cache_dir)
    with state.owner() as owns:
        if not owns:
            with connected(state, starts=False), state.changing():
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # over Ray's own
                _update(cluster, state)
            return
        _clear(state)
        _warn(cluster)
        with connected(state, starts=True):
            stop = _Stop()  # over Ray's own handlers
            try:
                if _start(cluster, state, stop):
                    print(_ready(cluster), flush=True)
                    _watch(state, stop, keys)
            finally:
                state.forget()
                if not isinstance(sys.exception(), RayGone | KeyboardInterrupt):
                    _end(cluster)


def check(file: Path | None) -> list[str]:
    """Return what is wrong with a file, and which resources its models lack. Raises ServiceError.

    Asks the cluster that runs, or starts one on this machine for the question.
    """
    launch_environment.check()
    cluster = config.load(file)
    state = State(cluster.settings.cache_dir)
    with state.owner() as owns:
        if owns:
            _clear(state)
        with connected(state, starts=owns):
            return [*placement.refused(cluster), *placement.lacking(cluster)]


def status() -> dict[str, Any]:
    """Return models, replicas, and nodes of the cluster that runs. Raises ServiceError."""
    state = State(settings.load().cache_dir)
    with state.owner(patience=0) as owns:
        if owns and "RAY_ADDRESS" not in os.environ:
            raise LaunchError("no cluster runs on this machine; `chat-service cluster` starts one")
    with connected(state, starts=False):
        return applications.models_and_nodes()


def _clear(state: State) -> None:
    """End and forget what an earlier command on this machine has left, which was killed."""
    end_orphans(state.ray_folder)
    state.forget()


class _Stop:
    """Notes SIGTERM and SIGINT; a second one ends the command at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _start(cluster: Cluster, state: State, stop: _Stop) -> bool:
    """Apply the cluster, and wait until it runs. Returns whether it does, or was stopped before.

    Raises LaunchError.
    """
    from ray import serve

    if "RAY_ADDRESS" not in os.environ and (problems := placement.lacking(cluster)):
        raise LaunchError("; ".join(problems))
    http = {"host": cluster.settings.host, "port": cluster.settings.port}
    serve.start(proxy_location="EveryNode", http_options=http)
    # A command that was killed has left some.
    applications.delete(*applications.statuses().keys() - {*cluster.models, config.FRONT})
    applications.apply(cluster)
    reason = applications.wait(cluster, lambda: stop.requested)
    if reason is not None:
        raise LaunchError(reason)
    if stop.requested:
        return False
    state.applied = cluster
    return True


def _warn(cluster: Cluster) -> None:
    """Say what can be reached from other machines. Raises LaunchError if the port is used."""
    joins = "RAY_ADDRESS" in os.environ  # there HAProxy may have the port already
    probed = cluster.settings.model_copy(update={"port": 0}) if joins else cluster.settings
    with listener_of(probed) as listener:  # HAProxy's words for a used port are long
        warn_if_open(listener, cluster.settings, keyed=cluster.clients is not None)
        local = is_loopback(listener)
    ports = " and ".join(
        os.environ.get(f"RAY_SERVE_HAPROXY_{name}_PORT", default)
        for name, default in (("METRICS", "9101"), ("STATS", "8404"))
    )
    said = [
        f"HAProxy's metrics and statistics listen on all addresses, at ports {ports}.",
        "So do Ray's own ports and the gRPC ports of replicas and fronts, which the system chooses "
        "and which ask for Ray's token.",
    ]
    if not local:
        said.append(
            f"Replicas and fronts listen on {cluster.settings.host} too, at ports 30000 to 31000."
        )
    print(*said, "A firewall keeps them to yourself.", file=sys.stderr, flush=True)


def _update(cluster: Cluster, state: State) -> None:
    """Apply a changed file to a cluster that runs. What fails is taken back. Raises LaunchError."""
    before = state.applied
    if before is None:
        raise LaunchError("the command that runs already is still starting; try again later")
    for name in ("host", "port"):
        if getattr(before.settings, name) != getattr(cluster.settings, name):
            raise ConfigError(f"settings.{name}: cannot change while the cluster runs; restart it")
    if (before.clients is None) != (cluster.clients is None):
        raise ConfigError(
            "keys cannot be switched on or off while the cluster runs; set SERVICE_API_KEY or its "
            "file as the first command had it, or restart it"
        )
    problems = placement.refused(cluster)
    if "RAY_ADDRESS" not in os.environ:
        problems += placement.lacking(cluster)
    if problems:
        raise LaunchError(f"{'; '.join(problems)}; nothing was changed")
    cluster = _with_keys_of_now(cluster)
    gone = before.models.keys() - cluster.models.keys()
    both = {**before.models, **cluster.models}
    # Requests go where they went, by the keys of now, until the new models have loaded.
    told: Cluster | None = dataclasses.replace(before, clients=cluster.clients)
    if gone and placement.lacking(dataclasses.replace(cluster, models=both)):
        print(f"{', '.join(gone)}: ended first, to make room", file=sys.stderr, flush=True)
        applications.delete(*gone)
        told = None
    _check_owned(state)
    try:
        surge = placement.surging(cluster, before)
        applications.apply(cluster, surge, told)
        reason = applications.wait(cluster, lambda: state.applied is None)
        if told and reason is None:
            _check_owned(state)
            with suppress(ConfigError):  # else the keys read before stay in force
                cluster = _with_keys_of_now(cluster)
            applications.apply(cluster, surge)
            reason = applications.wait(cluster, lambda: state.applied is None)
    except KeyboardInterrupt:
        reason = "interrupted"
    _check_owned(state)
    if reason is None:
        state.applied = cluster
        applications.delete(*gone & applications.statuses().keys())
        print("Updated", flush=True)
        return
    print("Taking the update back ...", file=sys.stderr, flush=True)
    with suppress(ConfigError):  # else the keys read before stay in force
        before = _with_keys_of_now(before)
    applications.apply(before, surge=placement.surging(before, cluster))
    applications.delete(*cluster.models.keys() - before.models.keys())
    raise LaunchError(f"{reason}; what was served before is served on")


def _check_owned(state: State) -> None:
    """Raise LaunchError if the command that runs has ended, and with it what it has applied."""
    if state.applied is None:
        raise LaunchError("the command that runs has ended")


def _ready(cluster: Cluster) -> str:
    keyed = cluster.clients is not None
    names = ", ".join(cluster.models)
    return ready_message(names, cluster.settings.url(), keyed=keyed, model=cluster.default)


def _watch(state: State, stop: _Stop, keys: Version | None) -> None:
    """Until a signal comes, give the replicas the API keys of a file that has changed.

    `keys` is the version of the file that was applied. Raises RayGone.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    refused: Version | None = None
    while not stop.requested:
        time.sleep(CHECK_INTERVAL)
        try:
            if not is_alive():
                raise RayGone("Ray has ended on this machine")
            applied = state.applied
            version = version_of(applied.settings.api_key_file if applied else None)
            if version in (None, keys, refused):
                continue
            refused = version
            if applied is not None:
                # An update may run for minutes, and start replicas with the keys it has read.
                applications.use_keys(_with_keys_of_now(applied).clients)
            with state.changing():
                if (cluster := state.applied) is not None:
                    cluster = _with_keys_of_now(cluster)
                    applications.apply(cluster)
                    state.applied, keys, refused = cluster, version, None
        except ConfigError as e:
            print(f"{e}; the keys read before stay in force", file=sys.stderr, flush=True)
        except RayGone:
            raise
        except (LaunchError, RayError, RayServeException):  # an update runs, or Serve is busy
            refused = None


def _with_keys_of_now(cluster: Cluster) -> Cluster:
    """Return the cluster with the keys that its file holds now. Raises ConfigError."""
    if cluster.settings.api_key_file is None:
        return cluster
    return dataclasses.replace(cluster, clients=cluster.settings.clients())


def _end(cluster: Cluster) -> None:
    """Finish accepted requests, and end what this command has started."""
    from ray import serve

    print("Stopping: accepted requests are finished ...", file=sys.stderr, flush=True)
    applications.drain(cluster.settings.drain_timeout)
    if "RAY_ADDRESS" not in os.environ:
        serve.shutdown()
        return
    applications.delete(*applications.statuses())
