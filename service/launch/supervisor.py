"""`serve`: runs the server as a child process, answers until it is ready, reports how it ended.

The child and its processes are one process group without a terminal. So Ctrl-C reaches only the
supervisor, which stops them in the right order.
"""

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import setproctitle

from service import vllm_arguments
from service.api.application import Deployment
from service.errors import ConfigError, LaunchError, ServiceError
from service.launch import environment, server
from service.launch.listener import listener_of, ready_message, warn_if_open
from service.launch.progress_server import ProgressServer
from service.launch.run_folder import RunFolder
from service.model_config import ModelConfig, Origins
from service.phase import PATIENCE, Phase
from service.settings import Settings

# How long the server has to end after a signal, or after it has reported a failure.
_GRACE_SECONDS = 10
_CHECK_INTERVAL = 0.2  # seconds
_MIN_SILENCE = 5.0  # seconds; a busy machine may delay a process this long
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Bytes. A socket's path has at most 107, and vLLM's file names take 37.
_MAX_TEMPORARY_FOLDER = 70
_FORK_SERVER_GONE = 255  # multiprocessing's exit code when the fork server has died


def serve(config: ModelConfig, origins: Origins, settings: Settings) -> None:
    """Run the server until it is stopped. Raises ServiceError if it cannot start, or fails."""
    clients = settings.clients()
    environment.check()
    _, max_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))  # one per connection
    _check_temporary_folder()
    listener = listener_of(settings)
    warn_if_open(listener, settings, keyed=clients is not None)
    if not settings.verbose:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    with tempfile.TemporaryDirectory(prefix="chat-service-") as path:
        folder = RunFolder(Path(path))
        deployment = Deployment(
            model=config,
            settings=settings,
            clients=None if clients is None else dict(clients),
            instance=uuid.uuid4().hex,
        )
        folder.write_deployment(deployment)
        tls = _tls(config, origins)
        progress = ProgressServer(
            listener,
            tls,
            folder,
            config.name,
            deployment.instance,
            vllm_arguments.root_path(config),
        )
        progress.start()
        environment.prepare(folder, settings)
        print(f"Starting {config.name}; vLLM takes a while to import ...", file=sys.stderr)
        sys.stderr.flush()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["service.launch.fork_server"])
        process = context.Process(
            target=_run_server, args=(path, origins, listener), name="MainProcess"
        )
        url = settings.url(tls=tls is not None)
        adapter = config.default_adapter
        who = f"{adapter}, on {config.name}," if adapter else config.name
        ready = ready_message(f"{who} answers", url, keyed=clients is not None)
        _Supervisor(process, folder, progress, ready, settings).run()


def _announce(message: str) -> None:
    """Print a message. If the reader of stdout has ended, drop it; the server goes on."""
    try:
        print(message, flush=True)
    except OSError:
        # What the buffer holds would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _StoppedEarly(Exception):
    """Raised by a signal while the fork server imports vLLM."""


