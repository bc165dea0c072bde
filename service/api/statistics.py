"""What vLLM's engine tells of each of its steps: that it makes progress, and vLLM's own metrics."""

import asyncio
import os
from collections.abc import Iterable
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import PrometheusStatLogger

from service.api.watch import EngineProgress

# Steps are kept for so long, and so many of them.
_MAX_SECONDS = 1.0
_MAX_STEPS = 32


class Statistics(PrometheusStatLogger):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's Prometheus metrics, recorded some steps at a time; by vLLM's StatLogger protocol.

    After each step the processor's caches hold the model, and what vLLM runs to record one step is
    slow to come back. For several steps it comes once.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        self._steps: list[tuple[Any, Any, Any, int]] = []
        self._usage = -1.0
        # Where another process may be the one that is asked for our metrics, none may wait.
        self._most_steps = 1 if "PROMETHEUS_MULTIPROC_DIR" in os.environ else _MAX_STEPS
        REGISTRY.register(_BeforeScrape(self))  # vLLM's come after it
        super().__init__(vllm_config, engine_indexes)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        usage = self._usage if scheduler_stats is None else scheduler_stats.kv_cache_usage
        tokens = iteration_stats is not None and iteration_stats.num_generation_tokens
        if tokens or usage != self._usage:
            self._usage = usage
            EngineProgress.made()
        self._steps.append((scheduler_stats, iteration_stats, mm_cache_stats, engine_idx))
        if len(self._steps) >= self._most_steps:
            self.flush()
        elif len(self._steps) == 1:
            asyncio.get_running_loop().call_later(_MAX_SECONDS, self.flush)

    def flush(self) -> None:
        """Record the steps that are not recorded yet."""
        steps, self._steps = self._steps, []
        for step in steps:
            super().record(*step)


class _BeforeScrape(Collector):
    """Has no metrics; asked for them, it brings the others up to date."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        self._statistics.flush()
        return ()
