"""`chat-service cluster`: starts or joins a Ray cluster, and applies a file to it."""

import dataclasses
import logging
import os
import pickle
import re
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import filelock
import psutil

from service import settings
from service.cluster import config, environment
from service.cluster.config import Cluster
from service.errors import ConfigError, LaunchError, ServiceError
from service.launch import environment as launch_environment
from service.launch.listener import listener_of, warn_if_open

# Time, size and inode of a file.
_Version = tuple[int, int, int] | None

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

_CHECK_INTERVAL = 0.5  # seconds
_MAX_SILENCE = 60.0  # seconds; Serve's controller may be started again meanwhile
_ASK_SECONDS = 10.0
# Bytes. Ray keeps large objects there; requests and answers are small.
_OBJECT_STORE = 200 * 2**20
# The last error of this service in the traceback that Serve reports.
_ERROR = re.compile(r"service\.errors\.\w+: (.{1,2000})")


def run(file: Path | None) -> None:
    """Serve the models of a file until SIGTERM or Ctrl-C.

    Where such a command runs already, update its models instead, and return. Raises ServiceError.
    """
    launch_environment.check()
    cluster = config.load(file)
    keys = _version_of(cluster)
    os.environ.pop("SERVICE_API_KEY", None)  # Ray's processes need only its hash
    state = _State(cluster.settings.cache_dir)
    with state.owner() as owns:
        if not owns:
            with _connected(state, starts=False):
                _update(cluster, state)
            return
        state.forget()
        if "RAY_ADDRESS" not in os.environ:  # there HAProxy may have the port already
            _warn(cluster)
        with _connected(state, starts=True):
            stop = _Stop()  # over Ray's own handlers
            try:
                if _start(cluster, state, stop):
                    print(_ready_message(cluster), flush=True)
                    _watch(state, stop, keys)
            finally:
                state.forget()
                _end(cluster)


def check(file: Path | None) -> list[str]:
    """Return what is wrong with a file, and which resources its models lack. Raises ServiceError.

    Asks the cluster that runs, or starts one on this machine for the question.
    """
    launch_environment.check()
    cluster = config.load(file)
    state = _State(cluster.settings.cache_dir)
    with state.owner() as owns, _connected(state, starts=owns):
        refused = _refused(cluster)
        return [*([refused] if refused else []), *_lacking(cluster)]


def status() -> dict[str, Any]:
    """Return models, replicas, and nodes of the cluster that runs. Raises ServiceError."""
    state = _State(settings.load().cache_dir)
    with state.owner() as owns:
        if owns and "RAY_ADDRESS" not in os.environ:
            raise LaunchError("no cluster runs on this machine; `chat-service cluster` starts one")
    with _connected(state, starts=False):
        return _status()


