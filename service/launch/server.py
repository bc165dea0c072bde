"""The server process: prepares vLLM's arguments and runs vLLM's launcher.

Only this file uses the launcher. vLLM is imported inside functions, because the import takes
seconds and reads the environment that the supervisor prepares.
"""

import argparse
import functools
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

from service import vllm_arguments, vllm_plugins, weights
from service.api import application
from service.errors import ConfigError, LaunchError, ServiceError, WeightsError
from service.launch import compile_cache, environment, float_type, start_errors, tokenizer_choice
from service.launch.run_folder import RunFolder
from service.model_config import InvalidConfig, ModelConfig, Origins
from service.phase import Phase
from service.settings import Settings
from service.weights import adapter, checkpoint
from service.weights.adapter import Adapter

if TYPE_CHECKING:
    from fastapi import FastAPI


def run(folder: RunFolder, origins: Origins, listener: socket.socket) -> None:
    """Serve the deployment of `folder` on `listener` until the server ends.

    Several API processes share the listener's address. Call `environment.prepare` first. Raises
    ServiceError when the server cannot start, or fails.
    """
    deployment = folder.read_deployment()
    config, settings = deployment.model, deployment.settings
    with explained(settings, folder):
        vllm_plugins.load()
        args = vllm_arguments.arguments(config, origins, settings)
        _work_around_vllm()
        in_fork_server = forkserver.get_inherited_fds() is not None
        if in_fork_server and args.distributed_executor_backend == vllm_arguments.CPU_EXECUTOR:
            from service.models.vllm_private import fork_engine

            fork_engine()
        folder.set_phase(Phase.DOWNLOADING)
        report = functools.partial(folder.set_phase, Phase.DOWNLOADING)
        prepare_files(args, config, settings, report)
        folder.set_phase(Phase.LOADING)
        _serve(args, deployment, folder, listener)


@contextmanager
def prepared(
    config: ModelConfig, origins: Origins, settings: Settings
) -> Iterator[tuple[argparse.Namespace, RunFolder]]:
    """Prepare the environment and vLLM's arguments, to use vLLM in this process.

    Yields the arguments and a temporary run folder. Raises ServiceError.
    """
    with _ready_for_vllm(settings) as folder:
        args = vllm_arguments.arguments(config, origins, settings)
        _work_around_vllm()
        yield args, folder


def with_those_of_vllm(error: InvalidConfig, settings: Settings) -> InvalidConfig:
    """Return the mistakes of a YAML together with those that vLLM finds in its `engine`."""
    engine = {name: value for name, value in error.engine.items() if isinstance(name, str)}
    with _ready_for_vllm(settings):
        _, mistakes = vllm_arguments.parse(engine, error.origins)
    return InvalidConfig([*error.mistakes, *mistakes], error.origins)


@contextmanager
def _ready_for_vllm(settings: Settings) -> Iterator[RunFolder]:
    """Prepare the environment, in which vLLM can be imported. Yields a temporary run folder."""
    with tempfile.TemporaryDirectory(prefix="chat-service-") as path:
        folder = RunFolder(Path(path))
        environment.prepare(folder, settings)
        vllm_plugins.load()
        yield folder


def prepare_files(
    args: argparse.Namespace,
    config: ModelConfig,
    settings: Settings,
    report: Callable[[int], None] | None = None,
) -> None:
    """Fetch and check the model's files, set them in `args`, and choose what depends on them."""
    fetch_files(args, config, settings, report)
    if args.load_format == "auto":  # other formats need no weights, or use other files
        checkpoint.check(Path(args.model))
    choose_compiled(args, config)


def fetch_files(
    args: argparse.Namespace,
    config: ModelConfig,
    settings: Settings,
    report: Callable[[int], None] | None = None,
) -> None:
    """Fetch missing files of the model and its tokenizer, and set both in `args`."""
    if problem := vllm_arguments.pipeline_problem(args):
        raise ConfigError(problem)
    needs_weights = args.load_format != "dummy"
    folders = {name: weights.fetch_adapter(name, a) for name, a in config.adapters.items()}
    for name, path in folders.items():  # before a long download of the base
        _refuse(adapter.inspect(name, path, max_rank=_max_rank(args, config)))
    model = weights.fetch(config.source, settings.cache_dir, report=report, weights=needs_weights)
    tokenizer = model
    if config.tokenizer:
        tokenizer = weights.fetch(config.tokenizer, settings.cache_dir, weights=False)
    vllm_arguments.use_files(args, model, tokenizer)
    if not args.skip_tokenizer_init:
        checkpoint.check_tokenizer(tokenizer)
    adapters = inspect_adapters(args, config, folders, model)
    for inspected in adapters:
        _refuse(inspected)
        for warning in inspected.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    vllm_arguments.use_adapters(args, config, adapters)
    if reason := float_type.choose(args, config):
        print(f"Computing in {args.dtype}: {reason}", file=sys.stderr, flush=True)
    if reason := tokenizer_choice.choose(args):
        print(reason, file=sys.stderr, flush=True)


