"""`chat-service check`: effective values, whether the model fits, whether its prompts are right.

vLLM validates its arguments and builds its whole configuration; weights are never loaded.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from service import vllm_arguments, weights
from service.errors import WeightsError
from service.launch import float_type, server, tokenizer_choice
from service.model_config import ModelConfig, Origins, catalogue
from service.preflight import chat_template, fit
from service.prompting import Message
from service.settings import Settings
from service.weights import checkpoint
from service.weights.adapter import Adapter


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`. A problem keeps the model from being served well."""

    rows: list[tuple[str, object, str]]  # (key, effective value, its origin)
    fit: list[str]
    problems: list[str]
    warnings: list[str]


def check(
    config: ModelConfig,
    origins: Origins,
    settings: Settings,
    *,
    memory: int | None = None,
    concurrent: int = 1,
    context: int | None = None,
) -> CheckReport:
    """Check a model: its values, and with its files on this machine also fit and prompts.

    `memory` is bytes per GPU to plan for; None: this machine's. `concurrent` requests of `context`
    tokens must fit. Weights are never loaded. Raises ServiceError.
    """
    must_fit = memory is not None or context is not None or concurrent > 1
    with server.prepared(config, origins, settings) as (args, folder):
        rows = [
            (".".join(map(str, path)), value, origins.place(path))
            for path, value in _leaves(config.model_dump(exclude_unset=True))
        ]
        if args.distributed_executor_backend == vllm_arguments.CPU_EXECUTOR:
            key = "engine.distributed_executor_backend"
            rows.append((key, vllm_arguments.CPU_EXECUTOR, "faster on a CPU"))
        model = weights.present(config.source, settings.cache_dir)
        tokenizer = (
            weights.present(config.tokenizer, settings.cache_dir, weights=False)
            if config.tokenizer
            else model
        )
        adapters = _adapters(args, config, settings, model, rows, for_gpu=memory is not None)
        problems = [problem for adapter in adapters for problem in adapter.problems]
        if memory is None and (problem := vllm_arguments.pipeline_problem(args)):
            problems.append(problem)
        from service.models import cpu_int8  # imports torch, which `prepared` makes quiet

        if memory is not None and args.quantization == cpu_int8.NAME:
            problems.append(
                f"engine.quantization: {cpu_int8.NAME} is for CPUs; on a GPU use fp8_per_tensor"
            )
        adapter_warnings = [warning for adapter in adapters for warning in adapter.warnings]
        if model is None or tokenizer is None:
            known = catalogue().get(config.name) == origins.file
            name = config.name if known else origins.file
            download = f"run `chat-service download {name}` first"
            if must_fit:
                raise WeightsError(f"whether it fits is read from the model's files; {download}")
            # Without its files it is unknown whether the model is quantised.
            warnings = _float_type(args, config, rows) if config.dtype else []
            rows.append(("files", "not downloaded yet", "`serve` does it"))
            return CheckReport(
                rows,
                [f"fit and template: not checked; {download}"],
                problems,
                adapter_warnings + warnings,
            )
        rows.append(("files", str(model), "this machine"))
        vllm_arguments.use_files(args, model, tokenizer)
        if found := _of_files(args, model, tokenizer):
            return CheckReport(
                rows, ["fit and template: not checked"], [*problems, found], adapter_warnings
            )
        warnings = adapter_warnings
        warnings += _float_type(args, config, rows) if memory is None else []
        with server.explained(settings, folder):
            from vllm.platforms import current_platform

            if memory is not None:
                rows += plan_for_gpu(args, memory)
            vllm_config = vllm_arguments.engine_config(args)
            on_gpu = memory is not None or not current_platform.is_cpu()
            if memory is None:
                memory = current_platform.get_device_total_memory()
            memory_problems = [] if on_gpu else _memory_problems(vllm_config, memory)
            try:
                fit_result = fit.estimate(vllm_config, model, memory, on_gpu=on_gpu)
                lines = fit_result.lines()
                if slots := fit_result.demand.max_loras:
                    size = f"{fit_result.demand.adapters / fit.GIB:.2f} GiB on each GPU"
                    size = size if on_gpu else size.partition(" on")[0]
                    origin = f"engine.max_loras {slots} x engine.max_lora_rank {args.max_lora_rank}"
                    rows.append(("memory of adapters", size, origin))
                problems += fit_result.problems(concurrent, context)
            except WeightsError as e:
                if must_fit:
                    raise
                lines = [f"fit: not computed; {e}"]
            with rendering(args, vllm_config) as (render, loaded):
                findings = chat_template.check(render, loaded, vllm_config.model_config, config)
                if wrong := tokenizer_choice.problem(args, loaded):
                    problems.append(wrong)
        if "max_model_len" not in config.engine:
            length = vllm_config.model_config.max_model_len
            rows.append(("engine.max_model_len", length, "the model's config.json"))
        for name, value in vllm_config.model_config.get_diff_sampling_param().items():
            if getattr(config.sampling, name, None) is None:
                rows.append((f"sampling.{name}", value, "generation_config.json"))
    lines.append(f"template: {'see below' if findings.problems else 'ok'}")
    return CheckReport(
        rows, lines, memory_problems + problems + findings.problems, warnings + findings.warnings
    )


