"""Limits by client: requests and tokens a minute, on all generating routes together.

Token buckets in memory: each API process has its own, with its part of the limits.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.api import metrics
from service.clients import Client
from service.errors import RateLimited

# A request needs 1 in each bucket. This is 1 less the rounding error of a float.
_ENOUGH = 0.999


@dataclass(slots=True)
class _Bucket:
    level: float
    filled: float  # clock time


class RateLimits:
    """A bucket for each limit of a client. It holds what a minute allows, and fills evenly.

    A request is let in when each bucket holds 1. It takes 1 from that of requests at once, and the
    tokens that it used at its end, when they are known: that bucket may fall below 0. Buckets are
    kept by name, so a file of keys that changes leaves them as they are.
    """

    def __init__(self, processes: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._processes = processes
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def check(self, client: Client) -> None:
        """Count a request that begins. Raises RateLimited if a limit of its client is used up."""
        waits = []
        for kind, limit in (
            ("requests", client.requests_per_minute),
            ("tokens", client.tokens_per_minute),
        ):
            if limit is not None:
                level = self._fill(client.name, kind, limit).level
                if level < _ENOUGH:
                    waits.append(((1 - level) / self._per_second(limit), kind, limit))
        if waits:
            seconds, kind, limit = max(waits)
            metrics.REFUSED.labels("rate_limited").inc()
            raise RateLimited(
                f"this key's limit {kind}={limit}/min is used up; come back after the seconds in "
                "the header Retry-After",
                retry_after=math.ceil(seconds),
            )
        if client.requests_per_minute is not None:
            self._buckets[client.name, "requests"].level -= 1

    def spend(self, client: Client, tokens: int) -> None:
        """Take what a request used, at its end."""
        if client.tokens_per_minute is not None:
            self._fill(client.name, "tokens", client.tokens_per_minute).level -= tokens

    def _fill(self, name: str, kind: str, limit: int) -> _Bucket:
        """Return a bucket as it is now."""
        now = self._clock()
        capacity = max(1.0, limit / self._processes)
        bucket = self._buckets.setdefault((name, kind), _Bucket(capacity, now))
        filled = bucket.level + (now - bucket.filled) * self._per_second(limit)
        bucket.level, bucket.filled = min(capacity, filled), now
        return bucket

    def _per_second(self, limit: int) -> float:
        return limit / self._processes / 60
