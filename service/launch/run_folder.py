"""The folder that the processes of one run share: its config, its phase, and why it failed."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from service.api.application import Deployment, Host
from service.phase import Phase

# Names the folder to every process of a run.
FOLDER_VARIABLE = "CHAT_SERVICE_RUN_FOLDER"


class RunFolder(Host):
    """Written and read by the supervisor, the launcher, the API processes and the engine's."""

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
        """The folder that the environment names; below `chat-service serve` only."""
        return cls(Path(os.environ[FOLDER_VARIABLE]))

    def write_deployment(self, deployment: Deployment) -> None:
        self.config_file.touch(mode=0o600)
        self.config_file.write_text(deployment.model_dump_json())

    def read_deployment(self) -> Deployment:
        return Deployment.model_validate_json(self.config_file.read_bytes(), strict=False)

    def engine_ancestor(self) -> int:
        return os.getpgrp()  # the supervisor gives each run a group of its own

    def take_over(self) -> None:
        """Wait until the progress server has stopped; the phase is then READY."""
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(10)
                s.connect(str(self.handover_socket))
                s.recv(1)
        except OSError:
            pass  # another API process was first
        self.set_phase(Phase.READY)

    def set_phase(self, phase: Phase, percent: int | None = None) -> None:
        """Say how far the start is; `percent` of a download."""
        self._write(self.phase_file, f"{phase} {'' if percent is None else percent}")

    def phase(self) -> tuple[Phase, int | None]:
        """How far the start is."""
        try:
            phase, _, percent = self.phase_file.read_text().strip().partition(" ")
        except FileNotFoundError:
            return Phase.STARTING, None
        return Phase(phase), int(percent) if percent else None

    def beat(self) -> None:
        """Say that this API process is alive. A touch needs no room on a disk that is full."""
        self._beats.mkdir(exist_ok=True)
        (self._beats / str(os.getpid())).touch()

    def beats(self) -> dict[str, int]:
        """When each API process said so, by its pid; in nanoseconds of the wall clock."""
        try:
            return {file.name: file.stat().st_mtime_ns for file in self._beats.iterdir()}
        except OSError:  # none yet, or no file descriptor is left to look with
            return {}

    def mark_progress(self) -> None:
        """Say that the engine makes progress: vLLM tells it to one API process of several."""
        self._progress_file.touch()

    def progress(self) -> int:
        """When one of them last said so; in nanoseconds of the wall clock."""
        file = self._progress_file
        return file.stat().st_mtime_ns if file.exists() else 0

    def report_failure(self, reason: str) -> None:
        """Say why the server ends though nobody asked it to; the first to say so is believed."""
        self._write_once(self._failure, reason)

    def failure(self) -> str | None:
        return self._failure.read_text() if self._failure.exists() else None

    def report_cause(self, error: str) -> None:
        """Say why a process could not start; the first is the root."""
        self._write_once(self._cause, error)

    def cause(self) -> str | None:
        return self._cause.read_text() if self._cause.exists() else None

    def _write(self, file: Path, text: str) -> None:
        part = file.with_name(f"{file.name}.{os.getpid()}")
        with suppress(OSError):  # a full disk costs the news, not the server
            part.write_text(text)
            part.replace(file)  # a reader sees the old or the new, never half

    def _write_once(self, file: Path, text: str) -> None:
        with suppress(OSError), file.open("x") as f:
            f.write(text)
