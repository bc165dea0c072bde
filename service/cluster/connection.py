"""Starts Ray on this machine for one command, or joins the Ray that runs."""

import importlib.util
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import psutil

from service.cluster import environment
from service.cluster.state import State
from service.errors import LaunchError

# Bytes. Ray keeps large objects there; requests and answers are small.
_OBJECT_STORE = 200 * 2**20
_REACH_SECONDS = 5


class RayGone(LaunchError):
    """The Ray that this command has started has ended."""


def check_installed() -> None:
    """Raise LaunchError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise LaunchError(
            "a cluster needs Ray, which is not installed; `make install-cluster` in a checkout "
            "installs it, as does `pip install '<wheel>[cluster]'`"
        )


def is_alive() -> bool:
    """Whether Ray is alive. Always true for a Ray of RAY_ADDRESS, whose head may come back."""
    if "RAY_ADDRESS" in os.environ:
        return True
    if environment.folder_of(os.environ) is None:  # another command on this machine has started it
        import ray

        try:
            _reach(ray.get_runtime_context().gcs_address)
        except OSError:
            return False
        return True
    alive = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE:
                alive.add(child.name())
    return {"raylet", "gcs_server"} <= alive


@contextmanager
def connected(state: State, *, starts: bool) -> Iterator[None]:
    """Join the cluster of RAY_ADDRESS or of another command, or with `starts` run one here."""
    check_installed()
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
            state.ray_folder = path
        environment.prepare(path)
        import ray
        import ray.exceptions

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
            _reach(options.get("address", ""))
            ray.init(log_to_driver=owns, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
            where = f"the Ray cluster at {address}" if address else "Ray on this machine"
            reason = next(iter(str(e).splitlines()), type(e).__name__)[:300]
            raise LaunchError(f"{where} does not answer: {reason}") from None
        # Here, unlike in the processes of the cluster, no event loop runs.
        os.environ["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "1"
        import ray.serve
        import ray.serve.exceptions

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            if starts:
                state.address = ray.get_runtime_context().gcs_address
            elif address:
                _check_environment()
            yield
        except RayGone as e:
            end_orphans(path)
            print(f"error: {e}", file=sys.stderr, flush=True)
            os._exit(1)  # Ray's shutdown would wait, or crash
        except (ray.exceptions.RayError, ray.serve.exceptions.RayServeException) as e:
            lines = str(e).strip().splitlines()
            raise LaunchError(f"Ray fails: {lines[-1][:500] if lines else type(e).__name__}") from e
        finally:
            ray.shutdown()
            end_orphans(path)


def end_orphans(folder: str | None) -> None:
    """End what is left of the Ray that had this folder: it, or its command, was killed.

    The replicas would keep their cards, and HAProxy the port.
    """
    if folder is None:
        return
    while left := [process for process in psutil.process_iter() if _belongs(process, folder)]:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
    shutil.rmtree(folder, ignore_errors=True)


def _belongs(process: psutil.Process, folder: str) -> bool:
    try:
        return environment.folder_of(process.environ()) == folder
    except psutil.Error:
        return False


def _reach(address: str) -> None:
    """Raise OSError if nothing answers at host:port. Ray would try for minutes, deaf to Ctrl-C."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdecimal():  # else it is a word, such as `auto`
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()


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
