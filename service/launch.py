"""From a model's YAML and the settings to vLLM's arguments and vLLM's own launcher.

The only file that knows the launcher. vLLM is imported inside functions: it takes seconds, and
reads the environment that `serve` prepares.
"""

import argparse
import functools
import json
import math
import os
import re
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from service import checkpoint, compiled, float_type, logs, start_errors, weights
from service.errors import ConfigError, LaunchError, ServiceError, WeightsError
from service.health import Phase
from service.model_config import ModelConfig, Origins, nearest
from service.run_folder import RunFolder
from service.settings import CONFIG_VARIABLE, Settings

if TYPE_CHECKING:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

# Group and name of our entry points.
PLUGINS = (
    ("vllm.general_plugins", "chat_service_models"),
    ("vllm.stat_logger_plugins", "chat_service_statistics"),
    ("vllm.endpoint_plugins", "chat_service"),
)
# The first is innermost.
MIDDLEWARE = [f"service.guard.{name}" for name in ("Body", "ApiKey", "Refusals", "Observe")]
INNERMOST = "service.guard.Gate"  # the user's own stand between

# For one worker on a CPU vLLM starts a process beside the engine's, so as to bind its threads to
# all cores but one; and the engine spins on that one while it waits for it. In the engine's own
# process, threads on all cores make twice as many tokens on 2 cores, and the server starts a
# process less. By its full name, because vLLM replaces "uni" on CPUs.
CPU_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"

# vLLM arguments that another key or setting decides here.
_OWNED = {
    "model": "source",
    "model_tag": "source",
    "revision": "source.revision",
    "tokenizer": "tokenizer",
    "tokenizer_revision": "tokenizer.revision",
    "served_model_name": "name",
    "chat_template": "prompt.template",
    "override_generation_config": "sampling",
    "host": "--host",
    "port": "--port",
    "api_key": "SERVICE_API_KEY",
    "hf_token": "the environment variable HF_TOKEN",
    "log_config_file": "--verbose",
}
_REFUSED = {
    "trust_remote_code": "remote code is never run",
    "headless": "it serves no HTTP",
    "grpc": "it serves no HTTP",
    "grpc_port": "it serves no HTTP",
    "enable_scale_out": "its routes would go past the queue",
    "tokens_only": "its routes would go past the queue",
    "uds": "the service listens on an address and a port",
    "config": "the model's YAML is the configuration",
    "help": "see `chat-service serve --help`",
}


def serves_here(args: argparse.Namespace) -> bool:
    """Whether vLLM will serve in this process, and not start several API processes.

    As ServeSubcommand.cmd decides it.
    """
    if args.data_parallel_multi_port_external_lb:
        return False  # a supervisor starts one server for each rank
    if args.enable_elastic_ep:
        return True
    if args.api_server_count is not None:
        return bool(args.api_server_count == 1)
    if args.data_parallel_external_lb or args.data_parallel_rank is not None:
        return True
    if args.data_parallel_hybrid_lb or args.data_parallel_start_rank is not None:
        return (args.data_parallel_size_local or 1) == 1
    return bool(args.data_parallel_size == 1)


def run(
    config: ModelConfig,
    origins: Origins,
    settings: Settings,
    folder: RunFolder,
    listener: socket.socket,
) -> None:
    """Run vLLM's server on `listener` until it ends; several API processes share its address.

    `prepare_environment` comes before it. Raises ServiceError when it cannot start, or has failed.
    """
    with explained(settings, folder):
        _load_plugins()
        args = arguments(config, origins, settings)
        _work_around_vllm()
        of_fork_server = forkserver.get_inherited_fds() is not None
        if of_fork_server and args.distributed_executor_backend == CPU_EXECUTOR:
            from service.models.vllm_private import fork_engine

            fork_engine()
        folder.set_phase(Phase.DOWNLOADING)
        report = functools.partial(folder.set_phase, Phase.DOWNLOADING)
        fetch_files(args, config, settings, report)
        if args.load_format == "auto":  # others need no weights, or keep them in other files
            checkpoint.check(Path(args.model))
        choose_compiled(args, config)
        folder.set_phase(Phase.LOADING)
        _launch(args, listener)


@contextmanager
def prepared(
    config: ModelConfig, origins: Origins, settings: Settings
) -> Iterator[tuple[argparse.Namespace, RunFolder]]:
    """The environment and vLLM's arguments for this model, to ask vLLM or run its engine here.

    Raises ServiceError.
    """
    with tempfile.TemporaryDirectory(prefix="chat-service-") as path:
        folder = RunFolder(Path(path))
        prepare_environment(folder, settings)
        _load_plugins()
        args = arguments(config, origins, settings)
        _work_around_vllm()
        yield args, folder


