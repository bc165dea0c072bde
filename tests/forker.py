"""A process that imports vLLM once and forks for each `chat-service` command: see warm.py."""

import gc
import json
import os
import resource
import runpy
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

_LARGEST_MESSAGE = 1 << 20
_FREE_NUMBERS = 1000  # a file that is in the way of another's number waits at one from here on


def send(channel: socket.socket, message: object, files: Sequence[int]) -> None:
    socket.send_fds(channel, [json.dumps(message).encode()], files)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """A message and its open files; the message is None when the other side has ended."""
    message, files, *_ = socket.recv_fds(channel, _LARGEST_MESSAGE, 8)
    return json.loads(message) if message else None, files


def _main(channel: socket.socket) -> None:
    """Import vLLM, fork for each request, and return in each of the forks."""
    set_by_import = _import_vllm()
    gc.collect()
    gc.freeze()  # the forks share these objects
    gc.unfreeze = lambda: None  # an engine that ends would look through all of them for garbage
    while True:
        request, files = receive(channel)
        if request is None:
            os._exit(0)
        if os.fork() == 0:
            channel.close()
            status, *standard = files
            if pid := os.fork():
                _wait(pid, status)
            os.close(status)
            os.setsid()
            for number, file in enumerate(standard):
                os.dup2(file, number)
                os.close(file)
            os.chdir(request["folder"])
            _become(request["words"], request["env"], set_by_import)
            return
        for file in files:
            os.close(file)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # what ended since the last request
                pass


def _wait(pid: int, status: int) -> NoReturn:
    """Tell the process's number and how it ended."""
    for number in (0, 1, 2):
        os.close(number)  # whoever reads them waits for their end
    with socket.socket(fileno=status) as told:
        told.sendall(pid.to_bytes(4, "little"))
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told.sendall(ended.to_bytes(4, "little", signed=True))
    os._exit(0)


def _import_vllm() -> dict[str, str]:
    """Import what the fork server imports, as it does. Returns the variables that this sets."""
    import setproctitle

    from service import settings
    from service.launch import environment
    from service.launch.run_folder import FOLDER_VARIABLE, RunFolder

    with tempfile.TemporaryDirectory() as path:
        environment.prepare(RunFolder(Path(path)), settings.load())
        before = dict(os.environ)
        importing = __import__("service.launch.fork_server")
    setproctitle.setproctitle("tests.forker")
    # A fork server is asked to import it once more, and then becomes one.
    del sys.modules["service.launch.fork_server"], importing.launch.fork_server
    assert FOLDER_VARIABLE in before and "vllm" in sys.modules
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def _become(words: list[str], env: dict[str, str], set_by_import: dict[str, str]) -> None:
    """Make this process what `python -m service`, or `python -c`, begins as."""
    import setproctitle

    from service.launch import environment
    from service.launch.run_folder import RunFolder
    from service.settings import Settings

    setproctitle.setproctitle(" ".join(["python -m service", *words]))
    os.environ.clear()
    os.environ.update(env)
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[1:1] = [path for path in paths if path not in sys.path]
    sys.argv = ["service", *words]
    if words[:1] == ["serve"]:
        _fork_fork_server(set_by_import)
        return
    os.environ.update(set_by_import)
    prepare = environment.prepare

    def prepare_logging_too(folder: RunFolder, settings: Settings) -> None:
        prepare(folder, settings)
        _configure_logging()

    environment.prepare = prepare_logging_too


def _fork_fork_server(set_by_import: dict[str, str]) -> None:
    """Fork the fork server that `serve` will start, while this process has no threads."""
    channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        channel.close()
        _be_fork_server(theirs, set_by_import)
    theirs.close()
    spawn = util.spawnv_passfds

    def start(path: bytes, arguments: Sequence[Any], files: Sequence[int]) -> int:
        if "multiprocessing.forkserver" not in arguments[-1]:
            return int(spawn(path, arguments, files))
        inherited = {
            "env": dict(os.environ),
            "most_files": resource.getrlimit(resource.RLIMIT_NOFILE),
            "numbers": list(files),
        }
        send(channel, {"code": arguments[-1], **inherited}, files)
        channel.close()
        return pid

    util.spawnv_passfds = start  # type: ignore[assignment]


def _be_fork_server(channel: socket.socket, set_by_import: dict[str, str]) -> NoReturn:
    """Run the code of a fork server, with what it would inherit and no other files."""
    request, files = receive(channel)
    channel.close()
    if request is None:  # `serve` has ended before
        os._exit(0)
    waiting: list[int] = []
    for file in files:
        waiting.append(os.dup2(file, _FREE_NUMBERS + len(waiting)))
        os.close(file)
    os.closerange(3, _FREE_NUMBERS)
    for file, number in zip(waiting, request["numbers"], strict=True):
        os.dup2(file, number)
        os.close(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["most_files"]))
    os.environ.clear()
    os.environ.update(request["env"] | set_by_import)
    _configure_logging()
    try:
        exec(request["code"], {"__name__": "__main__"})
    finally:
        os._exit(0)


def _configure_logging() -> None:
    """What the import of vLLM does with the environment."""
    from vllm import logger

    logger._configure_vllm_root_logger()


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
    if sys.argv[1] == "-c":
        del sys.argv[1]
        exec(sys.argv.pop(1), {"__name__": "__main__"})
    else:
        runpy.run_module("service", run_name="__main__", alter_sys=True)
