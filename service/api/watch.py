"""From ready to the end, in each API process: watches the engine, drains at SIGTERM, gives up."""

import asyncio
import logging
import os
import signal
import time
from contextlib import ExitStack, suppress

import psutil
import uvicorn
from vllm.engine.protocol import EngineClient

from service.api.admission import Admission
from service.api.application import Host
from service.api.cancellation import Cancellations
from service.api.health import Health
from service.api.keys import Keys
from service.errors import Unavailable
from service.phase import Phase
from service.settings import Settings

_logger = logging.getLogger("service")

_LOOK_EVERY = 1.0  # seconds


class EngineProgress:
    """When the engine last made a token or filled its cache; vLLM's statistics tell it."""

    last = 0.0

    @classmethod
    def made(cls) -> None:
        cls.last = time.monotonic()


class Watch:
    """One API process's watch over its engine and over the wish to stop."""

    def __init__(
        self,
        engine: EngineClient,
        health: Health,
        admission: Admission,
        cancellations: Cancellations,
        keys: Keys | None,
        settings: Settings,
        server: uvicorn.Server,
        host: Host,
    ) -> None:
        self.engine = engine
        self.health = health
        self.admission = admission
        self.cancellations = cancellations
        self.keys = keys
        self.settings = settings
        self.server = server
        self._stopping = False
        self._draining: asyncio.Task[None] | None = None
        self._question: asyncio.Task[bool] | None = None
        self._engines: list[psutil.Process] = []
        self._cpu_seconds = 0.0
        self._host = host
        self._told_step_seconds = 0.0
        self._progress = 0  # when a process of this run last saw some

    async def run(self) -> None:
        """Watch until cancelled, or until the engine has failed."""
        loop = asyncio.get_running_loop()
        if self._host.handles_signals:
            # In place of vLLM's, which stop the engine under those who wait for it.
            loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
            loop.add_signal_handler(signal.SIGINT, self._stop)
        self._engines = _engine_processes(self._host.engine_ancestor())
        with ExitStack() as stack:
            # With several API processes, vLLM tells only their parent that the engine is dead.
            for engine in self._engines:
                descriptor = os.pidfd_open(engine.pid)  # readable when the process has ended
                stack.callback(os.close, descriptor)
                loop.add_reader(descriptor, self._on_engine_end)
                stack.callback(loop.remove_reader, descriptor)
            failed = False
            while self.health.phase is not Phase.FAILED:
                try:
                    self._host.beat()
                    if self.engine.errored:
                        self._on_engine_end()
                    self._look()
                    failed = False
                except Exception:  # such as no file descriptor left for a look at /proc
                    if not failed:
                        _logger.exception("looking at the engine failed; it is tried again")
                    failed = True
                await asyncio.sleep(_LOOK_EVERY)

    def _on_engine_end(self) -> None:
        if not self._stopping and self.health.phase is not Phase.FAILED:
            self._fail("the engine process has ended")

    def _look(self) -> None:
        if self.keys:
            self.keys.reload()
        since_progress = time.monotonic() - EngineProgress.last
        if since_progress < _LOOK_EVERY:
            self.health.answered()  # a question would cost more
        else:
            if self._question is None or self._question.done():
                if self._question and not self._question.cancelled():
                    if self._question.exception() is None:
                        self.health.answered()
                self._question = asyncio.create_task(self.engine.is_paused())
            if self.admission.running or self.health.step_seconds:
                self._look_for_computing()
        if since_progress < 2 * _LOOK_EVERY:
            self._host.mark_progress()
        before, self._progress = self._progress, self._host.progress()
        if not self.admission.running or before != self._progress:
            self.health.progressed()
        was = self.health.phase
        phase = self.health.look()
        if phase is was:
            return
        if phase is Phase.STALLED:
            _logger.error("the engine makes no progress; what waits for it is answered with 503")
            error = Unavailable("the engine makes no progress", retry_after=10)
            self.admission.close(error)
            self.cancellations.end_all(error)
        elif phase is Phase.READY:
            _logger.warning("the engine makes progress again")
            self.admission.open()
        elif phase is Phase.FAILED:
            self._fail("the engine has stopped making progress")

    def _look_for_computing(self) -> None:
        """Tell `health` whether the engine computes, and the log when it does so for long."""
        cpu_seconds = self._engine_cpu_seconds()
        if cpu_seconds is None or cpu_seconds - self._cpu_seconds > _LOOK_EVERY / 20:
            self.health.computed()
        self._cpu_seconds = cpu_seconds or 0.0
        seconds = self.health.step_seconds or 0.0
        if seconds < self._told_step_seconds:  # another step
            self._told_step_seconds = 0.0
        if seconds > max(self.settings.stall_timeout, 2 * self._told_step_seconds):
            self._told_step_seconds = seconds
            _logger.warning("the engine has been at one step for %.0f s; requests wait", seconds)

    def _on_sigterm(self) -> None:
        if self._draining:
            self._stop()
        else:
            self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Finish what was let in, refuse the rest, and stop."""
        timeout = self.settings.drain_timeout
        _logger.info(
            "Stopping: %d sequences run and %d wait; they have %g s (ask again to stop at once)",
            self.admission.running,
            self.admission.waiting,
            timeout,
        )
        self.health.drain()
        self.admission.close(Unavailable("the server is stopping", retry_after=5))
        try:
            async with asyncio.timeout(timeout):
                await self.admission.idle()
        except TimeoutError:
            _logger.warning("%d sequences did not finish in time", self.admission.running)
        self._stop()

    def _stop(self) -> None:
        """Answer those who still wait, and let uvicorn end, which ends vLLM."""
        self._stopping = True
        self.health.drain()
        error = Unavailable("the server is stopping", retry_after=5)
        self.admission.close(error)
        self.cancellations.end_all(error)
        self.server.should_exit = True

    def _fail(self, reason: str) -> None:
        _logger.error("%s; this server ends", reason)
        self.health.fail()
        error = Unavailable(f"{reason}; the server is restarting", retry_after=5)
        self.admission.close(error)
        self.cancellations.end_all(error)
        self._host.report_failure(reason)
        self.server.should_exit = True

    def _engine_cpu_seconds(self) -> float | None:
        """CPU time of the engine's processes on this machine; None when there are none here."""
        if not self._engines:
            return None
        total = 0.0
        with suppress(psutil.Error):
            for engine in self._engines:
                for process in (engine, *engine.children(recursive=True)):
                    times = process.cpu_times()
                    total += times.user + times.system
                    total += times.children_user + times.children_system  # compilers that ended
        return total


def _engine_processes(ancestor: int) -> list[psutil.Process]:
    """vLLM's engine processes of this run on this machine, by the title that it gives them."""
    engines = []
    for process in psutil.Process(ancestor).children(recursive=True):
        with suppress(psutil.Error):
            if "EngineCore" in " ".join(process.cmdline()):
                engines.append(process)
    return engines
