"""Clients that ask a cluster again and again, and count what they get."""

import asyncio
import json
import threading
from collections import Counter
from types import TracebackType
from typing import Self

import httpx

PATIENCE = 600  # seconds for one answer
# What each request of a `Load` is counted as when it was answered in full.
ANSWERED = {"plain 200", "stream 200"}
# What a stream may be counted as whose replica was lost.
ENDED = "stream 503"


class Load:
    """Half of the clients ask for streams. They run in a thread, in its network, until the end."""

    def __init__(
        self, url: str, clients: int = 24, key: str | None = None, pause: float = 0
    ) -> None:
        """`pause` is how long each client keeps its connection idle after an answer, in seconds."""
        self.counts: Counter[str] = Counter()
        self._url = url
        self._clients = clients
        self._pause = pause
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=None)
        async with (
            httpx.AsyncClient(
                timeout=PATIENCE, trust_env=False, headers=self._headers, limits=limits
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            for number in range(self._clients):
                group.create_task(self._one(client, stream=number % 2 == 1))

    async def _one(self, client: httpx.AsyncClient, *, stream: bool) -> None:
        body = {"prompt": "Tell me about France.", "max_new_tokens": 16, "stream": stream}
        kind = "stream" if stream else "plain"
        while not self._stop.is_set():
            try:
                response = await client.post(self._url, json=body)
                status = response.status_code
                if stream and status == 200:  # what the last event says
                    event = response.text.rstrip().rpartition("data: ")[2]
                    status = json.loads(event).get("status")
                self.counts[f"{kind} {status}"] += 1
            except httpx.HTTPError as e:
                self.counts[f"{kind} {type(e).__name__}"] += 1
            await asyncio.sleep(self._pause)
