"""Resolves sampling values: first the request, then the YAML, then generation_config.json."""

from collections.abc import Mapping
from typing import Any

from service.api.schema import ContractRequest
from service.errors import PromptTooLong
from service.model_config.schema import MaxLength

_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")


def resolve(
    request: ContractRequest,
    defaults: Mapping[str, Any],
    max_length: MaxLength,
    *,
    prompt_tokens: int,
    context: int,
) -> dict[str, Any]:
    """Return the fields of vLLM's SamplingParams for one request.

    `defaults` is the YAML's sampling over generation_config.json, with vLLM's names. `context` is
    the model's context in tokens. Raises PromptTooLong if there is no room for a new token.
    """
    requested = {
        name: getattr(request, name) for name in _FIELDS if getattr(request, name) is not None
    }
    if "stop" in requested and "stop" in defaults:  # the model's own stop strings stay valid
        stop = requested["stop"]
        requested["stop"] = [*([stop] if isinstance(stop, str) else stop), *defaults["stop"]]
    return {
        **defaults,
        **requested,
        "max_tokens": _new_tokens(request, defaults, max_length, prompt_tokens, context),
    }


def _new_tokens(
    request: ContractRequest,
    defaults: Mapping[str, Any],
    max_length: MaxLength,
    prompt_tokens: int,
    context: int,
) -> int:
    room = context - prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"the prompt is {prompt_tokens} tokens and the model's context is {context}, "
            "which must also hold the answer; shorten the prompt or the history",
            param="prompt",
        )
    # As in transformers, max_new_tokens wins over max_length.
    if request.max_new_tokens is not None:
        return min(request.max_new_tokens, room)
    limit = request.max_length or max_length.default
    if limit is None:
        return min(defaults.get("max_tokens") or room, room)
    if max_length.counts == "prompt_and_new_tokens":
        limit -= prompt_tokens
        if limit < 1 and request.max_length:
            raise PromptTooLong(
                f"max_length counts the prompt for this model, and the prompt is {prompt_tokens} "
                "tokens; raise max_length or give max_new_tokens",
                param="max_length",
            )
        if limit < 1:
            raise PromptTooLong(
                f"the prompt is {prompt_tokens} tokens, and without max_length this model's prompt "
                f"and answer have {max_length.default}; give max_new_tokens or max_length",
                param="prompt",
            )
    return min(limit, room)