class _Supervisor:
    """One run of the server process."""

    def __init__(
        self,
        server: "multiprocessing.context.ForkServerProcess",
        folder: RunFolder,
        progress: ProgressServer,
        ready_message: str,
        settings: Settings,
    ) -> None:
        self.ready_message: str | None = ready_message
        self.drain_timeout = settings.drain_timeout
        self.max_silence = max(settings.stall_timeout * PATIENCE, _MIN_SILENCE)
        self.server = server
        self.folder = folder
        self.progress = progress
        self.group: int | None = None  # process group of the server, once it exists
        self.stop_signals = 0
        self.kill_at: float | None = None
        self._beats: dict[str, int] = {}
        # By pid of the API process.
        self._silent_seconds: defaultdict[str, float] = defaultdict(float)

    def run(self) -> None:
        """Wait for the server to end. Raises LaunchError unless a signal stopped it."""
        old_handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        try:
            for number in _STOP_SIGNALS:
                signal.signal(number, self._on_signal)
            self._start()
            while not multiprocessing.connection.wait([self.server.sentinel], _CHECK_INTERVAL):
                self._check_beats()
                if self.ready_message and self.folder.phase()[0] is Phase.READY:
                    _announce(self.ready_message)
                    self.ready_message = None
                if self.kill_at is None and self.folder.failure():
                    self.kill_at = time.monotonic() + _GRACE_SECONDS
                if self.kill_at is not None and time.monotonic() > self.kill_at:
                    self._signal_all(signal.SIGKILL)
            self._signal_all(signal.SIGKILL)  # remaining processes
            self.server.join()
            if self.group:
                with suppress(ChildProcessError):
                    os.waitpid(self.group, 0)  # reap the fork server
        except _StoppedEarly:
            for process in psutil.Process().children():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the fork server leads its group
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
        self._report_end()

    def _start(self) -> None:
        """Start the server. Blocks until the fork server has imported vLLM. Raises LaunchError."""
        try:
            self.server.start()
            self.group = os.getpgid(self.server.pid or 0)
        except (EOFError, OSError):
            raise LaunchError(
                "the process that imports vLLM has ended; when the system killed it for lack of "
                "memory, stop what else uses it"
            ) from None

    def _check_beats(self) -> None:
        """Kill the server if an API process hangs, because its connections hang too.

        Silence is counted in checks, not by the clock: if the whole service was suspended, so was
        this loop.
        """
        last_beats, self._beats = self._beats, self.folder.beats()
        if self.stop_signals or self.kill_at is not None:
            return
        for process, beat in self._beats.items():
            if beat != last_beats.get(process):
                self._silent_seconds[process] = 0
            self._silent_seconds[process] += _CHECK_INTERVAL
            if self._silent_seconds[process] > self.max_silence:
                self.folder.report_failure("the API process has hung; start it again")
                self.kill_at = time.monotonic()

    def _report_end(self) -> None:
        status = self.server.exitcode or 0
        if failure := self.folder.failure():
            raise LaunchError(failure)
        if self.stop_signals:
            print("Stopped.", file=sys.stderr)
        elif status == _FORK_SERVER_GONE:
            raise LaunchError("the server's processes were killed; start it again")
        elif status < 0:
            name = signal.Signals(-status).name
            raise LaunchError(f"the server process was killed by {name}; start it again")
        elif status:
            raise SystemExit(status)  # the server has printed the reason
        else:
            raise LaunchError("the server ended though nobody asked it to; start it again")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signals += 1
        if self.group is None:
            if self.stop_signals == 1:
                raise _StoppedEarly
            return
        if not self.progress.handed_over:
            self.kill_at = time.monotonic()  # no requests to finish: `run` kills at once
            return
        if self.stop_signals > 2:
            self._signal_all(signal.SIGKILL)
        elif number == signal.SIGTERM and self.stop_signals == 1:
            if self.server.pid:
                with suppress(ProcessLookupError):
                    os.kill(self.server.pid, signal.SIGTERM)  # drains
                self.kill_at = time.monotonic() + self.drain_timeout + 2 * _GRACE_SECONDS
        else:
            self._signal_all(signal.SIGINT)
            self.kill_at = time.monotonic() + _GRACE_SECONDS

    def _signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the run, including the fork server."""
        if self.group:
            with suppress(ProcessLookupError):
                os.killpg(self.group, number)


def _run_server(path: str, origins: Origins, listener: socket.socket) -> None:
    """Main function of the server process."""
    setproctitle.setproctitle("chat-service server")
    supervisor = multiprocessing.parent_process()
    assert supervisor is not None
    folder = RunFolder(Path(path))
    threading.Thread(target=_follow, args=(supervisor, folder), daemon=True).start()
    try:
        server.run(folder, origins, listener)
    except ServiceError as e:
        if not folder.failure():  # else the supervisor reports it
            print(e.lines(), file=sys.stderr)
        raise SystemExit(e.exit_status) from None


def _follow(supervisor: Any, folder: RunFolder) -> None:
    """Wait for the supervisor to die, then kill this run; drain first if the server is ready."""
    multiprocessing.connection.wait([supervisor.sentinel])
    if folder.phase()[0] is Phase.READY:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(folder.read_deployment().settings.drain_timeout + _GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _check_temporary_folder() -> None:
    """Raise ConfigError if TMPDIR is too long for the paths of our and vLLM's sockets."""
    folder = tempfile.gettempdir()
    if len(folder.encode()) > _MAX_TEMPORARY_FOLDER:
        raise ConfigError(
            f"TMPDIR: the path has {len(folder.encode())} bytes, and sockets in it allow for "
            f"{_MAX_TEMPORARY_FOLDER}; choose a shorter one, such as /tmp"
        )


def _tls(config: ModelConfig, origins: Origins) -> ssl.SSLContext | None:
    """Load the YAML's ssl_certfile and ssl_keyfile. Raises ConfigError if they are unusable."""
    values = config.engine
    if not (certificate := values.get("ssl_certfile")):
        for key in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs"):
            if values.get(key):
                place = origins.of(("engine", key))
                raise ConfigError(f"{place}: give engine.ssl_certfile too")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(str(certificate), values.get("ssl_keyfile"))
    except OSError as e:
        place = origins.of(("engine", "ssl_certfile"))
        raise ConfigError(f"{place}: the certificate and key cannot be loaded: {e}") from None
    return context
