"""Runs in each API process that serves: watches the engine, drains at SIGTERM, ends on failure."""

import asyncio
import logging
import os
import signal
import time
from contextlib import ExitStack, suppress

import psutil

from service.api.application import Server
from service.api.state import ServiceState
from service.errors import EngineDead, Unavailable
from service.phase import Phase

_logger = logging.getLogger("service")

_CHECK_INTERVAL = 1.0  # seconds


class EngineProgress:
    """The time of the last token or change of cache usage; `statistics` notes it."""

    last = 0.0

    @classmethod
    def note(cls) -> None:
        cls.last = time.monotonic()


class Watch:
    """Checks the engine every second, and handles SIGTERM and SIGINT."""

    def __init__(self, service: ServiceState, server: Server) -> None:
        self.engine = service.engine_client
        self.health = service.health
        self.admission = service.admission
        self.cancellations = service.cancellations
        self.settings = service.deployment.settings
        self.server = server
        self._host = service.host
        self._reload_keys = service.reload_keys
        self._stopping = False
        self._drain_task: asyncio.Task[None] | None = None
        self._ping: asyncio.Task[bool] | None = None
        self._engines: list[psutil.Process] = []
        self._cpu_seconds = 0.0
        self._logged_step_seconds = 0.0
        self._progress = 0  # `Host.progress` at the last check

    async def run(self) -> None:
        """Watch until cancelled, or until the engine has failed."""
        loop = asyncio.get_running_loop()
        if self._host.handles_signals:
            # Replace vLLM's handlers, which stop the engine before requests have finished.
            loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
            loop.add_signal_handler(signal.SIGINT, self._stop)
        self._engines = _engine_processes(self._host.engine_ancestor())
        with ExitStack() as stack:
            # With several API processes, vLLM reports a dead engine only to their parent.
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
                    self._check()
                    failed = False
                except Exception:  # such as no file descriptor left to read /proc
                    if not failed:
                        _logger.exception("looking at the engine failed; it is tried again")
                    failed = True
                await asyncio.sleep(_CHECK_INTERVAL)

    def _on_engine_end(self) -> None:
        if not self._stopping and self.health.phase is not Phase.FAILED:
            self._fail("the engine process has ended")

    def _check(self) -> None:
        self._reload_keys()
        since_progress = time.monotonic() - EngineProgress.last
        if since_progress < _CHECK_INTERVAL:
            self.health.answered()  # cheaper than a call to the engine
        else:
            if self._ping is None or self._ping.done():
                if self._ping and not self._ping.cancelled():
                    if self._ping.exception() is None:
                        self.health.answered()
                self._ping = asyncio.create_task(self.engine.is_paused())
            if self.admission.running or self.health.step_seconds:
                self._check_cpu()
        if since_progress < 2 * _CHECK_INTERVAL:
            self._host.mark_progress()
        last, self._progress = self._progress, self._host.progress()
        if not self.admission.running or last != self._progress:
            self.health.progressed()
        last_phase = self.health.phase
        phase = self.health.update()
        if phase is Phase.READY and self.health.step_seconds:
            self.admission.extend(_CHECK_INTERVAL)
        if phase is last_phase:
            return
        if phase is Phase.STALLED and self._host.replaceable:
            self._fail("the engine makes no progress")
        elif phase is Phase.STALLED:
            _logger.error("the engine makes no progress; what waits for it is answered with 503")
            error = Unavailable("the engine makes no progress", retry_after=10)
            self.admission.close(error)
            self.cancellations.end_all(error)
        elif phase is Phase.READY:
            _logger.warning("the engine makes progress again")
            self.admission.open()
        elif phase is Phase.FAILED:
            self._fail("the engine has stopped making progress")

    def _check_cpu(self) -> None:
        """Report CPU use of the engine to `health`; log a step that takes long."""
        cpu_seconds = self._engine_cpu_seconds()
        computes = cpu_seconds is None or cpu_seconds - self._cpu_seconds > _CHECK_INTERVAL / 20
        if computes:
            self.health.computed()
        self._cpu_seconds = cpu_seconds or 0.0
        seconds = self.health.step_seconds or 0.0
        if seconds < self._logged_step_seconds:  # a new step
            self._logged_step_seconds = 0.0
        if computes and seconds > max(self.settings.stall_timeout, 2 * self._logged_step_seconds):
            self._logged_step_seconds = seconds
            _logger.warning(
                "the engine has been at one step for %.0f s, and computes: a long prompt on a slow "
                "processor takes that; requests wait",
                seconds,
            )

    def _on_sigterm(self) -> None:
        if self._drain_task:
            self._stop()
        else:
            self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Finish accepted requests, refuse new ones, and stop."""
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
        """End all requests with an error, and make uvicorn exit, which ends vLLM."""
        self._stopping = True
        self.health.drain()
        error = Unavailable("the server is stopping", retry_after=5)
        self.admission.close(error)
        self.cancellations.end_all(error)
        self.server.should_exit = True

    def _fail(self, reason: str) -> None:
        _logger.error("%s; this server ends", reason)
        self.health.fail()
        error = EngineDead(reason)
        self.admission.close(error)
        self.cancellations.end_all(error)
        self._host.report_failure(f"{reason}; start it again")
        self.server.should_exit = True

    def _engine_cpu_seconds(self) -> float | None:
        """Return the CPU time of the engine's processes, or None if none run on this machine."""
        if not self._engines:
            return None
        total = 0.0
        with suppress(psutil.Error):
            for engine in self._engines:
                for process in (engine, *engine.children(recursive=True)):
                    times = process.cpu_times()
                    total += times.user + times.system
                    total += times.children_user + times.children_system  # ended compilers
        return total


def _engine_processes(ancestor: int) -> list[psutil.Process]:
    """Find this run's engine processes on this machine, by the process title that vLLM sets."""
    engines = []
    for process in psutil.Process(ancestor).children(recursive=True):
        with suppress(psutil.Error):
            if "EngineCore" in " ".join(process.cmdline()):
                engines.append(process)
    return engines