def _of_files(args: argparse.Namespace, model: Path, tokenizer: Path) -> str | None:
    """Return why `serve` would refuse these files, or None."""
    try:
        if not args.skip_tokenizer_init:
            checkpoint.check_tokenizer(tokenizer)
        if args.load_format == "auto":
            checkpoint.check(model)
    except WeightsError as e:
        return str(e)
    return None


def _adapters(
    args: argparse.Namespace,
    config: ModelConfig,
    settings: Settings,
    base: Path | None,
    rows: list[tuple[str, object, str]],
    *,
    for_gpu: bool,
) -> list[Adapter]:
    """Inspect the adapters that are here, and give vLLM those that can be served. Adds rows."""
    folders: dict[str, Path] = {}
    for name, source in config.adapters.items():
        if folder := weights.present_adapter(name, source):
            folders[name] = folder
        else:
            rows.append((f"adapters.{name}", "not downloaded yet", "`serve` does it"))
    adapters = server.inspect_adapters(args, config, folders, base, for_gpu=for_gpu)
    fitting = [adapter for adapter in adapters if not adapter.problems]
    rows += vllm_arguments.use_adapters(args, config, fitting)
    return adapters


def _float_type(
    args: argparse.Namespace, config: ModelConfig, rows: list[tuple[str, object, str]]
) -> list[str]:
    """Choose the float type. Adds a row if it is not the model's; warns if it is slow."""
    reason = float_type.choose(args, config)
    if reason and float_type.insists(config):
        return [f"engine.dtype: {reason}"]
    if reason:
        rows.append(("engine.dtype", args.dtype, reason))
    return []


def _memory_problems(vllm_config: Any, memory: int) -> list[str]:
    """Return a problem if vLLM's share of the CPU's memory is not free, as it must be at start."""
    cache = vllm_config.cache_config
    wanted, free = memory * cache.gpu_memory_utilization, psutil.virtual_memory().available
    if cache.kv_cache_memory_bytes is not None or wanted <= free:
        return []
    return [
        f"only {free / fit.GIB:.1f} GiB of memory are free, and vLLM wants {wanted / fit.GIB:.1f}; "
        "set engine.kv_cache_memory_bytes, such as 2G"
    ]


def plan_for_gpu(args: argparse.Namespace, memory: int) -> list[tuple[str, object, str]]:
    """Set vLLM's batch defaults for a GPU of `memory` bytes (EngineArgs.get_batch_defaults).

    Returns rows for values that differ between GPUs of this size.
    """
    sequences, tokens = 256, 2048
    if memory >= 70 * fit.GIB:
        sequences, tokens = 1024, 8192
    if memory >= 160 * fit.GIB:
        tokens = 16384
    rows: list[tuple[str, object, str]] = []
    for name, value, a100_value in (
        ("max_num_seqs", sequences, 256),
        ("max_num_batched_tokens", tokens, 2048),
    ):
        if getattr(args, name) is None:
            setattr(args, name, value)
            if 70 * fit.GIB <= memory < 160 * fit.GIB:
                rows.append((f"engine.{name}", value, f"of an H100 or H200; an A100: {a100_value}"))
    return rows


@contextmanager
def rendering(
    args: argparse.Namespace, vllm_config: Any
) -> Iterator[tuple[chat_template.Render, Any]]:
    """Yield a `Render` that works as the server does, and the tokenizer.

    Follows vLLM's init_app_state and `api.engine.Engine`.
    """
    try:
        from vllm.entrypoints.common.cli_args import resolve_default_chat_template_kwargs
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
    from vllm.renderers import renderer_from_config
    from vllm.renderers.chat_utils import load_chat_template

    from service.api.fast_render import chat_params

    renderer = renderer_from_config(vllm_config)
    chat = chat_params(
        load_chat_template(args.chat_template),
        args.chat_template_content_format,
        resolve_default_chat_template_kwargs(args),
    )

    def render(prompt: list[Message] | str, add_generation_prompt: bool) -> list[int]:
        if isinstance(prompt, str):
            (rendered,) = renderer.render_cmpl([{"prompt": prompt}])
        else:
            kwargs = {**chat.chat_template_kwargs, "add_generation_prompt": add_generation_prompt}
            _, (rendered,) = renderer.render_chat(
                [prompt], replace(chat, chat_template_kwargs=kwargs)
            )
        ids: list[int] = rendered["prompt_token_ids"]
        return ids

    try:
        yield render, renderer.get_tokenizer()
    finally:
        renderer.shutdown()


def _leaves(
    section: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value
