"""Preloaded by the fork server: imports vLLM once for all processes of a server.

The import takes 15 s on a slow core. The server's first process and, on a CPU, the engine process
(`vllm_private.fork_engine`) are forked from the fork server, which must start no thread. It leads
their session and process group, so Ctrl-C reaches only the supervisor.
"""

import importlib
import os
from contextlib import suppress

import setproctitle

from service import weights
from service.launch.run_folder import RunFolder

_MODULES = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.core",
    "service.api.plugin",
    "service.api.statistics",
)
_CPU_MODULES = ("service.models.cpu_executor", "vllm.v1.worker.cpu_worker")


def _import_vllm() -> None:
    from service import models

    for name in _MODULES:
        importlib.import_module(name)
    models.register()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for name in _CPU_MODULES:
            importlib.import_module(name)


def _fetch_in_background() -> None:
    """Fetch an embedded model in another process of this group, during the import.

    The server fetches it again: it then finds the files, waits for them, or reports the error.
    """
    if os.fork() == 0:
        if os.fork() == 0:  # a grandchild, which nobody has to wait for
            with suppress(Exception):
                deployment = RunFolder.of_this_process().read_deployment()
                if deployment.model.source.embedded:
                    weights.fetch(deployment.model.source, deployment.settings.cache_dir)
        os._exit(0)
    os.wait()


os.setsid()
setproctitle.setproctitle("chat-service fork server")
_fetch_in_background()
with suppress(Exception):  # the server fails on the same import and reports it
    _import_vllm()
