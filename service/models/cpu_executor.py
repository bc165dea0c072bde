"""Runs a CPU's single worker inside the engine process, on the cores that others leave free.

vLLM starts a process for the worker, whose threads use all cores but one, and the engine spins on
that core while it waits. In one process, threads use all cores: twice the tokens/s on 2 cores.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import psutil
from torch import get_num_threads, set_num_threads  # vLLM's worker replaces torch's own later
from vllm.v1.executor.uniproc_executor import UniProcExecutor

_SECONDS = 0.5  # between two looks at the machine
_LASTING = 1.0  # seconds for which a core must be taken; a burst of requests takes one for less
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container
# Read before OpenMP binds this thread to one core (OMP_PROC_BIND).
_CORES = os.sched_getaffinity(0)


class CpuExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's executor, with as many OpenMP threads as there are free cores, at least one.

    OpenMP's threads wait for each other at each matrix product. Beside a busy program one of them
    waits for a core, and the others spin: two threads on two cores keep a quarter of their speed,
    one thread keeps more than half. `OMP_NUM_THREADS` limits the threads, and so does a container's
    quota of cores.
    """

    def _init_executor(self) -> None:
        self._before = get_num_threads()
        self._limit = max(1, math.floor(min(self._before, _quota())))
        set_num_threads(self._limit)
        self._looked = self._enough = time.monotonic()
        self._usable, self._counted = _seconds()
        super()._init_executor()

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        """Let the worker do something; mostly it is a step of the model."""
        passed = time.monotonic() - self._looked
        if passed > _SECONDS and self._limit > 1:
            usable, counted = _seconds()
            if counted > self._counted:  # in some sandboxes the machine's times stand still
                cores = (usable - self._usable) / passed
                self._compute_with(max(1, min(self._limit, round(cores))))
            self._looked, self._usable, self._counted = self._looked + passed, usable, counted
        return super().collective_rpc(*args, **kwargs)

    def _compute_with(self, threads: int) -> None:
        """Take more threads at once, and fewer when cores have been taken for `_LASTING`."""
        now = time.monotonic()
        if threads >= get_num_threads() or now - self._enough > _LASTING:
            set_num_threads(threads)
            self._enough = now  # the last time when the threads had their cores

    def shutdown(self) -> None:
        super().shutdown()
        set_num_threads(self._before)  # for the next engine of this process


def _quota() -> float:
    """Return how many cores this container may keep busy."""
    try:
        allowed, period = _QUOTA.read_text().split()
        return int(allowed) / int(period)
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return math.inf


def _seconds() -> tuple[float, float]:
    """Return (seconds that this process computed or its cores were idle, seconds counted on all
    cores)."""
    cores = psutil.cpu_times(percpu=True)
    # Numbers are those of the cores unless one is offline.
    allowed = [n for n in _CORES if n < len(cores)]
    own = os.times()
    idle: float = sum(cores[n].idle + cores[n].iowait for n in allowed)
    return own.user + own.system + idle, sum(map(sum, cores))
