"""`chat-service verify`: compares the engine with the reference on the user's own files.

The engine answers some prompts greedily. The reference reads the same tokens, and its choice at
each is compared with the engine's.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import prompting
from service.errors import WeightsError
from service.launch import server
from service.model_config import ModelConfig, Origins
from service.preflight import chat_template, check
from service.preflight.chat_template import StopToken
from service.settings import Settings

PROMPTS = (
    "你好",
    "Who are you?",
    "Which mountain is the highest in Shandong Province? Is it higher or lower than Huangshan?",
    "山东省最高的山是哪座山？🏔️",
)
# (mean over a prompt, maximum) difference that rounding may cause between log probabilities of the
# engine and a float32 reference, in nats. Measured on tiny checkpoints: mean 0.02 to 0.11, maximum
# 0.07 to 1.2 in bfloat16; 5e-6 and 3e-5 in float32.
_TOLERANCE = {
    "float32": (1e-4, 1e-3),
    "float16": (0.02, 0.2),
    "bfloat16": (0.15, 1.5),
    "cpu_int8": (0.5, 5.0),
}


@dataclass(frozen=True)
class Divergence:
    """The first token at which the reference chooses another than the engine."""

    position: int  # in the answer, from 0
    engine: str
    reference: str
    gap: float  # log probability of the reference's token minus the engine's, in nats


@dataclass(frozen=True)
class Comparison:
    """One prompt as the model reads it, and how far the engine and the reference agree."""

    prompt: str
    rendered: str
    token_ids: list[int]
    tokens: int  # in the engine's answer
    agreeing: int  # tokens before the first divergence
    divergence: Divergence | None
    largest_difference: float  # over the engine's likeliest tokens, in nats
    mean_difference: float
    adapter: str | None = None


@dataclass(frozen=True)
class Verification:
    model: str
    files: str
    dtype: str
    comparisons: list[Comparison]
    stop_tokens: list[StopToken]
    problems: list[str]  # empty: the engine and the reference agree

    @property
    def verdict(self) -> str:
        if self.problems:
            return "different"
        if any(comparison.divergence for comparison in self.comparisons):
            return f"equal within the rounding of {self.dtype}"
        return "equal"


def verify(
    config: ModelConfig,
    origins: Origins,
    settings: Settings,
    *,
    prompts: Sequence[str] = PROMPTS,
    tokens: int = 24,
) -> Verification:
    """Run the engine as `serve` would, then the reference. Raises ServiceError."""
    # Run the engine in this process, so that its memory is free for the reference.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with server.prepared(config, origins, settings) as (args, folder):
        server.fetch_files(args, config, settings)
        server.choose_compiled(args, config)
        with server.explained(settings, folder):
            answers, dtype, stop_tokens = _ask_engine(args, config, prompts, tokens)
    from service.preflight import reference

    logits: list[Any] = []
    try:
        for adapter, group in itertools.groupby(answers, lambda answer: answer.adapter):
            sequences = [answer.prompt_ids + answer.token_ids for answer in group]
            folder_of = Path(adapter.path) if adapter else None
            logits += reference.logits(Path(args.model), sequences, folder_of)
    except KeyError as e:
        raise WeightsError(f"the reference cannot run: config.json has no {e}") from e
    except (ImportError, ValueError, RuntimeError) as e:
        raise WeightsError(f"the reference cannot run: {' '.join(str(e).split())[:300]}") from e
    comparisons = [_compare(answer, rows) for answer, rows in zip(answers, logits, strict=True)]
    return Verification(
        config.name,
        args.model,
        dtype,
        comparisons,
        stop_tokens,
        [*_problems(comparisons, dtype), *chat_template.missing(stop_tokens)],
    )


@dataclass(frozen=True)
class _Answer:
    prompt: str
    rendered: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[dict[int, float]]  # for each answer token: id -> logprob of the likeliest
    texts: dict[int, str]  # id -> text, for all ids in logprobs
    adapter: Any  # vLLM's LoRAModulePath, or None for the base


def _ask_engine(
    args: Any, config: ModelConfig, prompts: Sequence[str], tokens: int
) -> tuple[list[_Answer], str, list[StopToken]]:
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True)
    with check.rendering(args, llm.llm_engine.vllm_config) as (render, tokenizer):
        rendered = [
            {"prompt_token_ids": render(prompting.render(prompt, None, config.prompt), True)}
            for prompt in prompts
        ]
    adapters = [None, *(args.lora_modules or ())]
    requests = [
        adapter and LoRARequest(adapter.name, number, adapter.path)
        for number, adapter in enumerate(adapters)
        for _ in prompts
    ]
    outputs = llm.generate(
        rendered * len(adapters), sampling, lora_request=requests, use_tqdm=False
    )
    answers = []
    questions = itertools.product(adapters, prompts)
    for (adapter, prompt), output in zip(questions, outputs, strict=True):
        (completion,) = output.outputs
        places = [{id: p.logprob for id, p in place.items()} for place in completion.logprobs]
        texts = {id: tokenizer.decode([id]) for place in places for id in place}
        ids = list(output.prompt_token_ids)
        answers.append(
            _Answer(
                prompt,
                tokenizer.decode(ids),
                ids,
                list(completion.token_ids),
                places,
                texts,
                adapter,
            )
        )
    model = llm.llm_engine.model_config
    stop_tokens = chat_template.stop_tokens(tokenizer, model, config)
    llm.llm_engine.engine_core.shutdown()
    rounding = model.quantization or str(model.dtype).removeprefix("torch.")
    return answers, rounding, stop_tokens


def _compare(answer: _Answer, logits: Any) -> Comparison:
    """Compare an answer with the reference's `logits`, [prompt and answer, vocabulary]."""
    # The row of a token predicts the next token.
    rows = logits[len(answer.prompt_ids) - 1 : -1].log_softmax(-1)
    differences = [
        abs(logprob - float(row[id]))
        for row, place in zip(rows, answer.logprobs, strict=True)
        for id, logprob in place.items()
    ]
    divergence = None
    agreeing = 0
    for chosen, row in zip(answer.token_ids, rows, strict=True):
        best = int(row.argmax())
        if best != chosen:
            gap = float(row[best] - row[chosen])
            texts = answer.texts
            divergence = Divergence(agreeing, texts[chosen], texts.get(best, f"token {best}"), gap)
            break
        agreeing += 1
    return Comparison(
        answer.prompt,
        answer.rendered,
        answer.prompt_ids,
        len(answer.token_ids),
        agreeing,
        divergence,
        max(differences),
        sum(differences) / len(differences),
        answer.adapter.name if answer.adapter else None,
    )


def _problems(comparisons: Sequence[Comparison], dtype: str) -> list[str]:
    # Other quantisations round as coarsely as 8 bits, or more so.
    max_mean, max_difference = _TOLERANCE.get(dtype, _TOLERANCE["cpu_int8"])
    problems = []
    for number, comparison in enumerate(comparisons, 1):
        divergence = comparison.divergence
        if divergence and divergence.gap > max_difference:
            problems.append(
                f"prompt {number}, token {divergence.position}: the engine says "
                f"{divergence.engine!r}, the reference {divergence.reference!r}, which it finds "
                f"likelier by {divergence.gap:.3g} nats"
            )
        mean, largest = comparison.mean_difference, comparison.largest_difference
        if not (mean <= max_mean and largest <= max_difference):  # true also for NaN
            problems.append(
                f"prompt {number}: log probabilities differ by {mean:.3g} nats on average and "
                f"{largest:.3g} at most; rounding to {dtype} makes {max_mean:g} and "
                f"{max_difference:g}"
            )
    return problems
