"""Runs a CPU's single worker inside the engine process, on the cores that others leave free.

vLLM starts a process for the worker, whose threads use all cores but one, and the engine spins on
that core while it waits. In one process, threads use all cores: twice the tokens/s on 2 cores.
"""

import os
import time
from typing import Any

import psutil
from torch import get_num_threads, set_num_threads  # vLLM's worker replaces torch's own later
from vllm.v1.executor.uniproc_executor import UniProcExecutor

_SECONDS = 0.5  # between two looks at the machine


class CpuExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's executor, with as many OpenMP threads as there are free cores, at least one.

    OpenMP's threads wait for each other at each matrix product. Beside a busy program one of them
    waits for a core, and the others spin: two threads on two cores keep a quarter of their speed,
    one thread keeps more than half. `OMP_NUM_THREADS` limits the threads.
    """

    def _init_executor(self) -> None:
        self._limit = get_num_threads()
        self._looked, self._usable = time.monotonic(), _usable_seconds()
        super()._init_executor()

    def collective_rpc(self, *args: Any, **kwargs: Any) -> Any:
        """Let the worker do something; mostly it is a step of the model."""
        passed = time.monotonic() - self._looked
        if passed > _SECONDS and self._limit > 1:
            usable = _usable_seconds()
            cores = (usable - self._usable) / passed
            set_num_threads(max(1, min(self._limit, round(cores))))
            self._looked, self._usable = self._looked + passed, usable
        return super().collective_rpc(*args, **kwargs)


def _usable_seconds() -> float:
    """Return the time for which this process used a core, or could have: it was idle."""
    cores = psutil.cpu_times(percpu=True)
    # Numbers are those of the cores unless one is offline.
    allowed = [n for n in os.sched_getaffinity(0) if n < len(cores)]
    own = os.times()
    idle: float = sum(cores[n].idle + cores[n].iowait for n in allowed)
    return own.user + own.system + idle
