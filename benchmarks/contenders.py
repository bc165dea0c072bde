"""Who is compared: this service, bare vLLM, vLLM's engine alone, the tutorial's, llama.cpp's."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from service import model_config, settings, weights
from service.weights import embedded
from testing.server import LOOPBACK, Server, free_port

_CHAT = {"plain": "Chat", "stream": "ChatStream"}
INT8 = "engine.quantization=cpu_int8"
# llama.cpp from PyPI, in an environment of its own; how many it answers at once, and their tokens.
_LLAMA_CPP = "xllamacpp==2026.10.11549"
_SLOTS, _SLOT_TOKENS = 64, 1024


class HttpContender:
    """A server, and the classes of the locustfile that load it: {"plain": "Plain", ...}.

    `first` is a path and a streamed request whose first event is waited for at the start.
    """

    def __init__(
        self,
        server: Server,
        began: float,
        users: Mapping[str, str],
        first: tuple[str, Mapping[str, object]] | None = None,
    ) -> None:
        self.server = server
        self.users = users
        self.first_token_seconds: float | None = None
        self._began = began
        self._first = first

    def __enter__(self) -> Self:
        self.server.__enter__()
        if self._first:
            path, fields = self._first
            body = json.dumps({**fields, "stream": True}).encode()
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(self.server.url + path, body, headers)
            try:
                with LOOPBACK.open(request, timeout=300) as answer:
                    answer.readline()
                    self.first_token_seconds = time.monotonic() - self._began
                    answer.read()
            except BaseException:
                self.server.stop()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.server.__exit__(kind, error, traceback)

    def cpu_seconds(self) -> float:
        """User and system time of the process that answers HTTP, so far."""
        times = self.server.api_process().cpu_times()
        return float(times.user + times.system)

    def resident_mb(self) -> float:
        """Memory without the engine: the API process, and its supervisor where it has one."""
        processes = {psutil.Process(self.server.process.pid), self.server.api_process()}
        resident: int = sum(process.memory_info().rss for process in processes)
        return resident / 2**20


def service(model: str, sets: Sequence[str], log: Path) -> HttpContender:
    """`chat-service serve`, as it comes."""
    began = time.monotonic()
    users = {"plain": "Plain", "stream": "Stream"}
    first = {"prompt": "hi", "max_new_tokens": 4}
    return HttpContender(_serve(model, sets, log), began, users, ("/", first))


def service_int8(model: str, sets: Sequence[str], log: Path) -> HttpContender:
    """The same with weights in 8 bits, on a CPU."""
    return service(model, [*sets, INT8], log)


def chat(model: str, sets: Sequence[str], log: Path) -> HttpContender:
    """The same server by vLLM's own chat route; for models that bare vLLM cannot load."""
    began = time.monotonic()
    config, _ = model_config.load(model, sets)
    return HttpContender(_serve(model, sets, log), began, _CHAT, _first_chat(config.name))


def _serve(model: str, sets: Sequence[str], log: Path) -> Server:
    return Server.service(log, model, *(word for each in sets for word in ("--set", each)))


def _first_chat(name: str) -> tuple[str, dict[str, object]]:
    messages = [{"role": "user", "content": "hi"}]
    return "/v1/chat/completions", {"model": name, "messages": messages, "max_tokens": 4}


def bare_vllm(model: str, sets: Sequence[str], log: Path) -> HttpContender:
    """vLLM's own server as its documentation starts it, on the model's files."""
    config, _ = model_config.load(model, sets)
    port = free_port()
    loads = config.engine.get("load_format") != "dummy"
    arguments: dict[str, object] = {
        "model": weights.fetch(config.source, settings.load().cache_dir, weights=loads),
        "served-model-name": config.name,
        "host": "127.0.0.1",
        "port": port,
    }
    # What its user must give; the rest is vLLM's to choose.
    if config.dtype:
        arguments["dtype"] = config.dtype
    for name in ("dtype", "max_model_len", "kv_cache_memory_bytes", "load_format"):
        if name in config.engine:
            arguments[name.replace("_", "-")] = config.engine[name]
    if config.prompt.template:
        arguments["chat-template"] = config.prompt.template
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    began = time.monotonic()
    return HttpContender(Server(command, log, port=port), began, _CHAT, _first_chat(config.name))


def tutorial(model: str, sets: Sequence[str], log: Path) -> HttpContender:
    """The tutorials' server, which streams nothing."""
    config, _ = model_config.load(model, sets)
    folder = weights.fetch(config.source, settings.load().cache_dir)
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.tutorial_server", str(folder)]
    command += ["--port", str(port)]
    if config.prompt.template:
        command += ["--template", config.prompt.template]
    return HttpContender(Server(command, log, port=port), time.monotonic(), {"plain": "Plain"})


def llama_cpp(model: str, sets: Sequence[str], log: Path) -> HttpContender:
    """llama.cpp's server on the embedded model's own file, whose weights have 4 bits."""
    config, _ = model_config.load(model, sets)
    source = config.source
    if not (source.embedded and source.sha256):
        raise SystemExit(f"error: {model} is not embedded: there is no GGUF file for llama.cpp")
    folder = settings.load().cache_dir / "benchmarks"
    files = sorted(folder.rglob("*.gguf"))
    if not files:
        folder.mkdir(parents=True, exist_ok=True)
        files = [embedded.download(source.embedded, source.sha256, folder)]
    port = free_port()
    script = Path(__file__).with_name("llama_cpp_server.py")
    command = [str(Path(sys.executable).with_name("uv")), "run", "--no-project", "--isolated"]
    command += ["--with", _LLAMA_CPP, "python", str(script), str(files[0]), "--port", str(port)]
    command += ["--slots", str(_SLOTS), "--context", str(_SLOT_TOKENS)]
    modes = {**_CHAT, "stream": "LlamaCppStream"}
    began = time.monotonic()
    return HttpContender(Server(command, log, port=port), began, modes, _first_chat(config.name))


class Offline:
    """vLLM's engine alone, which `benchmarks.offline` runs in a process of its own."""

    def __init__(self, model: str, sets: Sequence[str], log: Path) -> None:
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.offline", model, *sets],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()

    def run(self, **options: Any) -> dict[str, float]:
        """Seconds and tokens of so many requests. Raises RuntimeError with its log."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise RuntimeError(f"it has ended:\n{Path(self._log.name).read_text()[-3000:]}")
