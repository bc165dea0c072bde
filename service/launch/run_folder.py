"""The folder through which the processes of one run share config, phase and failure."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from service.api.application import Deployment, Host
from service.phase import Phase

# The environment variable with the folder's path.
FOLDER_VARIABLE = "CHAT_SERVICE_RUN_FOLDER"


class RunFolder(Host):
    """Used by the supervisor and by the server, API and engine processes."""

    handles_signals = True

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.config_file = path / "config.json"
        self.logging_file = path / "logging.json"
        self.phase_file = path / "phase"
        self.handover_socket = path / "handover"
        self._beats = path / "beats"
        self._progress_file = path / "progress"
        self._failure = path / "failure"
        self._cause = path / "cause"

    @classmethod
    def of_this_process(cls) -> "RunFolder":
        """Return the folder of this run. Works only in processes of `chat-service serve`."""
        return cls(Path(os.environ[FOLDER_VARIABLE]))

    def write_deployment(self, deployment: Deployment) -> None:
        self.config_file.touch(mode=0o600)
        without_key = deployment.model_dump_json(exclude={"settings": {"api_key"}})
        self.config_file.write_text(without_key)

    def read_deployment(self) -> Deployment:
        return Deployment.model_validate_json(self.config_file.read_bytes(), strict=False)

    def engine_ancestor(self) -> int:
        return os.getpgrp()  # each run has its own process group

    def take_over(self) -> None:
        """Wait until the progress server has stopped, then set the phase to READY."""
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(10)
                s.connect(str(self.handover_socket))
                s.recv(1)
        except OSError:
            pass  # another API process has taken over
        self.set_phase(Phase.READY)

    def set_phase(self, phase: Phase, percent: int | None = None) -> None:
        """Report the phase of the start; `percent` is of a download."""
        self._write(self.phase_file, f"{phase} {'' if percent is None else percent}")

    def phase(self) -> tuple[Phase, int | None]:
        """Return the phase and, during a download, its percentage."""
        try:
            phase, _, percent = self.phase_file.read_text().strip().partition(" ")
        except FileNotFoundError:
            return Phase.STARTING, None
        return Phase(phase), int(percent) if percent else None

    def beat(self) -> None:  # a touch works on a full disk
        self.path.mkdir(mode=0o700, exist_ok=True)  # who cleans /tmp must not end the checks
        self._beats.mkdir(exist_ok=True)
        (self._beats / str(os.getpid())).touch()

    def beats(self) -> dict[str, int]:
        """Return pid -> time of the last beat, in nanoseconds of the wall clock."""
        try:
            return {file.name: file.stat().st_mtime_ns for file in self._beats.iterdir()}
        except OSError:  # no beat yet, or no file descriptor left
            return {}

    def mark_progress(self) -> None:
        self._progress_file.touch()

    def progress(self) -> int:
        """Return the time of the last progress, in nanoseconds of the wall clock, or 0."""
        file = self._progress_file
        return file.stat().st_mtime_ns if file.exists() else 0

    def report_failure(self, reason: str) -> None:
        """Report why the server ends by itself. Only the first report counts."""
        self._write_once(self._failure, reason)

    def failure(self) -> str | None:
        return self._failure.read_text() if self._failure.exists() else None

    def report_cause(self, error: str) -> None:
        """Report why a process failed. Only the first report counts: it is the root cause."""
        self._write_once(self._cause, error)

    def cause(self) -> str | None:
        return self._cause.read_text() if self._cause.exists() else None

    def _write(self, file: Path, text: str) -> None:
        part = file.with_name(f"{file.name}.{os.getpid()}")
        with suppress(OSError):  # on a full disk lose the report, not the server
            part.write_text(text)
            part.replace(file)  # atomic: a reader never sees half a file

    def _write_once(self, file: Path, text: str) -> None:
        with suppress(OSError), file.open("x") as f:
            f.write(text)
