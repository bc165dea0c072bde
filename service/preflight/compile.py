"""`chat-service compile`: compiles a model for this CPU, and measures the gain."""

import argparse
import copy
import gc
import json
import os
import random
import sys
import time
from dataclasses import asdict
from typing import Any

from service import vllm_arguments
from service.errors import ConfigError, LaunchError
from service.launch import compile_cache, server
from service.model_config import ModelConfig, Origins
from service.settings import Settings

_PROMPT_TOKENS, _ANSWER_TOKENS = 48, 24
_ROUNDS = 3
_MAX_NOISE = 2.0  # two measurements of the same differ by this factor at most


def make(config: ModelConfig, origins: Origins, settings: Settings) -> compile_cache.Compiled:
    """Compile for later starts of `serve`, and measure the gain. Raises ServiceError."""
    if chosen := compile_cache.CHOICES & config.engine.keys():
        place = origins.of(("engine", sorted(chosen)[0]))
        raise ConfigError(f"{place}: decides whether `serve` compiles; leave it out")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with server.prepared(config, origins, settings) as (args, folder):
        if not vllm_arguments.on_cpu():
            raise ConfigError("on a GPU `serve` compiles by itself, in a minute or two")
        server.fetch_files(args, config, settings)
        file = compile_cache.file(args)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            (part := file.with_suffix(".part")).touch()
            part.unlink()
        except OSError as e:
            raise ConfigError(
                f"cannot write to {file.parent}: {e.strerror}; choose another folder with "
                "SERVICE_CACHE_DIR"
            ) from None
        with server.explained(settings, folder):
            _use_server_sizes(args)
            print("Measuring without compiled code ...", file=sys.stderr, flush=True)
            eager = _measure(args, enforce_eager=True)
            print("Compiling, which takes some minutes ...", file=sys.stderr, flush=True)
            compiled = _measure(args, enforce_eager=False)
            print("Measuring once more without it ...", file=sys.stderr, flush=True)
            again = _measure(args, enforce_eager=True)
    if any(max(pair) > _MAX_NOISE * min(pair) for pair in zip(eager, again, strict=True)):
        raise LaunchError(
            f"without compiled code it made {_rates(eager)} tokens/s before and {_rates(again)} "
            "after: something else used the processor. Stop that, and run it again: what is "
            "compiled is kept"
        )
    best = [max(pair) for pair in zip(eager, again, strict=True)]
    result = compile_cache.Compiled(best, compiled)
    part.write_text(json.dumps(asdict(result)))
    part.replace(file)
    return result


def _rates(speeds: list[float]) -> str:
    return " and ".join(f"{speed:.1f}" for speed in speeds)


def _use_server_sizes(args: argparse.Namespace) -> None:
    """Use the server's default sizes in vLLM's LLM class: the compiled code depends on them."""
    sizes = vllm_arguments.engine_config(args).scheduler_config
    args.max_num_batched_tokens = sizes.max_num_batched_tokens
    args.max_num_seqs = sizes.max_num_seqs


def _measure(args: argparse.Namespace, *, enforce_eager: bool) -> list[float]:
    """Return tokens/s for each of compile_cache.BATCHES."""
    from vllm import LLM, EngineArgs

    args = copy.copy(args)
    args.enforce_eager = enforce_eager
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
    _tokens_per_second(llm, 1)  # warm-up: the first run allocates
    speeds = [
        max(_tokens_per_second(llm, batch) for _ in range(_ROUNDS))
        for batch in compile_cache.BATCHES
    ]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()  # free the memory for the next engine
    return speeds


def _tokens_per_second(llm: Any, batch: int) -> float:
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = [
        {"prompt_token_ids": random.choices(range(vocabulary), k=_PROMPT_TOKENS)}
        for _ in range(batch)
    ]
    sampling = SamplingParams(max_tokens=_ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return batch * _ANSWER_TOKENS / (time.perf_counter() - began)
