"""`chat-service cluster`: starts or joins a Ray cluster, and applies a file to it."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from service import settings
from service.clients import Client, Version, version_of
from service.cluster import applications, config, placement, update
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
from service.cluster.stop import Stop, on_signals
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
    os.environ.pop("SERVICE_API_KEY", None)  # Ray's processes need only its hash
    state = State(cluster.settings.cache_dir)
    with state.owner() as owns:
        if not owns:
            with connected(state, starts=False), state.changing():
                on_signals(signal.default_int_handler)
                update.update(cluster, state)
            return
        _clear(state)
        _warn(cluster)
        with connected(state, starts=True):
            stop = Stop()
            try:
                if _start(cluster, state, stop):
                    print(_ready(cluster), flush=True)
                    _watch(state, stop)
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


def _start(cluster: Cluster, state: State, stop: Stop) -> bool:
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
    reason = applications.wait(cluster, applications.Progress(), lambda: stop.requested)
    if reason is not None:
        raise LaunchError(reason)
    if stop.requested:
        return False
    if cluster.clients is not None and (file := cluster.settings.api_key_file):
        state.keys = file, cluster.clients
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


def _ready(cluster: Cluster) -> str:
    keyed = cluster.clients is not None
    names = ", ".join(cluster.models)
    return ready_message(names, cluster.settings.url(), keyed=keyed, model=cluster.default)


def _watch(state: State, stop: Stop) -> None:
    """Until a signal comes, see to API keys that change, and to updates that were killed.

    Raises RayGone.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    tried: Version | None = None
    settled = True  # whether Serve was told the keys that were read last
    while not stop.requested:
        time.sleep(CHECK_INTERVAL)
        if not is_alive():
            raise RayGone("Ray has ended on this machine")
        applied = state.applied
        file = applied.settings.api_key_file if applied else None
        version = version_of(file)
        try:
            if applied and file and version not in (None, tried):
                clients = _keys_of(applied)
                if clients is not None and state.keys != (file, clients):
                    state.keys, settled = (file, clients), False
                    _say(f"API keys read again: {len(clients)} in force")
                tried = version
            if settled and not state.unfinished:
                continue
            keys = state.keys
            if keys and not settled and keys[0] == file:
                # An update may run for minutes, and start replicas with the keys of its beginning.
                applications.use_keys(keys[1])
            with state.changing(patience=1):
                was_cut_off = state.unfinished
                update.restore(state, waits=False)
            settled = True
            if was_cut_off:
                _say("An update was cut off; what was applied last is applied again")
        except RayGone:
            raise
        # An update runs, Serve is busy, or the disk is full.
        except (LaunchError, OSError, RayError, RayServeException):
            pass


def _keys_of(applied: Cluster) -> Mapping[str, Client] | None:
    """Return the API keys that the file holds now. If it is invalid, say why, and return None."""
    try:
        return applied.settings.clients()
    except ConfigError as e:
        _say(f"{e}; the keys read before stay in force")
        return None


def _say(line: str) -> None:
    with suppress(OSError):  # a terminal that was closed, whose end is no reason to stop
        print(line, file=sys.stderr, flush=True)


def _end(cluster: Cluster) -> None:
    """Finish accepted requests, and end what this command has started."""
    from ray import serve

    _say("Stopping: accepted requests are finished ...")
    applications.drain(cluster.settings.drain_timeout)
    if "RAY_ADDRESS" not in os.environ:
        # Ray kills its controller at the end, and tells of that as of a failure.
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
            serve.shutdown()
        return
    while names := applications.statuses():  # an update may just add one
        applications.delete(*names)