def fetch_files(
    args: argparse.Namespace,
    config: ModelConfig,
    settings: Settings,
    report: Callable[[int], None] | None = None,
) -> None:
    """Fetch what is missing of the model and its tokenizer, and put both into `args`."""
    loads = args.load_format != "dummy"  # which makes random ones
    model = weights.fetch(config.source, settings.cache_dir, report=report, weights=loads)
    tokenizer = model
    if config.tokenizer:
        tokenizer = weights.fetch(config.tokenizer, settings.cache_dir, weights=False)
    use_files(args, model, tokenizer)
    if reason := float_type.choose(args, config):
        print(f"Computing in {args.dtype}: {reason}", file=sys.stderr, flush=True)


def choose_compiled(args: argparse.Namespace, config: ModelConfig) -> None:
    """Choose between eager and compiled code (`compiled.choose`), and say why."""
    if reason := compiled.choose(args, config):
        print(reason, file=sys.stderr, flush=True)


def arguments(config: ModelConfig, origins: Origins, settings: Settings) -> argparse.Namespace:
    """vLLM's own arguments for this model, without its files.

    Raises ConfigError with file, line and nearest name for what vLLM's parser does not know or
    does not accept.
    """
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is not typed for us
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = make_arg_parser(Parser())
    args: argparse.Namespace = parser.parse_args([])
    given: set[str] = set()
    for key, value in config.engine.items():
        place = origins.of(("engine", key))
        name = key.replace("-", "_")
        if name in given:
            raise ConfigError(f"{place}: given twice, with a dash and with an underscore")
        given.add(name)
        if name in _OWNED:
            raise ConfigError(f"{place}: given by {_OWNED[name]} here")
        if name in _REFUSED:
            raise ConfigError(f"{place}: cannot be set: {_REFUSED[name]}")
        setattr(args, name, _parse(parser, name, value, place))
    args.host, args.port = settings.host, settings.port
    args.served_model_name = [config.name]
    if config.dtype and "dtype" not in given:
        args.dtype = config.dtype
    args.chat_template = config.prompt.template
    sampling = config.sampling.model_dump(exclude_none=True, exclude={"stop"})
    if "max_tokens" in sampling:  # its name in generation_config.json
        sampling["max_new_tokens"] = sampling.pop("max_tokens")
    args.override_generation_config = sampling
    args.middleware = [INNERMOST, *args.middleware, *MIDDLEWARE]
    if "shutdown_timeout" not in given and not serves_here(args):
        # vLLM's parent process kills its API processes at once, unless it is told to wait.
        args.shutdown_timeout = math.ceil(settings.drain_timeout) + 10
    if "disable_uvicorn_access_log" not in given:
        args.disable_uvicorn_access_log = True
    if "enable_offline_docs" not in given:
        args.enable_offline_docs = True  # else /docs asks a CDN, which not every reader reaches
    if "use_tqdm_on_load" not in given:
        args.use_tqdm_on_load = settings.verbose
    if "distributed_executor_backend" not in given and _is_one_cpu(args):
        args.distributed_executor_backend = CPU_EXECUTOR
    return args


def use_files(args: argparse.Namespace, model: Path, tokenizer: Path) -> None:
    """The model's files, and what vLLM does not read of them: transformers is greedy without
    `do_sample` in generation_config.json, whatever temperature stands beside it."""
    args.model, args.tokenizer = str(model), str(tokenizer)
    try:
        generation = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        generation = {}
    except (OSError, ValueError) as e:
        raise WeightsError(
            f"{model / 'generation_config.json'} is not readable JSON: {e}"
        ) from None
    if not generation.get("do_sample"):
        args.override_generation_config.setdefault("temperature", 0.0)


