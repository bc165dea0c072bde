"""Converts a model's YAML and the settings to vLLM's arguments."""

import argparse
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from service.errors import WeightsError
from service.model_config import InvalidConfig, Mistake, ModelConfig, Origins, nearest
from service.model_config.schema import Sampling
from service.settings import Settings
from service.weights import adapter
from service.weights.adapter import Adapter, Limits
from service.weights.tensor_files import read_config, read_object

if TYPE_CHECKING:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

# Runs a single CPU worker inside the engine process.
CPU_EXECUTOR = "service.models.cpu_executor.CpuExecutor"

# vLLM argument -> the key or setting that decides it here.
_OWNED = {
    "model": "source",
    "model_tag": "source",
    "revision": "source.revision",
    "tokenizer": "tokenizer",
    "tokenizer_revision": "tokenizer.revision",
    "served_model_name": "name and aliases",
    "chat_template": "prompt.template",
    "override_generation_config": "sampling",
    "host": "--host",
    "port": "--port",
    "api_key": "SERVICE_API_KEY",
    "hf_token": "the environment variable HF_TOKEN",
    "log_config_file": "--verbose",
}
# Sampling defaults that vLLM takes from generation_config.json -> their names in a request.
_DEFAULTS = {
    **{key: key for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    **{key: key for key in ("presence_penalty", "frequency_penalty")},
    "max_new_tokens": "max_tokens",
}
# vLLM argument -> why it must not be set.
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
# vLLM argument -> what does what its value "ray" is for. Ray copies variables to workers on other
# machines that name files of this one, such as that of the logging.
_RAY = {
    "distributed_executor_backend": "leave it out for the GPUs of one machine, or use "
    "`chat-service cluster` for several",
    "data_parallel_backend": "use `chat-service cluster` for replicas on several machines",
}

# Arguments whose value is one of vLLM's names, and the argument that adds names of the user's own.
_NAMES = {
    "tool_call_parser": "tool_parser_plugin",
    "reasoning_parser": "reasoning_parser_plugin",
    "quantization": None,
}


def arguments(config: ModelConfig, origins: Origins, settings: Settings) -> argparse.Namespace:
    """Return vLLM's arguments for a model, without its files.

    Raises InvalidConfig with all values that vLLM's parser does not accept.
    """
    args, mistakes = parse(config.engine, origins)
    if mistakes:
        raise InvalidConfig(mistakes, origins)
    names = config.engine.keys()
    args.host, args.port = settings.host, settings.port
    args.root_path = root_path(config)
    args.served_model_name = [config.name, *config.aliases]
    if config.dtype and "dtype" not in names:
        args.dtype = config.dtype
    args.chat_template = config.prompt.template
    sampling = config.sampling.model_dump(exclude_none=True, exclude={"stop"})
    if "max_tokens" in sampling:  # its name in generation_config.json
        sampling["max_new_tokens"] = sampling.pop("max_tokens")
    args.override_generation_config = sampling
    if "shutdown_timeout" not in names and not serves_here(args):
        # By default vLLM's parent process kills its API processes at once.
        args.shutdown_timeout = math.ceil(settings.drain_timeout) + 10
    if "disable_uvicorn_access_log" not in names:
        args.disable_uvicorn_access_log = True
    if "enable_offline_docs" not in names:
        args.enable_offline_docs = True  # else /docs needs a CDN, which not all users can reach
    if "use_tqdm_on_load" not in names:
        args.use_tqdm_on_load = settings.verbose
    if "distributed_executor_backend" not in names and _is_one_cpu(args):
        args.distributed_executor_backend = CPU_EXECUTOR
    return args


def parse(engine: Mapping[str, Any], origins: Origins) -> tuple[argparse.Namespace, list[Mistake]]:
    """Return vLLM's arguments with those of a YAML's `engine`, and what is wrong with these."""
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
    mistakes = []
    for name, value in engine.items():
        try:
            parsed = _parse(parser, name, value)
            if parsed and name in _NAMES and not engine.get(_NAMES[name] or ""):
                if parsed not in (known := _known(name)):
                    kind = name.removeprefix("tool_call_").removeprefix("reasoning_")
                    raise ValueError(f"vLLM has no such {kind}{nearest(str(parsed), known)}")
            setattr(args, name, parsed)
        except ValueError as e:
            mistakes.append(origins.mistake(("engine", name), str(e)))
    return args, mistakes


def _known(name: str) -> list[str]:
    """Return the names that vLLM has for an argument of `_NAMES`."""
    if name == "quantization":
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

        return list(QUANTIZATION_METHODS)
    if name == "tool_call_parser":
        from vllm.tool_parsers import ToolParserManager

        return list(ToolParserManager.list_registered())
    from vllm.reasoning import ReasoningParserManager

    return list(ReasoningParserManager.list_registered())


def root_path(config: ModelConfig) -> str:
    """Return the prefix that a proxy in front of us may keep, such as "/llm", or ""."""
    prefix = str(config.engine.get("root_path") or "").strip("/")
    return f"/{prefix}" if prefix else ""


def engine_config(args: argparse.Namespace) -> Any:
    """Return vLLM's VllmConfig for these arguments, which must name the model's files."""
    from vllm import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    engine_args = AsyncEngineArgs.from_cli_args(args)
    return engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)


