"""How many threads a CPU's engine computes with."""

import os
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import set_num_threads  # vLLM replaces it in this process later
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from service.models import cpu_executor


class Machine:
    """Its time, the seconds that were usable, and all that it has counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.usable, self.counted = 100.0, 0.0, 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(cpu_executor, "_seconds", lambda: (self.usable, self.counted))

    def passes(self, seconds: float, cores: float) -> None:
        self.now += seconds
        self.usable += seconds * cores
        self.counted += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """A machine without a quota, on which an engine's worker only tells its number of threads."""

    def init(self: Any) -> None:
        worker = SimpleNamespace(step=torch.get_num_threads, shutdown=lambda: None)
        self.driver_worker = worker

    monkeypatch.setattr(UniProcExecutor, "_init_executor", init)
    monkeypatch.setattr(cpu_executor, "_QUOTA", tmp_path / "cpu.max")
    before = torch.get_num_threads()
    yield Machine(monkeypatch)
    set_num_threads(before)


def started() -> cpu_executor.CpuExecutor:
    executor = cpu_executor.CpuExecutor.__new__(cpu_executor.CpuExecutor)
    executor._init_executor()
    return executor


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
    machine: Machine, limit: int, usable: float, threads: int
) -> None:
    set_num_threads(limit)
    executor = started()
    assert executor.collective_rpc("step") == [limit]
    machine.passes(2, usable)
    assert executor.collective_rpc("step") == [threads]
    machine.passes(1, limit)
    assert executor.collective_rpc("step") == [limit]  # they are free again


def test_a_core_that_is_taken_for_a_moment_costs_no_thread(machine: Machine) -> None:
    set_num_threads(2)
    executor = started()
    for seconds, cores, threads in [
        (10, 1.98, 2),
        (0.6, 1.2, 2),  # a burst of requests: the API process renders them
        (0.6, 1.9, 2),
        (0.6, 1.2, 2),
        (0.6, 1.1, 1),  # it lasts
        (0.6, 1.4, 1),
        (0.6, 1.9, 2),
        (3, 1.0, 1),  # a step, which two threads on one core take so long for
    ]:
        machine.passes(seconds, cores)
        assert executor.collective_rpc("step") == [threads], (seconds, cores)


def test_an_engine_leaves_the_next_one_the_threads_that_it_found(machine: Machine) -> None:
    set_num_threads(4)
    first = started()
    machine.passes(2, 1)
    assert first.collective_rpc("step") == [1]
    first.shutdown()
    assert started().collective_rpc("step") == [4]


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 4), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1)],
)
def test_a_containers_quota_limits_the_threads(machine: Machine, quota: str, threads: int) -> None:
    cpu_executor._QUOTA.write_text(f"{quota}\n")
    set_num_threads(4)
    executor = started()
    assert executor.collective_rpc("step") == [threads]
    machine.passes(2, 4)
    assert executor.collective_rpc("step") == [threads]
    executor.shutdown()
    assert torch.get_num_threads() == 4


def test_where_the_machines_times_stand_still_nothing_is_changed(machine: Machine) -> None:
    set_num_threads(4)
    executor = started()
    machine.now += 2
    machine.usable += 1  # of this process itself
    assert executor.collective_rpc("step") == [4]


def test_a_thread_that_is_bound_to_a_core_counts_all_of_its_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = namedtuple("times", "user idle iowait")
    monkeypatch.setattr(cpu_executor, "_CORES", {0, 1})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [times(1, 30, 4), times(2, 500, 6)] * 2)
    own = os.times()
    usable, counted = cpu_executor._seconds()
    assert usable - own.user - own.system == pytest.approx(540, abs=1)
    assert counted == 2 * 543
