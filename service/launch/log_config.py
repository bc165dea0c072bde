"""The logging of a server's processes: shows the start in phases, drops noise."""

import logging
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from service.launch import start_errors
from service.launch.run_folder import RunFolder
from service.phase import Phase

# (message of vLLM 0.32, our message, whether to add the time since the previous phase).
_PHASES: tuple[tuple[re.Pattern[str], str, bool], ...] = tuple(
    (re.compile(pattern), phase, timed)
    for pattern, phase, timed in (
        (r"Starting to load model ", "Loading the weights ...", False),
        (r"Loading weights took ([\d.]+) seconds", r"Weights loaded in \1 s", False),
        (r"Warming up model for the compilation", "Compiling and warming up ...", False),
        (r"Warming up done", "Compiled and warmed up", True),
        (r"torch\.compile took ([\d.]+) s in total", r"Compiled in \1 s", False),
        (r"Graph capturing finished in ([\d.]+) secs", r"CUDA graphs captured in \1 s", False),
        (r"KV cache size: ([\d,]+) tokens", r"KV cache: room for \1 tokens", False),
        (r"init engine \(.*\) took ([\d.]+) s", r"Engine ready in \1 s", False),
    )
)
# (message of vLLM, phase for /health/ready).
_HEALTH_PHASES: tuple[tuple[re.Pattern[str], Phase], ...] = (
    (re.compile(r"Starting to load model "), Phase.LOADING),
    (re.compile(r"Warming up model for the compilation|Dynamo bytecode"), Phase.COMPILING),
    (re.compile(r"Loading weights took|Warming up done|Graph captur|KV cache size"), Phase.WARMING),
)
# Warnings of vLLM and its libraries that need no action; shown only by --verbose.
_HARMLESS = re.compile(
    "|".join(
        (
            "Triton",
            "libtcmalloc|libiomp",
            "Enforce eager set",
            "Inductor compilation",
            "Model Runner V2",
            "Reset SSM cache",
            "Reducing Torch threads",
            "Default vLLM sampling parameters have been overridden",
            "disabling stats logging",
            r"\[shutdown\]",
            "ulimit",
            "Using a slow tokenizer",
            r"torch\.set_num_threads",
            "The global random seed",
            "Attempted to load weight",
            "requires system-first ordering",
            "Unsupported upgrade request",  # of a client: WebSockets are not served
            "No supported WebSocket library",
            "VLLM_DIST_IDENT",  # vLLM sets it, and warns of it at a second engine in one process
            "Failed to create oneDNN linear",  # bfloat16 on a processor without it
            "is already registered. Overwriting",  # a second engine in one process
        )
    )
)
# vLLM's loggers whose records may hold what a client sent: parts of prompts, names, ids.
_SEE_REQUESTS = tuple(
    f"vllm.{name}"
    for name in (
        "entrypoints",
        "inputs",
        "logging_utils",
        "logits_process",
        "multimodal",
        "outputs",
        "parser",
        "reasoning",
        "renderers",
        "sampling_params",
        "tokenizers",
        "tool_parsers",
        "v1.core.sched",
        "v1.engine",
        "v1.structured_output",
    )
)
_FATAL = re.compile(r"encountered a fatal error|output_handler failed")  # of `vllm.v1.engine`
_ARGUMENT = re.compile(r"%[-+#0]*[\d.]*[a-z]")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_FORMATS = {
    "plain": "%(asctime)s %(levelname)s %(message)s",
    "verbose": "%(asctime)s %(levelname)s [%(process)d %(name)s] %(message)s",
}
_DATE = "%Y-%m-%d %H:%M:%S"
# vLLM's errors when a worker or the engine fails, at start or later.
_FAILED = re.compile(r"failed to start|WorkerProc hit an exception")


