"""Imported by the fork server alone, before it forks: what all processes of a server begin with.

Importing vLLM takes 15 s on a slow core. The server's first process and, on a CPU, the engine's
(`vllm_private.fork_engine`) are forked from this one, which has imported it once and started no
thread. It leads the session and the process group of them all, so Ctrl-C reaches only the
supervisor.
"""

import os
from contextlib import suppress

import setproctitle

os.setsid()
setproctitle.setproctitle("chat-service fork server")
with suppress(Exception):  # the process that needs it fails as well, and says why
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    from service import models

    models.register()