def inspect_adapters(
    args: argparse.Namespace,
    config: ModelConfig,
    folders: Mapping[str, Path],
    base: Path | None,
    *,
    for_gpu: bool = False,
) -> list[Adapter]:
    """Inspect the adapters in `folders` beside the files of their base, if these are here.

    `for_gpu`: they shall be served on a GPU, also if this machine has none.
    """
    source = config.source
    known_as = [config.name, *filter(None, (source.modelscope, source.path))]
    known_as += [str(base)] if base else []
    tensors = adapter.base_tensors(base) if base and folders else {}
    limits = vllm_arguments.adapter_limits(base, for_gpu=for_gpu) if tensors and base else None
    return [
        adapter.inspect(
            name,
            folder,
            base=base,
            tensors=tensors,
            known_as=known_as,
            limits=limits,
            max_rank=_max_rank(args, config),
        )
        for name, folder in folders.items()
    ]


def _max_rank(args: argparse.Namespace, config: ModelConfig) -> int | None:
    """Return the limit of the YAML; without one it is what the adapters need."""
    return args.max_lora_rank if "max_lora_rank" in config.engine else None


def _refuse(inspected: Adapter) -> None:
    """Raise WeightsError for an adapter that cannot be served."""
    if inspected.problems:
        raise WeightsError(inspected.problems[0])


def choose_compiled(args: argparse.Namespace, config: ModelConfig) -> None:
    """Choose between eager and compiled code (`compile_cache.choose`), and print the reason."""
    if args.enable_lora and vllm_arguments.on_cpu():  # where vLLM compiles nothing for adapters
        args.enforce_eager = True
    elif reason := compile_cache.choose(args, config):
        print(reason, file=sys.stderr, flush=True)
    if args.enforce_eager and vllm_arguments.on_cpu():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@contextmanager
def explained(settings: Settings, folder: RunFolder) -> Iterator[None]:
    """Turn a vLLM exception into a LaunchError of one sentence, unless --verbose is set."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as e:
        if settings.verbose:
            raise
        was_ready = folder.phase()[0] is Phase.READY
        what = "the server has failed" if was_ready else "vLLM could not start"
        cause = start_errors.explain(folder.cause() or start_errors.sentence(e))
        raise LaunchError(f"{what}: {cause} (--verbose shows all)") from e


def _work_around_vllm() -> None:
    """Turn off ahead-of-time compilation on a CPU. vLLM 0.32 cannot load its result there, so it
    would compile at every start: 56 s instead of 15 for the embedded model on 2 cores."""
    if vllm_arguments.on_cpu():
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        from service.models.vllm_private import inspect_models_here

        inspect_models_here()


def _serve(
    args: argparse.Namespace,
    deployment: application.Deployment,
    folder: RunFolder,
    listener: socket.socket,
) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    if vllm_arguments.serves_here(args):
        import uvloop

        uvloop.run(_serve_here(args, deployment, folder, listener))
        return
    application.configure(args, deployment, folder)
    args.host = listener.getsockname()[0]  # a name may have several addresses
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.close()  # the supervisor's copy answers until the API processes take over
    try:
        command.cmd(args)
    except Exception:
        # Of an engine that did not start. vLLM leaves the API processes waiting for it, and Python
        # would wait for them.
        for process in multiprocessing.active_children():
            process.kill()
        raise


async def _serve_here(
    args: argparse.Namespace,
    deployment: application.Deployment,
    folder: RunFolder,
    listener: socket.socket,
) -> None:
    """Serve in this process, as vLLM's command does, with our application and our socket."""
    from vllm import envs
    from vllm.entrypoints.launchers.launcher import serve_http
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    options = ["host", "port", "h11_max_incomplete_event_size", "h11_max_header_count"]
    options += ["ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"]
    logging = {"log_config": config} if (config := get_uvicorn_log_config(args)) else {}
    async with running(args, deployment, folder) as app:
        shutdown_task = await serve_http(
            app,
            sock=listener,
            enable_ssl_refresh=args.enable_ssl_refresh,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            **{name: getattr(args, name) for name in options},
            **logging,
        )
    await shutdown_task


@asynccontextmanager
async def running(
    args: argparse.Namespace, deployment: application.Deployment, host: application.Host
) -> AsyncIterator["FastAPI"]:
    """Start the engine, and yield the application that serves it, as vLLM's command makes them."""
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    args.api_server_count = None
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    validate_api_server_args(args)
    async with build_async_engine_client(args) as client:
        yield await application.build(args, deployment, client, host)
