"""vLLM stat logger: batches Prometheus updates, notes progress."""

import asyncio
import os
from collections.abc import Iterable
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import PrometheusStatLogger

from service.api.watch import EngineProgress

# A batch is recorded after this time or this many steps.
_MAX_SECONDS = 1.0
_MAX_STEPS = 32


class Statistics(PrometheusStatLogger):  # type: ignore[misc]  # vLLM is not typed for us
    """Records vLLM's Prometheus metrics several steps at a time.

    After a step the CPU caches hold the model, so vLLM's code that records metrics runs slowly at
    first. A batch pays for that once.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        self._steps: list[tuple[Any, Any, Any, int]] = []
        self._usage = -1.0
        # With multiprocess metrics another process may answer the scrape: do not batch.
        self._max_steps = 1 if "PROMETHEUS_MULTIPROC_DIR" in os.environ else _MAX_STEPS
        REGISTRY.register(_BeforeScrape(self))  # before vLLM's collectors, so it is collected first
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
            EngineProgress.note()
        self._steps.append((scheduler_stats, iteration_stats, mm_cache_stats, engine_idx))
        if len(self._steps) >= self._max_steps:
            self.flush()
        elif len(self._steps) == 1:
            asyncio.get_running_loop().call_later(_MAX_SECONDS, self.flush)

    def flush(self) -> None:
        """Record the steps in the batch."""
        steps, self._steps = self._steps, []
        for step in steps:
            super().record(*step)


class _BeforeScrape(Collector):
    """Flushes the batch before a scrape; has no metrics itself."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        self._statistics.flush()
        return ()