def _parse(parser: "FlexibleArgumentParser", name: str, value: object, place: str) -> object:
    """One YAML value as vLLM's parser reads it from the command line."""
    actions = {action.dest: action for action in parser._actions}
    if name not in actions:
        raise ConfigError(f"{place}: vLLM has no such argument{nearest(name, actions)}")
    action = actions[name]
    flag, no_flag = f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"
    try:
        if value is None or (value is False and no_flag not in action.option_strings):
            words = []  # absent is what vLLM calls off, or its default
        elif isinstance(value, bool) and action.nargs == 0:
            words = [flag if value else no_flag]
        elif isinstance(value, list) and isinstance(action, argparse._AppendAction):
            words = [f"{flag}={v}" for v in value]
        elif isinstance(value, list) and action.nargs:
            words = [flag, *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
        elif isinstance(value, dict | list):
            words = [flag, json.dumps(value)]
        else:
            words = [f"{flag}={value}"]
        return getattr(parser.parse_args(words), name)
    except (ValueError, TypeError, argparse.ArgumentError) as e:
        reason = str(e).partition(": ")[2] or str(e)
        reason = re.sub(r"<function (\w+) at \w+>", r"\1", reason)
        raise ConfigError(f"{place}: {' '.join(reason.split())[:300]}") from None


def prepare_environment(folder: RunFolder, settings: Settings) -> None:
    """What every process of the server reads from its environment; `folder` must outlive them."""
    logging_config = logs.configuration(folder, verbose=settings.verbose)
    folder.logging_file.write_text(json.dumps(logging_config))
    # Named ones only are loaded: ours, and what the user chose, or all that vLLM would load without
    # us. It loads no endpoint plugin that is not named.
    plugins = {name for _, name in PLUGINS}
    if chosen := os.environ.get("VLLM_PLUGINS"):
        plugins.update(chosen.split(","))
    else:
        for group in entry_points().groups:
            if group.startswith("vllm.") and group != "vllm.endpoint_plugins":
                plugins.update(entry_points(group=group).names)
    os.environ.update(
        {
            CONFIG_VARIABLE: str(folder.config_file),
            "VLLM_LOGGING_CONFIG_PATH": str(folder.logging_file),
            "VLLM_PLUGINS": ",".join(sorted(plugins)),
        }
    )
    defaults = {
        # As vLLM's own command line sets it.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        # Seconds; the end of the server waits so long for a collector that does not answer.
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2",
        # Prompts are encoded one at a time: handing them to a pool of threads costs more.
        "TOKENIZERS_PARALLELISM": "false",
        # On a CPU vLLM leaves what it compiles to torch, whose own place no container keeps: /tmp.
        "TORCHINDUCTOR_CACHE_DIR": str(settings.cache_dir / "torchinductor"),
        # An executor with several workers gives a step up, and the engine with it, after 300 s.
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(math.ceil(settings.step_timeout)),
        # A large model on a slow machine loads and compiles for longer than vLLM's 600 s.
        "VLLM_ENGINE_READY_TIMEOUT_S": "7200",
        # vLLM sets it on a CPU when torch has read it already: the number of threads is not in the
        # compiled code.
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1",
        # Longer than the longest Retry-After: who comes back meets no closed connection.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
        # vLLM allows 16,384 and 1,024; the routes that its own limits do not reach have ours.
        "VLLM_MAX_N_SEQUENCES": str(settings.max_sequences),
        "VLLM_MAX_COMPLETION_PROMPTS": str(settings.max_sequences),
    }
    if not settings.verbose:
        defaults |= {
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TORCH_LOGS": "-torch._library.triton",
        }
        warnings.simplefilter("ignore")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.pop("SERVICE_API_KEY", None)  # its hash is all that the other processes need


def _load_plugins() -> None:
    """Load our plugins as vLLM will. It only logs a failure, and would serve without them."""
    for group, name in PLUGINS:
        found: Sequence[EntryPoint] = tuple(entry_points(group=group, name=name))
        if not found:
            raise LaunchError(
                f"vLLM's plugin {name} is not installed; run `pip install` for this package again"
            )
        try:
            plugin = found[0].load()
            if group == "vllm.general_plugins":
                plugin()
        except Exception as e:
            raise LaunchError(
                f"vLLM's plugin {name} fails to load: {start_errors.sentence(e)}"
            ) from e


def _is_one_cpu(args: argparse.Namespace) -> bool:
    """Whether one worker runs on a CPU with one memory, whose threads nobody wants bound."""
    from vllm.platforms import current_platform

    sizes = (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size)
    return (
        bool(current_platform.is_cpu())
        and set(sizes) == {1}
        and len([*Path("/sys/devices/system/node").glob("node[0-9]*")]) <= 1
        and os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") == "nobind"
    )


def _work_around_vllm() -> None:
    """vLLM 0.32 on CPU cannot load its ahead-of-time compiled model again, and compiles at every
    start; its older way works (15 s instead of 56 for the embedded model on 2 cores)."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")


def _launch(args: argparse.Namespace, listener: socket.socket) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    if not serves_here(args):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.close()  # the supervisor has it too, and answers until the API processes do
        command.cmd(args)
        return
    # What vLLM's command does for one API process, with a socket that listens already.
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.launcher import validate_api_server_args

    args.api_server_count = None
    validate_api_server_args(args)
    uvloop.run(run_server_worker(f"{args.host}:{args.port}", listener, args))


@contextmanager
def explained(settings: Settings, folder: RunFolder) -> Iterator[None]:
    """Turn what vLLM raises into one sentence; --verbose keeps its traceback."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as e:
        if settings.verbose:
            raise
        cause = start_errors.explain(folder.cause() or start_errors.sentence(e))
        raise LaunchError(f"vLLM could not start: {cause} (--verbose shows all)") from e
