"""All uses of private names of vLLM 0.32 and of Python, and all replacements of their functions."""

import argparse
import functools
import inspect
import os
import sys
from argparse import Action, ArgumentParser
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from transformers.models.auto import tokenization_auto
from vllm.exceptions import VLLMValidationError
from vllm.tokenizers import detokenizer_utils, registry
from vllm.transformers_utils import config as vllm_config
from vllm.transformers_utils import utils
from vllm.v1.engine import utils as engine_processes
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import penalties, topk_topp_sampler
from vllm.v1.structured_output import backend_xgrammar

from service.models.nucleus import keep_nucleus

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.v1.engine.async_llm import AsyncLLM

_vllm_restore_leading_spaces = detokenizer_utils._restore_leading_spaces
_vllm_apply_penalties = penalties.apply_penalties
_vllm_apply_top_k_top_p = topk_topp_sampler.apply_top_k_top_p


def _replace(owner: Any, name: str, new: Any) -> None:
    """Set an attribute that exists. Raises AttributeError if a new version has renamed it."""
    getattr(owner, name)
    setattr(owner, name, new)


def assume_model_type(architecture: str, model_type: str) -> None:
    """Load a config.json that names `architecture` but has no model_type as `model_type`."""
    vllm_config._ARCHITECTURE_TO_MODEL_TYPE[architecture] = model_type


def ignore_hidden_weights() -> None:
    """Make vLLM read no header of a hidden file, such as `._model.safetensors` of macOS.

    It guesses a dtype that config.json lacks from all headers, and skips such files otherwise.
    """

    def read(file: Path) -> dict[str, Any]:
        hidden = file.name.startswith(".")
        return {} if hidden else utils.parse_safetensors_file_metadata(file)

    _replace(vllm_config, "parse_safetensors_file_metadata", read)


def spell_ids_without_token() -> None:
    """Let log probabilities spell ids that the tokenizer lacks, as "".

    A model whose vocabulary is padded has such ids, and a request can ask for one by `logit_bias`.
    vLLM 0.32 fails on them if the tokenizer marks spaces by Metaspace, and the server ends.
    """

    def restore(raw_token: str | None, token: str, marker: str) -> Any:
        return _vllm_restore_leading_spaces(raw_token or "", token, marker)

    _replace(detokenizer_utils, "_restore_leading_spaces", restore)


def let_tokenizer_mode_decide(model_type: str) -> None:
    """Load a model type's tokenizer by its tokenizer mode.

    vLLM 0.32 overrides every mode for some types with TokenizersBackend, which numbers InternLM2's
    control tokens wrongly. Transformers' own list, which AutoTokenizer reads, does so for "auto".
    """
    registry._MODEL_TYPES_WITH_INCORRECT_TOKENIZER_CLASS.discard(model_type)
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(model_type)


