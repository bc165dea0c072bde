"""Short cuts from turns to token ids, for what vLLM's renderer does the same but slower."""

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
    """As vLLM's own chat route renders (ChatCompletionRequest.build_chat_params)."""
    return ChatParams(
        chat_template=template,
        chat_template_content_format=content_format,
        chat_template_kwargs={
            **(kwargs or {}),
            "add_generation_prompt": True,
            "tokenize": False,
        },
    )


def rust_tokenizer(tokenizer: Any) -> Any:
    """The Rust tokenizer inside, or None where there is none.

    What transformers does around it for each text costs half as much again. vLLM gives its threads
    copies, and asks this one for the text of tokens alone.
    """
    if not isinstance(tokenizer, TokenizersBackend):
        return None
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    return fast


def chat_template(renderer: Any, chat: ChatParams) -> Callable[[list[Message]], str | None]:
    """Short turns to text by the chat template alone; None: ask vLLM's renderer.

    That one searches each message for pictures and tools, and the template for its options, which
    takes longer than the template. It edits some system messages.
    """
    tokenizer = renderer.get_tokenizer()
    control = control_pattern(tokenizer)
    variables = {**tokenizer.special_tokens_map, **chat.chat_template_kwargs}
    del variables["tokenize"]

    def render(messages: list[Message]) -> str | None:
        if any(message["role"] == "system" for message in messages):
            return None
        if control.search("\0".join(message["content"] for message in messages)):
            return None
        try:
            (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
        except Exception:  # the template's own; that one says which
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
            seen, rendered = renderer.render_messages(probe, chat)
            texts = [message["content"] for message in seen]
            if texts != [message["content"] for message in probe]:
                return lambda _: None
            if rendered.get("prompt") != render(probe):
                return lambda _: None
    except Exception:  # there is none, or it wants other turns
        return lambda _: None
    return render
