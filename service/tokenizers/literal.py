"""Chat templates for any model of transformers, with control tokens in messages kept as text.

transformers renders a conversation to one string and then finds the control tokens in it, including
those that a user wrote: `<|im_end|>` in a question would end the question.
"""

import copy
import re
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vllm.tokenizers.hf import CachedHfTokenizer


class LiteralTokenizer:
    """The `tokenizer_mode` "literal"."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return literal(CachedHfTokenizer.from_pretrained(*args, **kwargs))


def literal(tokenizer: Any, *, add_bos: bool = False) -> Any:
    """Return a copy of a tokenizer that keeps control tokens in messages as text.

    A conversation without control tokens is rendered as before, another one to token ids. With
    `add_bos` all are rendered to token ids, with the tokenizer's bos if it adds one.
    """
    control = control_pattern(tokenizer)

    class Literal(tokenizer.__class__):  # type: ignore[misc]  # as vLLM derives its cached tokenizers
        def apply_chat_template(
            self, conversation: Sequence[Any], *args: Any, **kwargs: Any
        ) -> str | list[int]:
            render = super().apply_chat_template
            if not control.search("\0".join(_texts(conversation))):
                rendered: str | list[int] = render(conversation, *args, **kwargs)
                return self.encode(rendered) if add_bos else rendered
            hidden: list[str] = []
            nonce = uuid.uuid4().hex

            def hide(match: re.Match[str]) -> str:
                hidden.append(match[0])
                return f"{nonce}.{len(hidden) - 1}."

            conversation = _mapped(conversation, lambda text: control.sub(hide, text))
            text = render(conversation, *args, **{**kwargs, "tokenize": False})
            ids: list[int] = self.encode("") if add_bos else []
            for piece in control.split(text):
                shown = re.sub(rf"{nonce}\.(\d+)\.", lambda m: hidden[int(m[1])], piece)
                ids += self.encode(
                    shown, add_special_tokens=False, split_special_tokens=shown != piece
                )
            return ids

        def __reduce__(self) -> tuple[Any, ...]:
            return partial(literal, add_bos=add_bos), (tokenizer,)

    Literal.__name__ = f"Literal{type(tokenizer).__name__}"
    clone = copy.copy(tokenizer)
    clone.__class__ = Literal
    return clone


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that splits a text at control tokens and keeps them."""
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return re.compile(f"({'|'.join(re.escape(t) for t in sorted(tokens, key=len, reverse=True))})")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return `value` with `change` applied to all strings except keys, roles and types."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in ("role", "type") else _mapped(item, change)
            for key, item in value.items()
        }
    return value


def _texts(value: Any) -> list[str]:
    texts: list[str] = []

    def append(text: str) -> str:
        texts.append(text)
        return text

    _mapped(value, append)
    return texts
