"""What happens at SIGTERM in an API process: a queue with requests, and no engine."""

import asyncio
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import uvicorn
from starlette.types import Message

from service.api.admission import Admission
from service.api.application import Host
from service.api.cancellation import Cancellations
from service.api.health import Health
from service.api.state import ServiceState
from service.api.watch import Watch
from service.clients import Client
from service.errors import Unavailable
from service.launch.run_folder import RunFolder
from service.phase import Phase
from service.settings import Settings
from tests.conftest import hardening

SECONDS = 0.5  # to drain


@hardening(21)
@pytest.mark.parametrize(("signals", "waits"), [(1, True), (2, False)])
def test_what_does_not_finish_in_its_time_is_ended(signals: int, waits: bool) -> None:
    async def scenario() -> None:
        admission, cancellations = Admission(1, 1, 60), Cancellations()
        health = Health(10, 600)
        server = SimpleNamespace(should_exit=False)
        service = SimpleNamespace(
            engine_client=None,
            health=health,
            admission=admission,
            cancellations=cancellations,
            reload_keys=lambda: None,
            deployment=SimpleNamespace(settings=Settings(drain_timeout=SECONDS)),
            host=Host(),
        )
        watch = Watch(cast(ServiceState, service), cast(uvicorn.Server, server))

        async def stay() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        async def request() -> None:
            async with cancellations.watch(stay, None), admission.slot(Client()):
                await asyncio.Event().wait()

        requests = [asyncio.create_task(request()) for _ in range(2)]
        await asyncio.sleep(0)
        assert (admission.running, admission.waiting) == (1, 1)
        began = time.monotonic()
        for _ in range(signals):
            watch._on_sigterm()
            await asyncio.sleep(0)
        assert health.phase is Phase.DRAINING
        for ended in await asyncio.gather(*requests, return_exceptions=True):
            assert isinstance(ended, Unavailable) and ended.retry_after == 5
        assert (time.monotonic() - began >= SECONDS) == waits
        assert server.should_exit

    asyncio.run(scenario())


def test_a_run_folder_that_somebody_removes_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        folder.beat()
        folder.mark_progress()
        assert list(folder.beats()) == [str(os.getpid())] and folder.progress()
        shutil.rmtree(folder.path)