class _State:
    """What two commands on this machine tell each other about one cluster."""

    def __init__(self, cache_dir: Path) -> None:
        address = os.environ.get("RAY_ADDRESS")
        name = re.sub(r"\W+", "-", address)[:64] if address else "local"
        self._folder = cache_dir / "cluster" / name
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.token = self._folder / "token"
        self._address = self._folder / "address"
        self._applied = self._folder / "applied"
        self._ray_folder = self._folder / "ray"

    @contextmanager
    def owner(self) -> Iterator[bool]:
        """Yield whether this command owns the cluster: it is the only one, or the first."""
        lock = filelock.FileLock(self._folder / "lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            yield False
            return
        with lock:
            yield True

    def forget(self) -> None:
        """Forget what an earlier command has applied, and where. It may have been killed."""
        self._applied.unlink(missing_ok=True)
        self._address.unlink(missing_ok=True)

    @property
    def address(self) -> str:
        """Where the owner's cluster is. Raises LaunchError while there is none."""
        try:
            return self._address.read_text()
        except FileNotFoundError:
            raise LaunchError("the cluster is still starting; try again later") from None

    @address.setter
    def address(self, value: str) -> None:
        self._address.write_text(value)

    @property
    def ray_folder(self) -> str | None:
        """The folder of the Ray that the last command has started on this machine."""
        return self._ray_folder.read_text() if self._ray_folder.exists() else None

    @ray_folder.setter
    def ray_folder(self, value: str) -> None:
        self._ray_folder.write_text(value)

    @property
    def applied(self) -> Cluster | None:
        """The cluster that was applied last, and came up."""
        try:
            applied: Cluster = pickle.loads(self._applied.read_bytes())
        except FileNotFoundError:
            return None
        return applied

    @applied.setter
    def applied(self, value: Cluster) -> None:
        part = self._applied.with_suffix(".part")
        part.write_bytes(pickle.dumps(value))
        part.replace(self._applied)


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


@contextmanager
def _connected(state: _State, *, starts: bool) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of another command, or with `starts` run one here."""
    address = os.environ.get("RAY_ADDRESS")
    if address is None and "RAY_AUTH_TOKEN" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(state.token))
    owns, starts = starts, starts and address is None
    folder: tempfile.TemporaryDirectory[str] | nullcontext[None] = nullcontext()
    if starts:
        state.token.touch(mode=0o600)
        state.token.write_text(secrets.token_hex(32))
        # Short, for sockets in it have paths of at most 97 bytes. Ray may still write when it ends.
        folder = tempfile.TemporaryDirectory(prefix="chat-", dir="/tmp", ignore_cleanup_errors=True)
    with folder as path:
        if path:
            _end_orphans(state.ray_folder)
            state.ray_folder = path
        environment.prepare(path)
        try:
            import ray
            import ray.exceptions
        except ImportError:
            raise LaunchError(
                "a cluster needs Ray, which is not installed; `make cluster` in a checkout "
                'installs it, as does `pip install "vllm-chat-service[cluster]"`'
            ) from None
        options: dict[str, Any] = {"namespace": "serve", "logging_level": logging.WARNING}
        if path:
            print("Starting Ray on this machine ...", file=sys.stderr, flush=True)
            options |= {
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": path,
            }
        elif address is None:
            options["address"] = state.address
        else:
            options["address"] = address
        try:
            ray.init(log_to_driver=owns, **options)
        except (
            *(ConnectionError, RuntimeError, TimeoutError, ValueError),
            ray.exceptions.RayError,
        ) as e:
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            reason = next(iter(str(e).splitlines()), type(e).__name__)[:300]
            raise LaunchError(f"{where} does not answer: {reason}") from None
        # Here, unlike in the processes of the cluster, no event loop runs.
        os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
        import ray.serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            if starts:
                state.address = ray.get_runtime_context().gcs_address
            elif address:
                _check_environment()
            yield
        except ray.exceptions.RayError as e:
            lines = str(e).strip().splitlines()
            raise LaunchError(f"Ray fails: {lines[-1][:500] if lines else type(e).__name__}") from e
        finally:
            ray.shutdown()


def _end_orphans(folder: str | None) -> None:
    """End what a command has left that was killed: HAProxy, which would keep the port."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if folder and process.ppid() == 1 and any(folder in word for word in process.cmdline()):
                process.kill()


def _check_environment() -> None:
    """Raise LaunchError if a node of a cluster that others started lacks our variables."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0)
    def missing() -> list[str]:
        return [name for name, value in environment.NEEDED.items() if os.environ.get(name) != value]

    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if names := ray.get(missing.options(scheduling_strategy=here).remote()):
                raise LaunchError(
                    f"Ray's node {node['NodeManagerAddress']} lacks {', '.join(names)}: run `eval "
                    '"$(chat-service cluster --environment)"` before `ray start` on each node'
                )


def _start(cluster: Cluster, state: _State, stop: _Stop) -> bool:
    """Apply the cluster, and wait until it runs. Returns whether it does, or was stopped before.

    Raises LaunchError.
    """
    from ray import serve

    if "RAY_ADDRESS" not in os.environ and (problems := _lacking(cluster)):
        raise LaunchError("; ".join(problems))
    http = {"host": cluster.settings.host, "port": cluster.settings.port}
    serve.start(proxy_location="EveryNode", http_options=http)
    for name in _applications().keys() - {*cluster.models, "front"}:  # of a command that was killed
        serve.delete(_application(name))
    _apply(cluster, surge=())
    reason = _wait(cluster, stop)
    if reason is not None:
        raise LaunchError(reason)
    if stop.requested:
        return False
    state.applied = cluster
    return True


def _warn(cluster: Cluster) -> None:
    """Say what can be reached from other machines. Raises LaunchError if the port is used."""
    with listener_of(cluster.settings) as listener:  # HAProxy's words for a used port are long
        warn_if_open(listener, cluster.settings, keyed=cluster.clients is not None)
    ports = " and ".join(
        os.environ.get(f"RAY_SERVE_HAPROXY_{name}_PORT", default)
        for name, default in (("METRICS", "9101"), ("STATS", "8404"))
    )
    print(
        f"HAProxy's metrics and statistics listen on all addresses, at ports {ports}; a firewall "
        "keeps them to yourself.",
        file=sys.stderr,
        flush=True,
    )


def _update(cluster: Cluster, state: _State) -> None:
    """Apply a changed file to a cluster that runs. What fails is taken back. Raises LaunchError."""
    from ray import serve

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
    refused = [reason for reason in (_refused(cluster),) if reason]
    if problems := [*refused, *([] if "RAY_ADDRESS" in os.environ else _lacking(cluster))]:
        raise LaunchError(f"{'; '.join(problems)}; nothing was changed")
    gone = before.models.keys() - cluster.models.keys()
    both = {**before.models, **cluster.models}
    if gone and _lacking(dataclasses.replace(cluster, models=both)):
        print(f"{', '.join(gone)}: ended first, to make room", file=sys.stderr, flush=True)
        for name in gone:
            serve.delete(_application(name))
    try:
        _apply(cluster, surge=_surging(cluster))
        reason = _wait(cluster, None)
    except (KeyboardInterrupt, SystemExit):
        reason = "interrupted"
    if reason is None:
        for name in gone & _applications().keys():
            serve.delete(_application(name))
        state.applied = cluster
        print("Updated", flush=True)
        return
    print("Taking the update back ...", file=sys.stderr, flush=True)
    _apply(before, surge=_surging(before))
    for name in cluster.models.keys() - before.models.keys():
        serve.delete(_application(name))
    raise LaunchError(f"{reason}; what was served before is served on")


def _refused(cluster: Cluster) -> str | None:
    """Return what vLLM does not accept of a model's YAML, asked on a node of the cluster."""
    import ray

    @ray.remote(num_cpus=0)
    def refused() -> str | None:
        from service import vllm_arguments

        for model in cluster.models.values():
            try:
                vllm_arguments.arguments(model.config, model.origins, cluster.settings)
            except ServiceError as e:
                return f"{model.name}: {e}"
        return None

    print("Asking vLLM, which takes a while to import ...", file=sys.stderr, flush=True)
    reason: str | None = ray.get(refused.remote())
    return reason


def _apply(cluster: Cluster, surge: set[str] | tuple[()]) -> None:
    from ray import serve

    from service.cluster import deployments

    targets = deployments.applications(cluster, has_gpus=_resources("GPU") > 0, surge=surge)
    *models, front = targets
    # The front asks for handles to the models, which must be there.
    serve.run_many(models, wait_for_applications_running=False)
    serve.run_many([front], wait_for_applications_running=False)


def _resources(kind: str, *, free: bool = False) -> float:
    import ray

    resources = ray.available_resources() if free else ray.cluster_resources()
    return float(resources.get(kind, 0))


def _lacking(cluster: Cluster) -> list[str]:
    """Return which resources the smallest number of replicas lacks in the whole cluster."""
    has_gpus = _resources("GPU") > 0
    models = cluster.models.values()
    needs = {
        "CPU": ("cores", "cpus", sum(m.min_replicas * m.cpus for m in models)),
        "GPU": (
            "GPUs",
            "gpus",
            sum(m.min_replicas * m.gpus_of_replica(has_gpus=has_gpus) for m in models),
        ),
    }
    problems = [
        f"all replicas need {need:g} {unit}, and the cluster has {_resources(kind):g}: lower "
        f"`{key}` or `replicas`, or add a node"
        for kind, (unit, key, need) in needs.items()
        if need > _resources(kind)
    ]
    memory = _resources("memory") / 2**30
    weights = sum(
        m.min_replicas * (m.config.about.weights_gib("float32") or 0)
        for m in models
        if not m.gpus_of_replica(has_gpus=has_gpus)
    )
    if weights > memory:
        problems.append(
            f"the weights of all replicas on CPUs need about {weights:.0f} GiB, and the cluster "
            f"has {memory:.0f}"
        )
    return problems


def _status() -> dict[str, Any]:
    import ray

    apps = _applications()
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
        if name != "front"
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


def _surging(cluster: Cluster) -> set[str]:
    """Return the models of which one more replica fits now."""
    has_gpus = _resources("GPU") > 0
    return {
        name
        for name, model in cluster.models.items()
        if model.cpus <= _resources("CPU", free=True)
        and model.gpus_of_replica(has_gpus=has_gpus) <= _resources("GPU", free=True)
    }


def _wait(cluster: Cluster, stop: _Stop | None) -> str | None:
    """Wait until all models run, or a signal; print what changes. Returns why one does not."""

    began = time.monotonic()
    shown: dict[str, str] = {}
    while not (stop and stop.requested):
        apps = _applications()
        for name, app in apps.items():
            line = _line(name, app, cluster)
            if shown.get(name) != line:
                shown[name] = line
                seconds = time.monotonic() - began
                print(f"{line} ({seconds:.0f} s)", file=sys.stderr, flush=True)
            if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                return f"{name}: {_reason(app)}"
        expected = {*cluster.models, "front"}
        if expected <= apps.keys() and all(apps[n].status == "RUNNING" for n in expected):
            return None
        time.sleep(_CHECK_INTERVAL)
    return None


def _applications() -> "dict[str, ApplicationStatusOverview]":
    """Return our applications: the front and each model by its name."""
    from ray import serve

    from service.cluster.deployments import PREFIX

    return {
        name.removeprefix(PREFIX).removeprefix("-") or "front": app
        for name, app in serve.status().applications.items()
        if name == PREFIX or name.startswith(f"{PREFIX}-")
    }


def _application(name: str) -> str:
    """Return the name of the Serve application of a model, or of the front."""
    from service.cluster.deployments import PREFIX

    return PREFIX if name == "front" else f"{PREFIX}-{name}"


def _line(name: str, app: "ApplicationStatusOverview", cluster: Cluster) -> str:
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


def _ready_message(cluster: Cluster) -> str:
    url = cluster.settings.url()
    key = '  -H "Authorization: Bearer <the API key>" \\\n' if cluster.clients is not None else ""
    names = ", ".join(cluster.models)
    return (
        f"\nReady: {names} at {url}. Try:\n\n"
        f"curl -X POST {url} \\\n{key}"
        f'  -d \'{{"prompt": "What is the capital of France?", "model": "{cluster.default}"}}\'\n\n'
        f"OpenAI clients: base_url {url}/v1   Metrics: {url}/metrics\n"
    )


def _watch(state: _State, stop: _Stop, keys: _Version) -> None:
    """Until a signal comes, give the replicas the API keys of a file that has changed.

    `keys` is the version of the file that was applied. Raises LaunchError when Ray has ended.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    failing_since: float | None = None
    refused: _Version = None
    while not stop.requested:
        time.sleep(_CHECK_INTERVAL)
        try:
            _applications()
            failing_since = None
            cluster = state.applied
            version = _version_of(cluster)
            if cluster is None or version in (None, keys, refused):
                continue
            refused = version
            cluster = dataclasses.replace(cluster, clients=cluster.settings.clients())
            _apply(cluster, surge=())
            state.applied, keys, refused = cluster, version, None
        except ConfigError as e:
            print(f"{e}; the keys read before stay in force", file=sys.stderr, flush=True)
        except (RayError, RayServeException, TimeoutError) as e:
            refused = None
            failing_since = failing_since or time.monotonic()
            if time.monotonic() - failing_since > _MAX_SILENCE:
                raise LaunchError(f"Ray does not answer any more ({type(e).__name__})") from None


def _version_of(cluster: Cluster | None) -> _Version:
    """Return what changes with the file of API keys; None without one."""
    file = cluster.settings.api_key_file if cluster else None
    try:
        stat = file.stat() if file else None
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat else None


def _end(cluster: Cluster) -> None:
    """Finish accepted requests, and end what this command has started."""
    from ray import serve

    print("Stopping: accepted requests are finished ...", file=sys.stderr, flush=True)
    _drain(cluster.settings.drain_timeout)
    if "RAY_ADDRESS" not in os.environ:
        serve.shutdown()
        return
    for name in _applications():
        serve.delete(_application(name), _blocking=False)
    while _applications():
        time.sleep(_CHECK_INTERVAL)


def _drain(seconds: float) -> None:
    """Let all replicas refuse new requests, and wait until they have finished those they have."""
    models = _applications().keys() - {"front"}
    deadline = time.monotonic() + seconds
    for model in models:
        _ask(model, "drain")
    while time.monotonic() < deadline and any(any(_ask(m, "is_busy")) for m in models):
        time.sleep(_CHECK_INTERVAL)


def _ask(model: str, method: str) -> list[Any]:
    """Call a method of all replicas of a model; return the answers of those that are well."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        handle = serve.get_app_handle(_application(model))
        results = handle.broadcast(method).results(timeout_s=_ASK_SECONDS, return_exceptions=True)
    except (RayServeException, TimeoutError):  # it has no replica that runs
        return []
    return [result for result in results if not isinstance(result, Exception)]
