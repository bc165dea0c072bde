"""How many threads a CPU's engine computes with."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import set_num_threads  # vLLM replaces it in this process later
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from service.models import cpu_executor


@pytest.mark.parametrize(
    ("limit", "usable", "threads"),
    [
        (8, 8.0, 8),
        (8, 6.9, 7),  # another program takes one core
        (8, 0.2, 1),
        (4, 8.0, 4),  # OMP_NUM_THREADS
        (1, 8.0, 1),
    ],
)
def test_as_many_threads_compute_as_cores_are_free(
    monkeypatch: pytest.MonkeyPatch, limit: int, usable: float, threads: int
) -> None:
    now = [100.0, 0.0]  # the time, and the seconds that were usable
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cpu_executor, "_usable_seconds", lambda: now[1])
    before = torch.get_num_threads()
    set_num_threads(limit)

    def init(self: Any) -> None:
        self.driver_worker = SimpleNamespace(step=torch.get_num_threads)

    monkeypatch.setattr(UniProcExecutor, "_init_executor", init)
    try:
        executor = cpu_executor.CpuExecutor.__new__(cpu_executor.CpuExecutor)
        executor._init_executor()
        assert executor.collective_rpc("step") == [limit]
        now[:] = 102.0, 2 * usable
        assert executor.collective_rpc("step") == [threads]
        now[:] = 103.0, 2 * usable + limit
        assert executor.collective_rpc("step") == [limit]  # they are free again
    finally:
        set_num_threads(before)