class OneLine(logging.Formatter):
    """Keeps a message of the libraries on one line, whatever it holds; a traceback follows it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.name.partition(".")[0] != "service":
            record.message = _CONTROLS.sub(" ", record.message)
        return super().formatMessage(record)


class ToSupervisor(logging.Filter):
    """Reports phases and causes of failure, which vLLM only logs, through the run folder."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = RunFolder(Path(folder))

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] == "service":
            return True
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            if error and _FAILED.search(message) and start_errors.is_root(error):
                self._folder.report_cause(start_errors.sentence(error))
        else:
            for pattern, phase in _HEALTH_PHASES:
                # A ready server may log the same when it loads an adapter or compiles a new shape.
                if pattern.search(message) and self._folder.phase()[0] is not Phase.READY:
                    self._folder.set_phase(phase)
        return True


class StartUp(logging.Filter):
    """Keeps only phases with durations, important warnings, errors, and our own lines."""

    def __init__(self) -> None:
        super().__init__()
        self._phase_began = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] == "service":
            return True
        sees_requests = record.name.startswith(_SEE_REQUESTS) and record.levelno >= logging.WARNING
        if sees_requests and record.args:
            record.msg, record.args = _ARGUMENT.sub("...", str(record.msg)), ()
        message = record.getMessage()
        if record.exc_info and type(record.exc_info[1]).__name__ == "EngineDeadError":
            return False  # our own line reports it once
        if "Exception occurred while running API servers" in message:
            return False  # the supervisor reports it
        if message.startswith("Error with model "):
            return False  # a client error, whose text echoes input
        if record.exc_info and record.name.startswith("vllm.renderers."):
            return False  # a template fails: the request or the start says so
        if record.levelno >= logging.ERROR:
            if "failed to start" in message:
                from service.models.vllm_private import print_no_traceback

                print_no_traceback()  # our last line reports the cause
                return False
            if _FAILED.search(message) and record.exc_info:
                record.msg, record.args = f"{message} {record.exc_info[1]}", ()
                record.exc_info = record.exc_text = None
            if "died unexpectedly" in message:
                return False
        if sees_requests and record.exc_info and not _FATAL.search(message):
            # An exception's text may echo input, so log where it was raised alone.
            kind, _, stack = record.exc_info
            record.msg = f"vLLM failed: {kind and kind.__name__}"
            record.exc_info, record.exc_text = None, "".join(traceback.format_tb(stack)).rstrip()
        if record.levelno >= logging.ERROR:
            return True
        if record.levelno >= logging.WARNING:
            return not _HARMLESS.search(message)
        for pattern, phase, timed in _PHASES:
            if match := pattern.search(message):
                text = match.expand(phase)
                if timed:
                    text += f" in {record.created - self._phase_began:.0f} s"
                self._phase_began = record.created
                record.msg, record.args = text, ()
                return True
        return False


def configuration(folder: RunFolder, *, verbose: bool) -> dict[str, Any]:
    """Return the logging.config.dictConfig for all processes of the server."""
    form, level = _form_and_level(verbose=verbose)
    handler: dict[str, Any] = {
        "class": "logging.StreamHandler",
        "stream": "ext://sys.__stderr__",  # Ray Serve replaces the other, and writes late
        "formatter": form,
        "filters": ["report"] if verbose else ["report", "start_up"],
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            name: {
                "class": "service.launch.log_config.OneLine",
                "format": format,
                "datefmt": _DATE,
            }
            for name, format in _FORMATS.items()
        },
        "filters": {
            "report": {
                "()": "service.launch.log_config.ToSupervisor",
                "folder": str(folder.config_file.parent),
            },
            "start_up": {"()": "service.launch.log_config.StartUp"},
        },
        "handlers": {"stderr": handler},
        "root": {"level": "INFO" if verbose else "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "vllm": {"level": "INFO"},
            "service": {"level": level},
            "uvicorn": {"level": "INFO"},
            "opentelemetry": {"level": "ERROR"},  # its warnings echo a client's headers
        },
    }


def log_our_own(*, verbose: bool) -> None:
    """Let this process, which has neither engine nor run folder, log our lines in the same form."""
    form, level = _form_and_level(verbose=verbose)
    # Ray Serve has its own log in place of sys.stderr, and writes it some thousand lines later.
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter(_FORMATS[form], _DATE))
    logger = logging.getLogger("service")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level)


def _form_and_level(*, verbose: bool) -> tuple[str, str]:
    return ("verbose", "DEBUG") if verbose else ("plain", "INFO")
