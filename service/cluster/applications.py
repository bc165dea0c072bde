"""The cluster's models and its front as applications of Ray Serve: applied, watched, drained."""

import asyncio
import concurrent.futures
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from service.clients import Client, as_json
from service.cluster import placement
from service.cluster.config import FRONT, PREFIX, Cluster
from service.cluster.connection import RayGone, is_alive
from service.errors import LaunchError

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

_Answer = TypeVar("_Answer")

CHECK_INTERVAL = 0.5  # seconds
_MAX_SILENCE = 60.0  # seconds; Serve's controller may be started again meanwhile
# How long a replica of an application may be ill: Serve replaces it.
_MAX_ILLNESS = 60.0  # seconds
# The last error of this service in the traceback that Serve reports.
_ERROR = re.compile(r"service\.errors\.\w+: (.{1,2000})")


def _answered(call: Callable[[], _Answer]) -> _Answer:
    """Return what a call to Ray returns, which waits for a dead node without end.

    Raises RayGone when Ray has ended, and LaunchError when it says nothing for `_MAX_SILENCE`.
    """
    future: Future[_Answer] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as e:
            future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    deadline = time.monotonic() + _MAX_SILENCE
    while not concurrent.futures.wait([future], 1).done:
        if not is_alive():
            raise RayGone("Ray has ended on this machine")
        if time.monotonic() > deadline:
            raise LaunchError("Ray Serve does not answer; try again later")
    return future.result()


def apply(cluster: Cluster, surge: Collection[str] = (), told: Cluster | None = None) -> None:
    """Give Serve the models and the front. `surge` as for `deployments.applications`.

    `told` is what the front is told of, if not `cluster`.
    """
    from ray import serve

    from service.cluster import deployments

    has_gpus = placement.resources("GPU") > 0
    *models, front = deployments.applications(cluster, has_gpus=has_gpus, surge=surge)
    if told is not None:
        front = deployments.applications(told, has_gpus=has_gpus)[-1]
    # The front asks for handles to the models, which must be there.
    for some in (models, [front]):
        _answered(partial(serve.run_many, some, wait_for_applications_running=False))


def statuses() -> "dict[str, ApplicationStatusOverview]":
    """Return our applications: the front and each model by its name."""
    from ray import serve

    return {
        name.removeprefix(PREFIX).removeprefix("-") or FRONT: app
        for name, app in _answered(serve.status).applications.items()
        if name == PREFIX or name.startswith(f"{PREFIX}-")
    }


def delete(*names: str, waits: bool = True) -> None:
    """End these models, or the front. With `waits`, return when they have finished."""
    from ray import serve

    while True:  # another command may just apply them again
        for name in names:
            serve.delete(_name_of(name), _blocking=False)
        if not (waits and statuses().keys() & {*names}):
            return
        time.sleep(CHECK_INTERVAL)


def _name_of(name: str) -> str:
    """Return the name of the Serve application of a model, or of the front."""
    return PREFIX if name == FRONT else f"{PREFIX}-{name}"


class Progress:
    """Prints what has changed of the applications, with the seconds since this was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown: dict[str, str] = {}

    def show(self, name: str, line: str) -> None:
        if self._shown.get(name) != line:
            self._shown[name] = line
            seconds = time.monotonic() - self._began
            print(f"{line} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def wait(
    cluster: Cluster, progress: Progress, stopped: Callable[[], bool] = lambda: False
) -> str | None:
    """Wait until all models run, or until `stopped`. Returns why a model does not run."""
    ill_since: dict[str, float] = {}
    while not stopped():
        apps = statuses()
        for name, app in apps.items():
            progress.show(name, _line(name, app))
            now = time.monotonic()
            since = ill_since.setdefault(name, now) if app.status == "UNHEALTHY" else now
            if app.status == "DEPLOY_FAILED" or now - since > _MAX_ILLNESS:
                return f"{name}: {_reason(app)}"
            if app.status != "UNHEALTHY":
                ill_since.pop(name, None)
        expected = {*cluster.models, FRONT}
        if expected <= apps.keys() and all(apps[n].status == "RUNNING" for n in expected):
            return None
        time.sleep(CHECK_INTERVAL)
    return None


def _line(name: str, app: "ApplicationStatusOverview") -> str:
    states = {
        state: count
        for deployment in app.deployments.values()
        for state, count in deployment.replica_states.items()
    }
    text = ", ".join(f"{count} {str(state).lower()}" for state, count in sorted(states.items()))
    unplaced = any("to be scheduled" in d.message for d in app.deployments.values())
    note = "; a replica waits for a node with room" if unplaced else ""
    return f"{name}: {app.status.lower()}{', replicas: ' + text if text else ''}{note}"


def _reason(app: "ApplicationStatusOverview") -> str:
    texts = [app.message, *(deployment.message for deployment in app.deployments.values())]
    for text in texts:
        if found := _ERROR.findall(text):
            return str(found[-1])
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "its replicas do not start"


def models_and_nodes() -> dict[str, Any]:
    """Return what `chat-service cluster --status` shows."""
    import ray

    apps = statuses()
    models = {
        name: {
            "status": app.status.lower(),
            "served": _ask(name, "status"),
            "starting": sum(
                count
                for deployment in app.deployments.values()
                for state, count in deployment.replica_states.items()
                if state == "STARTING"
            ),
        }
        for name, app in apps.items()
        if name != FRONT
    }
    nodes = [
        {
            "node": node["NodeID"][:8],
            "address": node["NodeManagerAddress"],
            "cpus": node["Resources"].get("CPU", 0),
            "gpus": node["Resources"].get("GPU", 0),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]
    return {"models": models, "nodes": nodes}


def drain(seconds: float) -> None:
    """Let all replicas refuse new requests, and finish those they have.

    What has not finished after so many seconds ends with an error.
    """
    models = statuses().keys() - {FRONT}
    deadline = time.monotonic() + seconds
    for model in models:
        _ask(model, "drain")
    while time.monotonic() < deadline and any(any(_ask(m, "is_busy")) for m in models):
        time.sleep(CHECK_INTERVAL)
    for model in models:
        _ask(model, "stop")


def use_keys(clients: Mapping[str, Client]) -> None:
    """Give these API keys to the replicas and fronts that run; those to come get `apply`'s."""
    for name in statuses():
        _ask(name, "use_keys", as_json(clients))


def _ask(name: str, method: str, *arguments: Any) -> list[Any]:
    """Call a method of all replicas of a model, or of the fronts.

    Returns the answers of those that are well.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from service.cluster import broadcast

    try:
        handle = _answered(partial(serve.get_app_handle, _name_of(name)))
    except RayServeException:  # it has no replica that runs
        return []
    return asyncio.run(broadcast.answers(handle, method, *arguments))