def use_files(args: argparse.Namespace, model: Path, tokenizer: Path) -> None:
    """Set the model's files, and temperature 0 if generation_config.json has no `do_sample`.

    transformers is greedy then, whatever the temperature, but vLLM does not read `do_sample`.
    Raises WeightsError.
    """
    args.model, args.tokenizer = str(model), str(tokenizer)
    file = model / "generation_config.json"
    generation = read_object(file) if file.exists() else {}
    if not generation.get("do_sample"):
        args.override_generation_config.setdefault("temperature", 0.0)
    if args.generation_config == "auto":
        _check_defaults(file, generation, args.override_generation_config)


def _check_defaults(file: Path, generation: Mapping[str, Any], over: Mapping[str, Any]) -> None:
    """Raise WeightsError for a default in generation_config.json that vLLM rejects.

    `over` are the values that come before those of the file.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    for name, param in _DEFAULTS.items():
        if (value := generation.get(name)) is None or name in over:
            continue
        try:
            SamplingParams(**{param: value})
        except (VLLMValidationError, ValueError, TypeError) as e:
            yaml = (
                f"set sampling.{param} in the YAML, or " if param in Sampling.model_fields else ""
            )
            reason = " ".join(str(e).split())[:200]
            raise WeightsError(
                f"{file}: vLLM does not take {name} {str(value)[:40]}: {reason}; {yaml}correct it"
            ) from None


def use_adapters(
    args: argparse.Namespace, config: ModelConfig, adapters: Sequence[Adapter]
) -> list[tuple[str, object, str]]:
    """Let vLLM load these adapters, all of which one batch may hold.

    Values of the YAML's `engine` stay. Returns a row (key, value, origin) for each that was chosen.
    """
    if not adapters:
        return []
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    args.enable_lora = True
    args.lora_modules = [
        *(args.lora_modules or ()),
        *(LoRAModulePath(a.name, str(a.folder.absolute())) for a in adapters),
    ]
    count = len(args.lora_modules)
    rows: list[tuple[str, object, str]] = []
    for name, value, origin in (
        ("max_lora_rank", adapter.largest_rank(adapters), "the adapters' weights"),
        ("max_loras", count, "the number of adapters"),
    ):
        if name not in config.engine:
            setattr(args, name, value)
            rows.append((f"engine.{name}", value, origin))
    if "max_cpu_loras" not in config.engine:
        args.max_cpu_loras = max(count, args.max_loras)  # none is read again from the disk
    return rows


def adapter_limits(model: Path, *, for_gpu: bool = False) -> Limits | None:
    """Return what adapters can change in the model of a folder, on this machine or on a GPU.

    None if vLLM does not know its architecture.
    """
    from vllm import ModelRegistry, envs

    if not (model / "config.json").is_file():
        return None
    config = read_config(model)
    # Multi-head latent attention (MLA) reads this matrix once, when it is loaded.
    absorbed = {"kv_b_proj"} if config.get("kv_lora_rank") and not envs.VLLM_MLA_DISABLE else set()
    for architecture in config.get("architectures") or ():
        if found := ModelRegistry.models.get(architecture):
            tables = getattr(found.load_model_cls(), "embedding_modules", None) or ()
            return Limits(tables, absorbed, experts=for_gpu or not on_cpu())
    return None


def serves_here(args: argparse.Namespace) -> bool:
    """Whether vLLM serves in this process instead of starting API processes.

    Must decide like ServeSubcommand.cmd.
    """
    if args.data_parallel_multi_port_external_lb:
        return False  # vLLM's supervisor starts one server per rank
    if args.enable_elastic_ep:
        return True
    if args.api_server_count is not None:
        return bool(args.api_server_count == 1)
    if args.data_parallel_external_lb or args.data_parallel_rank is not None:
        return True
    if args.data_parallel_hybrid_lb or args.data_parallel_start_rank is not None:
        return (args.data_parallel_size_local or 1) == 1
    return bool(args.data_parallel_size == 1)


def _parse(parser: "FlexibleArgumentParser", name: str, value: object) -> object:
    """Parse one YAML value with vLLM's command line parser. Raises ValueError."""
    if name in _OWNED:
        raise ValueError(f"given by {_OWNED[name]} here")
    if name in _REFUSED:
        raise ValueError(f"cannot be set: {_REFUSED[name]}")
    from service.models.vllm_private import actions_of, appends

    actions = actions_of(parser)
    if name not in actions:
        raise ValueError(f"vLLM has no such argument{nearest(name, actions)}")
    action = actions[name]
    flag, no_flag = f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"
    try:
        if value is None or (value is False and no_flag not in action.option_strings):
            words = []  # leave the flag out: off, or vLLM's default
        elif isinstance(value, bool) and action.nargs == 0:
            words = [flag if value else no_flag]
        elif isinstance(value, list) and appends(action):
            words = [f"{flag}={v}" for v in value]
        elif isinstance(value, list) and action.nargs:
            words = [flag, *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
        elif isinstance(value, dict | list):
            words = [flag, json.dumps(value)]
        else:
            words = [f"{flag}={value}"]
        parsed: object = getattr(parser.parse_args(words), name)
    except (ValueError, TypeError, argparse.ArgumentError) as e:
        reason = str(e).partition(": ")[2] or str(e)
        reason = re.sub(r"<function (\w+) at \w+>", r"\1", reason)
        raise ValueError(" ".join(reason.split())[:300]) from None
    if name in _RAY and parsed == "ray":
        raise ValueError(f"cannot be ray: {_RAY[name]}")
    if name == "api_server_count" and isinstance(parsed, int) and parsed < 1:
        raise ValueError("must be 1 or more")
    return parsed


def on_cpu() -> bool:
    """Whether vLLM runs on a CPU here."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def pipeline_problem(args: argparse.Namespace) -> str | None:
    """Say why a pipeline cannot be served: vLLM 0.32's workers on a CPU cannot receive anything."""
    if args.pipeline_parallel_size > 1 and on_cpu():
        return (
            "engine.pipeline_parallel_size: vLLM has no pipeline on a CPU; use "
            "engine.tensor_parallel_size"
        )
    return None


def _is_one_cpu(args: argparse.Namespace) -> bool:
    """Whether a single worker runs on a CPU with one NUMA node and no thread binding."""
    sizes = (args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size)
    return (
        on_cpu()
        and set(sizes) == {1}
        and len([*Path("/sys/devices/system/node").glob("node[0-9]*")]) <= 1
        and os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") == "nobind"
    )
