"""Faster ways from chat turns to token ids, with the same result as vLLM's renderer."""

from collections.abc import Callable
from typing import Any

from transformers import TokenizersBackend
from transformers.utils.chat_template_utils import render_jinja_template
from vllm.renderers import ChatParams

from service.prompting import Message
from service.tokenizers.literal import control_pattern


def chat_params(
    template: str | None, content_format: str, kwargs: dict[str, Any] | None
) -> ChatParams:
    """Return the ChatParams of vLLM's chat route (ChatCompletionRequest.build_chat_params)."""
    return ChatParams(
        chat_template=template,
        chat_template_content_format=content_format,
        chat_template_kwargs={**(kwargs or {}), "add_generation_prompt": True, "tokenize": False},
    )


def rust_tokenizer(tokenizer: Any) -> Any:
    """Return the Rust tokenizer inside a transformers tokenizer, or None if there is none.

    The transformers wrapper makes each call 1.5 times as slow. vLLM's threads encode with copies of
    the tokenizer, and use this one only to decode.
    """
    if not isinstance(tokenizer, TokenizersBackend):
        return None
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    return fast


def chat_template(renderer: Any, chat: ChatParams) -> Callable[[list[Message]], str | None]:
    """Return a function that renders turns with the chat template alone.

    It returns None where the caller must use vLLM's renderer. That one searches each message for
    images and tools, and the template for its options, which takes longer than the template itself.
    It also edits some system messages, and drops other keys of a turn.
    """
    tokenizer = renderer.get_tokenizer()
    control = control_pattern(tokenizer)
    variables = {**tokenizer.special_tokens_map, **chat.chat_template_kwargs}
    del variables["tokenize"]

    def render(messages: list[Message]) -> str | None:
        if any(message["role"] == "system" or "metadata" in message for message in messages):
            return None
        if control.search("\0".join(message["content"] for message in messages)):
            return None
        try:
            (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
        except Exception:  # raised by the template; vLLM's renderer reports it
            return None
        return str(text)

    turns: list[Message] = [
        {"role": "user", "content": " maple\n"},
        {"role": "assistant", "content": "birch"},
        {"role": "user", "content": "elm"},
    ]
    try:
        template = tokenizer.get_chat_template(chat.chat_template)
        for probe in (turns[:1], turns):
            conversation, rendered = renderer.render_messages(probe, chat)
            texts = [message["content"] for message in conversation]
            if texts != [message["content"] for message in probe]:
                return lambda _: None
            if rendered.get("prompt") != render(probe):
                return lambda _: None
    except Exception:  # no template, or it rejects these turns
        return lambda _: None
    return render