def stop_every_answer(
    client: "EngineClient", strings: Sequence[str], token_ids: Sequence[int]
) -> None:
    """Make an engine client end each answer also at these strings and tokens.

    Wraps the client's `generate`, which all routes call: vLLM's routes have no default for stop
    strings, and only two have one for stop tokens.
    """
    if not strings and not token_ids:
        return
    generate = client.generate

    def generate_and_stop(prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if sampling_params.detokenize:  # else there is no text to search
            missing = [s for s in strings if s not in sampling_params.stop]
            sampling_params.stop = [*sampling_params.stop, *missing]
        missing_ids = [id for id in token_ids if id not in sampling_params.stop_token_ids]
        sampling_params.stop_token_ids = [*sampling_params.stop_token_ids, *missing_ids]
        sampling_params.all_stop_token_ids.update(missing_ids)
        return generate(prompt, sampling_params, *args, **kwargs)

    _replace(client, "generate", generate_and_stop)


def watch_sequences(client: "AsyncLLM", note: Callable[[int, Any], None]) -> None:
    """Call `note` for each sequence that a request gives to the engine, in the request's context.

    Its arguments are the prompt's tokens, 0 for further sequences of one prompt, and vLLM's
    statistics of the sequence, whose `num_generation_tokens` grows. They are right on every route,
    however the request ends. Nothing is added to a step. What fails here is the client's error: a
    value that vLLM has not checked.
    """
    processor = client.output_processor
    add = processor.add_request

    def add_and_note(
        request: Any, prompt: Any, parent: Any = None, index: int = 0, queue: Any = None
    ) -> None:
        try:
            if not index:  # vLLM cannot send an integer of more than 64 bits to its engine
                msgspec.msgpack.encode(request.sampling_params, enc_hook=lambda _: None)
            add(request, prompt, parent, index, queue)
        except (AttributeError, OverflowError, TypeError) as e:
            raise VLLMValidationError("a parameter has a value that it cannot have") from e
        sequence = processor.request_states[request.request_id]
        note(0 if index else sequence.prompt_len, sequence.stats)

    _replace(processor, "add_request", add_and_note)


def check_grammars(check: Callable[[Any], object]) -> None:
    """Call `check` with vLLM's StructuredOutputsParams before vLLM compiles them, in this process.

    All requests pass here, whichever keys the grammar came from. What `check` raises ends one.
    """
    validate = inspect.unwrap(backend_xgrammar.validate_xgrammar_grammar)

    @functools.wraps(validate)
    def check_and_validate(sampling_params: Any) -> None:
        if sampling_params.structured_outputs is not None:
            check(sampling_params.structured_outputs)
        validate(sampling_params)

    _replace(backend_xgrammar, "validate_xgrammar_grammar", check_and_validate)


def change_conversations(renderer: Any, change: Callable[[Sequence[Any]], list[Any]]) -> None:
    """Make a renderer render `change(messages)`. All chat routes call it; completions do not."""
    render, render_async = renderer.render_messages, renderer.render_messages_async
    for name, function in (("render_messages", render), ("render_messages_async", render_async)):
        _replace(renderer, name, lambda messages, *args, f=function: f(change(messages), *args))


def hide_paths(models: Any) -> None:
    """Show names for the folders in /v1/models. `models` is OpenAIServingModels.

    An alias has the model's name as its root. The engine needs the adapters' paths themselves, in
    the requests that vLLM keeps.
    """
    show = models.show_available_models

    async def show_names() -> Any:
        listed = await show()
        for card in listed.data:
            card.root = card.id if card.parent else models.base_model_paths[0].name
        return listed

    _replace(models, "show_available_models", show_names)


def shorten_error_texts(limit: int) -> None:
    """Make vLLM sanitise only the first `limit` characters of an error's text.

    The text echoes input, and sanitising a megabyte of slashes takes minutes. We use no more of it.
    """
    from vllm.entrypoints.serve.exception_handling import error_response
    from vllm.entrypoints.serve.exception_handling.handlers import http, validation
    from vllm.entrypoints.serve.exception_handling.utils import sanitize_message

    def shorten(message: str) -> str:
        cleaned: str = sanitize_message(message[:limit])
        return cleaned

    for module in (error_response, http, validation):
        _replace(module, "sanitize_message", shorten)


def use_fast_penalties() -> None:
    """Make vLLM's sampler use our `apply_penalties`.

    vLLM's own makes a dozen passes over the whole vocabulary for each sequence, which takes a
    quarter of a step on a CPU. Nearly all tutorials use a repetition penalty.
    """
    _replace(penalties, "apply_penalties", apply_penalties)


def apply_penalties(
    logits: torch.Tensor,
    prompt_tokens: torch.Tensor,
    output_tokens: torch.Tensor,
    presence_penalties: torch.Tensor,
    frequency_penalties: torch.Tensor,
    repetition_penalties: torch.Tensor,
) -> torch.Tensor:
    """Bitwise equal to vllm.model_executor.layers.utils.apply_penalties, but faster.

    Changes `logits` [sequences, vocabulary], float32, in place. Tokens are [sequences, max tokens],
    padded with the vocabulary size; penalties are [sequences]. A batch with a presence or frequency
    penalty uses vLLM's function.
    """
    if presence_penalties.any() or frequency_penalties.any():
        result: torch.Tensor = _vllm_apply_penalties(
            logits,
            prompt_tokens,
            output_tokens,
            presence_penalties,
            frequency_penalties,
            repetition_penalties,
        )
        return result
    tokens = torch.cat((prompt_tokens, output_tokens), 1)
    row, column = (tokens < logits.shape[1]).nonzero(as_tuple=True)
    token, penalty = tokens[row, column], repetition_penalties[row]
    before = logits[row, token]
    # A token that occurs twice is written twice, with the same value.
    logits[row, token] = before * torch.where(before > 0, 1 / penalty, penalty)
    return logits


def use_fast_top_p() -> None:
    """Make vLLM's sampler use our `apply_top_k_top_p`. For a CPU.

    vLLM's own sorts the whole vocabulary where a request has a `top_p`, as nearly all tutorials'
    have: 6 ms a sequence for 49,152 tokens.
    """
    _replace(topk_topp_sampler, "apply_top_k_top_p", apply_top_k_top_p)


def apply_top_k_top_p(
    logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
) -> torch.Tensor:
    """Do what vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p does, but faster.

    Sets logits outside of the `k` most probable tokens and of the nucleus of `p` to -inf, in place.
    `logits` are [sequences, vocabulary], float32; `k` and `p` are [sequences], or None where no
    sequence has them; a `k` of the vocabulary and a `p` of 1 change nothing. What is kept is the
    same but for rounding at the edge of the nucleus.
    """
    if k is not None or p is None:
        logits = _vllm_apply_top_k_top_p(logits, k, None)
    if p is None:
        return logits
    return keep_nucleus(logits, p, lambda some, its_p: _vllm_apply_top_k_top_p(some, None, its_p))


def multiply_by_each_adapter() -> None:
    """Make vLLM multiply once by the matrices of each adapter in a batch. For a CPU.

    Its functions in PyTorch copy an adapter's matrices for each token, and take the index -1, which
    marks a sequence without an adapter, for the last adapter.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for function in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        for module in (lora_ops, punica_cpu):
            _replace(module, function.__name__, function)


# The next three have vLLM's parameters. Inputs are [tokens, columns], weights [adapters, 1, rows,
# columns], outputs [tokens, rows or more]; an index is a token's adapter, or -1.


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    product = _product(inputs, lora_b_weights, output_tensor, lora_indices_tensor)
    output_tensor[:, : product.shape[1]] = product.mul_(scaling)


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    # The adapter and the model may pad their rows differently.
    rows = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    weights = lora_b_weights[..., :rows, :]
    bgmv_expand_slice(inputs, weights, output_tensor, lora_indices_tensor, 0, rows, add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    product = _product(inputs, lora_b_weights, output_tensor, lora_indices_tensor)
    place = output_tensor[: len(product), slice_offset : slice_offset + slice_size]
    place.add_(product) if add_inputs else place.copy_(product)


def _product(
    inputs: torch.Tensor, weights: torch.Tensor, output: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Multiply each token by the matrix of its adapter alone: another's may have no numbers."""
    product = output.new_zeros(len(inputs), weights.shape[-2])
    for adapter in torch.unique(indices).tolist():
        if adapter >= 0:  # else the product is zero
            tokens = (indices == adapter).nonzero().squeeze(1)
            matrix = weights[adapter].flatten(0, -2).to(output.dtype)
            product[tokens] = inputs[tokens].to(output.dtype) @ matrix.T
    return product


def compile_nothing_for_requests() -> None:
    """Make vLLM compute log probabilities without compiling a function. For a CPU.

    vLLM compiles it at the first request that asks for them: all others wait some 20 s, and without
    a C++ compiler the engine ends. With TORCHDYNAMO_DISABLE, which eager servers set, nothing else
    is compiled either. torch reads that variable when it is imported. A forked process has imported
    torch already, so the option is set here.
    """
    plain = inspect.unwrap(sampler.batched_count_greater_than)
    _replace(sampler, "batched_count_greater_than", plain)
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        torch._dynamo.config.disable = True


class _Process(ForkServerProcess):
    """A forked process with its parent's environment, as vLLM expects from spawn."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "environment": dict(os.environ)}

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.__dict__.pop("environment"))
        super().run()


class _Context(ForkServerContext):
    Process = _Process


def inspect_models_here() -> None:
    """Let vLLM inspect a model's class in this process. For a CPU.

    vLLM does it in a process of its own, once for each model, so that CUDA is not initialised in
    this one (`_LazyRegisteredModel.inspect_model_cls`). That process imports vLLM again, which
    takes 15 s on a slow core.
    """
    from vllm.model_executor.models import registry

    _replace(registry, "_run_in_subprocess", lambda inspect: inspect())


def fork_engine() -> None:
    """Make vLLM fork the engine process from the fork server, which has imported vLLM.

    On a CPU vLLM would spawn it, and the new process would import vLLM again. Python should use the
    parent's fork server in a child, but starts another one (python/cpython#86354).
    """
    _replace(forkserver._forkserver, "ensure_running", lambda: None)
    _replace(engine_processes, "get_mp_context", _Context)


def print_no_traceback() -> None:
    """Let this process, which is about to end, say no more on stderr.

    multiprocessing prints the traceback of an exception that vLLM has logged before.
    """
    sys.stderr = open(os.devnull, "w")


def actions_of(parser: ArgumentParser) -> dict[str, Action]:
    """Return what vLLM's parser does for each of its arguments, by the argument's name."""
    return {action.dest: action for action in parser._actions}


def appends(action: Action) -> bool:
    """Whether an argument is given once for each of its values."""
    return isinstance(action, argparse._AppendAction)
