"""vLLM's engine in this process, on tiny checkpoints: it starts in two seconds.

`python -m tests.engine RUNS` is a process for engines with several workers (`on_workers`).
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# Short, long enough for three steps of prefill, and one token over a KV block.
PROMPTS = [
    torch.randint(4, 448, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (5, 17, 150)
]
TOKENS = 24
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",
    # Two engines on two cores would share one of them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True)
class Answer:
    """To one of PROMPTS: greedy tokens, the likeliest at each place, and cached prompt tokens."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int


@contextmanager
def imports_are_no_garbage() -> Iterator[None]:
    """Keep the garbage collector away from all that is imported, whatever vLLM does.

    vLLM collects seven times for each engine, which is most of the life of a tiny one.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
    with mock.patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None):
        yield


class PipelineStage:
    """Gives a worker what vLLM 0.32 forgets on a CPU: where to put what the stage before it sends.

    On a GPU, vLLM's first dummy run makes it.
    """

    model_runner: Any

    def make_buffers(self) -> None:
        runner = self.model_runner
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
        )


@contextmanager
def engine(folder: Path, **arguments: Any) -> Iterator[Any]:
    """vLLM's LLM. It changes the environment of its process, which is put back."""
    with mock.patch.dict(os.environ, ENVIRONMENT), imports_are_no_garbage():
        from vllm import LLM

        llm = LLM(
            str(folder),
            **{
                "skip_tokenizer_init": True,
                "dtype": "float32",
                "enforce_eager": True,
                "kv_cache_memory_bytes": 64 << 20,
                "max_num_batched_tokens": 64,
                "max_num_seqs": 8,
                "block_size": 32,
                "use_tqdm_on_load": False,
                "worker_extension_cls": f"tests.engine.{PipelineStage.__name__}",
                **arguments,
            },
        )
        try:
            if "pipeline_parallel_size" in arguments:
                llm.collective_rpc("make_buffers")
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def ask(llm: Any, prompts: Sequence[list[int]] = PROMPTS, lora: str | None = None) -> list[Answer]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(
            temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False
        ),
        lora_request=LoRARequest("adapter", 1, lora) if lora else None,
        use_tqdm=False,
    )
    return [
        Answer(
            list(output.outputs[0].token_ids),
            [{id: p.logprob for id, p in place.items()} for place in output.outputs[0].logprobs],
            output.num_cached_tokens,
        )
        for output in outputs
    ]


def on_workers(runs: str) -> None:
    """Print the answers of engines with several workers, one engine after the other, as JSON.

    `runs` is a JSON list of [arguments of the engine, checkpoint, adapter or null].
    """
    from vllm.envs import enable_envs_cache

    # A thread for each worker: more would wait for each other on two cores.
    os.environ |= ENVIRONMENT | {"VLLM_WORKER_MULTIPROC_METHOD": "fork", "OMP_NUM_THREADS": "1"}
    answers = []
    for arguments, checkpoint, lora in json.loads(runs):
        # Workers inherit what is imported here. vLLM changes the variable on a CPU, after this.
        enable_envs_cache()
        with engine(Path(checkpoint), **arguments) as llm:
            answers.append([asdict(answer) for answer in ask(llm, lora=lora)])
    print(json.dumps(answers))


# For `warm.run`: the same in a fork of a process that has imported vLLM.
FORKED = ("-c", "import sys; from tests import engine; engine.on_workers(sys.argv[1])")


def read(done: "subprocess.CompletedProcess[str]") -> list[list[Answer]]:
    """Return what a process of `on_workers` has printed."""
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads(done.stdout.splitlines()[-1])
    return [[Answer(**answer) for answer in answers] for answers in runs]


if __name__ == "__main__":
    on_workers(sys.argv[1])
