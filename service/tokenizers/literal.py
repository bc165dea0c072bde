"""Any model of transformers with a chat template, where control tokens in a message stay text.

transformers renders a conversation to one string and then finds the control tokens in it, also
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


def literal(tokenizer: Any, *, begun: bool = False) -> Any:
    """A tokenizer like this one whose chat prompts keep the messages' control tokens as text.

    Conversations without such text are rendered exactly as before; the others to token ids. With
    `begun` all are, and begin as the tokenizer begins a text: with its bos.
    """
    control = control_pattern(tokenizer)

    class Literal(tokenizer.__class__):  # type: ignore[misc]  # as vLLM derives its cached tokenizers
        def apply_chat_template(
            self, conversation: Sequence[Any], *args: Any, **kwargs: Any
        ) -> str | list[int]:
            render = super().apply_chat_template
            if not control.search("\0".join(_texts(conversation))):
                rendered: str | list[int] = render(conversation, *args, **kwargs)
                return self.encode(rendered) if begun else rendered
            hidden: list[str] = []
            nonce = uuid.uuid4().hex

            def hide(match: re.Match[str]) -> str:
                hidden.append(match[0])
                return f"{nonce}.{len(hidden) - 1}."

            conversation = _mapped(conversation, lambda text: control.sub(hide, text))
            text = render(conversation, *args, **{**kwargs, "tokenize": False})
            ids: list[int] = self.encode("") if begun else []
            for piece in control.split(text):
                shown = re.sub(rf"{nonce}\.(\d+)\.", lambda m: hidden[int(m[1])], piece)
                ids += self.encode(
                    shown, add_special_tokens=False, split_special_tokens=shown != piece
                )
            return ids

        def __reduce__(self) -> tuple[Any, ...]:
            return partial(literal, begun=begun), (tokenizer,)

    Literal.__name__ = f"Literal{type(tokenizer).__name__}"
    made = copy.copy(tokenizer)
    made.__class__ = Literal
    return made


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Splits a text into control tokens and what is between them, keeping both."""
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return re.compile(f"({'|'.join(re.escape(t) for t in sorted(tokens, key=len, reverse=True))})")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` made to every string that is not a key of a message's structure."""
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
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _mapped(value, note)
    return found
