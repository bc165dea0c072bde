"""From a model's YAML and the settings to vLLM's arguments and vLLM's own launcher.

The only file that knows the launcher. vLLM is imported inside functions: it takes seconds, and
reads the environment that `serve` prepares.
"""

import argparse
import errno
import http.client
import json
import os
import re
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from service import logs, weights
from service.errors import ConfigError, LaunchError, ServiceError, WeightsError
from service.model_config import ModelConfig, Origins, nearest
from service.settings import CONFIG_VARIABLE, ApiProcessConfig, Settings

if TYPE_CHECKING:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

ENDPOINT_PLUGIN = "chat_service"
GENERAL_PLUGIN = "chat_service_models"
# The first is innermost.
MIDDLEWARE = ["service.guard.ApiKey", "service.guard.Observe"]

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
    "uds": "the service listens on an address and a port",
    "config": "the model's YAML is the configuration",
    "help": "see `chat-service serve --help`",
}


def serve(config: ModelConfig, origins: Origins, settings: Settings) -> None:
    """Run the server until it is stopped. Raises ServiceError when it cannot start."""
    key_hash = settings.key_hash()
    _check_address(settings.host, settings.port)
    print(f"Starting {config.name}; vLLM takes a while to import ...", file=sys.stderr, flush=True)
    with prepared(config, origins, settings, key_hash) as (args, instance):
        fetch_files(args, config, settings)
        announcer = _Announcer(config, settings, instance, tls=bool(args.ssl_certfile))
        announcer.start()
        with explained(settings):
            _launch(args)
        if announcer.failure:
            raise LaunchError(announcer.failure)


@contextmanager
def prepared(
    config: ModelConfig, origins: Origins, settings: Settings, key_hash: str | None = None
) -> Iterator[tuple[argparse.Namespace, str]]:
    """The environment and vLLM's arguments for this model, and the name of this run.

    Raises ServiceError.
    """
    with tempfile.TemporaryDirectory(prefix="chat-service-") as folder:
        instance = _prepare_environment(Path(folder), config, settings, key_hash)
        _load_plugins()
        args = arguments(config, origins, settings)
        _work_around_vllm()
        yield args, instance


def fetch_files(args: argparse.Namespace, config: ModelConfig, settings: Settings) -> None:
    """Fetch what is missing of the model and its tokenizer, and put both into `args`."""
    model = weights.fetch(config.source, settings.cache_dir)
    tokenizer = model
    if config.tokenizer:
        tokenizer = weights.fetch(config.tokenizer, settings.cache_dir, weights=False)
    use_files(args, model, tokenizer)


def arguments(config: ModelConfig, origins: Origins, settings: Settings) -> argparse.Namespace:
    """vLLM's own arguments for this model, without its files.

    Raises ConfigError with file, line and nearest name for what vLLM's parser does not know or
    does not accept.
    """
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
    args.chat_template = config.prompt.template
    sampling = config.sampling.model_dump(exclude_none=True, exclude={"stop"})
    if "max_tokens" in sampling:  # its name in generation_config.json
        sampling["max_new_tokens"] = sampling.pop("max_tokens")
    args.override_generation_config = sampling
    args.middleware = [*args.middleware, *MIDDLEWARE]
    if "disable_uvicorn_access_log" not in given:
        args.disable_uvicorn_access_log = True
    if "use_tqdm_on_load" not in given:
        args.use_tqdm_on_load = settings.verbose
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


