"""Changes what a running cluster serves. What fails or is cut off is taken back."""

import dataclasses
import os
import sys

from service.cluster import applications, placement
from service.cluster.config import FRONT, Cluster
from service.cluster.state import State
from service.cluster.stop import Stop
from service.errors import ConfigError, LaunchError


def update(cluster: Cluster, state: State) -> None:
    """Apply a changed file to a running cluster. Raises ConfigError and LaunchError."""
    before = state.applied
    if before is None:
        raise LaunchError("the command that runs already is still starting; try again later")
    for name in ("host", "port"):
        if getattr(before.settings, name) != getattr(cluster.settings, name):
            raise ConfigError(
                f"settings.{name} or SERVICE_{name.upper()}: cannot change while the cluster runs; "
                "restart it"
            )
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
    _last_applied(state)
    stop = Stop()
    state.unfinished = True
    reason: str | None = "interrupted"
    try:
        reason = _replace(cluster, before, state, stop)
        if reason is None:
            state.applied = cluster
        else:
            print("Taking the update back ...", file=sys.stderr, flush=True)
        restore(state, replaced=cluster)
    except KeyboardInterrupt:
        if reason is None:
            raise LaunchError("interrupted; the command that runs finishes the update") from None
        raise LaunchError("interrupted; the command that runs takes the update back") from None
    if reason is not None:
        raise LaunchError(f"{reason}; what was served before is served on")
    print("Updated", flush=True)


def _replace(cluster: Cluster, before: Cluster, state: State, stop: Stop) -> str | None:
    """Let Serve replace what has changed, and wait for it. Returns why it fails."""

    def stopped() -> bool:
        return stop.requested or state.applied is None

    cluster = _with_keys_of_now(cluster, state)
    gone = applications.statuses().keys() - {*cluster.models, FRONT}
    both = {**before.models, **cluster.models}
    # Requests go where they went, by the keys of now, until the new models have loaded.
    told: Cluster | None = dataclasses.replace(before, clients=cluster.clients)
    if gone and placement.lacking(dataclasses.replace(cluster, models=both)):
        print(f"{', '.join(gone)}: ended first, to make room", file=sys.stderr, flush=True)
        applications.delete(*gone)
        _last_applied(state)
        told = None
    progress = applications.Progress()
    surge = placement.surging(cluster, before)
    applications.apply(cluster, surge, told)
    reason = applications.wait(cluster, progress, stopped)
    if told and reason is None and not stopped():
        applications.apply(_with_keys_of_now(cluster, state), surge)
        reason = applications.wait(cluster, progress, stopped)
    _last_applied(state)
    return "interrupted" if stop.requested else reason


def restore(state: State, replaced: Cluster | None = None, *, waits: bool = True) -> None:
    """Apply again what was applied last, with the keys of now, and end all other models.

    `replaced` is what was applied since, if that is known. With `waits`, return when the other
    models have finished what they have. Raises LaunchError.
    """
    cluster = _with_keys_of_now(_last_applied(state), state)
    applications.apply(cluster, placement.surging(cluster, replaced or cluster))
    if cluster.clients is not None:  # Serve tells nobody what it has told before
        applications.use_keys(cluster.clients)
    others = applications.statuses().keys() - {*cluster.models, FRONT}
    applications.delete(*others, waits=waits)
    _last_applied(state)
    state.applied, state.unfinished = cluster, False


def _with_keys_of_now(cluster: Cluster, state: State) -> Cluster:
    """Return the cluster with the keys that the owner has last read, if they are of its file."""
    keys = state.keys
    if keys is None or keys[0] != cluster.settings.api_key_file:
        return cluster
    return dataclasses.replace(cluster, clients=keys[1])


def _last_applied(state: State) -> Cluster:
    """Return what was applied last. Raises LaunchError if the command that runs has ended."""
    applied = state.applied
    if applied is None:
        raise LaunchError("the command that runs has ended; nothing is served")
    return applied
