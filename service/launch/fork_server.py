"""Imported by the fork server alone, before it forks: what all processes of a server begin with.

Importing vLLM takes 15 s on a slow core. The server's first process and, on a CPU, the engine's
(`vllm_private.fork_engine`) are forked from this one, which has imported it once and started no
thread. It leads the session and the process group of them all, so Ctrl-C reaches only the
supervisor.
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
_CPU_MODULES = ("vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker")


def _import_vllm() -> None:
    from service import models

    for name in _MODULES:
        importlib.import_module(name)
    models.register()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for name in _CPU_MODULES:
            importlib.import_module(name)


def _fetch_meanwhile() -> None:
    """Fetch the embedded model beside the import, in a process of this group.

    The server fetches it again, and finds it, waits for it, or says why it cannot be had.
    """
    if os.fork() == 0:
        if os.fork() == 0:  # nobody waits for it
            with suppress(Exception):
                deployment = RunFolder.of_this_process().read_deployment()
                if deployment.model.source.embedded:
                    weights.fetch(deployment.model.source, deployment.settings.cache_dir)
        os._exit(0)
    os.wait()


os.setsid()
setproctitle.setproctitle("chat-service fork server")
_fetch_meanwhile()
with suppress(Exception):  # the process that needs it fails as well, and says why
    _import_vllm()