def _check_address(host: str, port: int) -> None:
    """Say that the port is taken now, not after a minute of loading."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or "not a host name"
        remedy = (
            "stop the program that uses it, or choose another with --port or SERVICE_PORT"
            if isinstance(e, OSError) and e.errno == errno.EADDRINUSE
            else "choose another with --host and --port, or SERVICE_HOST and SERVICE_PORT"
        )
        raise LaunchError(f"cannot listen on {host[:80]} port {port}: {reason}; {remedy}") from None


def _prepare_environment(
    folder: Path, config: ModelConfig, settings: Settings, key_hash: str | None
) -> str:
    """What every process of the server reads from its environment; `folder` must outlive them.

    Returns the name of this run, which /health/ready repeats.
    """
    instance = uuid.uuid4().hex
    process_config = folder / "config.json"
    process_config.touch(mode=0o600)
    process_config.write_text(
        ApiProcessConfig(
            model=config,
            key_hash=key_hash,
            log_prompts=settings.log_prompts,
            instance=instance,
        ).model_dump_json()
    )
    logging_config = folder / "logging.json"
    logging_config.write_text(json.dumps(logs.configuration(verbose=settings.verbose)))
    # Named ones only are loaded: ours, the other general plugins as without us, and the user's.
    plugins = {ENDPOINT_PLUGIN, GENERAL_PLUGIN}
    if chosen := os.environ.get("VLLM_PLUGINS"):
        plugins.update(chosen.split(","))
    else:
        plugins.update(plugin.name for plugin in entry_points(group="vllm.general_plugins"))
    os.environ.update(
        {
            CONFIG_VARIABLE: str(process_config),
            "VLLM_LOGGING_CONFIG_PATH": str(logging_config),
            "VLLM_PLUGINS": ",".join(sorted(plugins)),
        }
    )
    defaults = {
        # As vLLM's own command line sets it.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not settings.verbose:
        defaults |= {
            "PYTHONWARNINGS": "ignore",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TORCH_LOGS": "-torch._library.triton",
        }
        warnings.simplefilter("ignore")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ.pop("SERVICE_API_KEY", None)  # its hash is all that the other processes need
    return instance


def _load_plugins() -> None:
    """Load both plugins as vLLM will. It only logs a failure, and would serve without them."""
    for group, name in (
        ("vllm.general_plugins", GENERAL_PLUGIN),
        ("vllm.endpoint_plugins", ENDPOINT_PLUGIN),
    ):
        found: Sequence[EntryPoint] = tuple(entry_points(group=group, name=name))
        if not found:
            raise LaunchError(
                f"vLLM's plugin {name} is not installed; run `pip install` for this package again"
            )
        try:
            found[0].load()()
        except Exception as e:
            raise LaunchError(f"vLLM's plugin {name} fails to load: {_sentence(e)}") from e


def _work_around_vllm() -> None:
    """vLLM 0.32 on CPU cannot load its ahead-of-time compiled model again, and compiles at every
    start; its older cache works (15 s instead of 56 s for the embedded model on 2 cores)."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")


def _launch(args: argparse.Namespace) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args

    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


@contextmanager
def explained(settings: Settings) -> Iterator[None]:
    """Turn what vLLM raises into one sentence; --verbose keeps its traceback."""
    try:
        yield
    except ServiceError:
        raise
    except KeyboardInterrupt:  # vLLM's way to end while it is still loading
        raise LaunchError("stopped before it was ready") from None
    except Exception as e:
        if settings.verbose:
            raise
        raise LaunchError(f"vLLM could not start: {_sentence(e)} (--verbose shows all)") from e


def _sentence(error: Exception) -> str:
    """An exception as one line; pydantic's are cut down to what they say."""
    errors = getattr(error, "errors", None)
    text = str(errors()[0]["msg"]) if callable(errors) else str(error)
    return " ".join(text.removeprefix("Value error, ").split())[:500] or type(error).__name__


class _Announcer(threading.Thread):
    """Waits beside vLLM's launcher, which blocks, and says when the service answers."""

    def __init__(
        self, config: ModelConfig, settings: Settings, instance: str, *, tls: bool
    ) -> None:
        super().__init__(name="announcer", daemon=True)
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        self.url = f"http{'s' * tls}://{f'[{host}]' if ':' in host else host}:{settings.port}"
        self.model = config.name
        self.instance = instance
        self.key = settings.key_hash() is not None
        self.failure: str | None = None

    def run(self) -> None:
        trusting = ssl.create_default_context()  # we ask ourselves, whatever the name on the paper
        trusting.check_hostname = False
        trusting.verify_mode = ssl.CERT_NONE
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting)
        )
        while True:
            try:
                with opener.open(f"{self.url}/health/ready", timeout=5) as answer:
                    if json.load(answer).get("instance") == self.instance:
                        break
            except urllib.error.HTTPError as e:
                if e.code == 404:
                    self.failure = "this model does not generate text, so POST / cannot serve it"
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            except (OSError, ValueError, http.client.HTTPException):
                pass
            time.sleep(0.2)
        key = '  -H "Authorization: Bearer <the API key>" \\\n' if self.key else ""
        print(
            f"\nReady: {self.model} answers at {self.url}. Try:\n\n"
            f"curl -X POST {self.url} \\\n{key}"
            '  -d \'{"prompt": "What is the capital of France?"}\'\n\n'
            f"OpenAI clients: base_url {self.url}/v1   Metrics: {self.url}/metrics\n",
            flush=True,
        )
