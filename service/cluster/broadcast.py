"""Asks all replicas of a deployment at once, over Ray Serve's handles."""

import asyncio
from typing import Any

from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

_SECONDS = 5.0


async def answers(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> list[Any]:
    """Call a method of each replica; return the answers that come in time.

    Ray calls `broadcast` alpha. Its `results` are none when one replica is late.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            replicas = await handle.broadcast(method, *arguments)._fetch_replica_results_async()
    except (RayServeException, TimeoutError):  # none is up
        return []
    results = await asyncio.gather(
        *(asyncio.wait_for(replica.get_async(), _SECONDS) for replica in replicas),
        return_exceptions=True,
    )
    return [result for result in results if not isinstance(result, BaseException)]
