"""Chat templates for any model of transformers, with control tokens in messages kept as text.

transformers renders a conversation to one string and then finds the control tokens in it, including
those that a user wrote: `<|im_end|>` in a question would end the question.
"""

import copy
import itertools
import os
import re
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from tokenizers import Tokenizer
from transformers import TokenizersBackend
from vllm.tokenizers.hf import CachedHfTokenizer

from service.tokenizers import chat

_REASONING = ("<think>", "</think>")
_NEVER = "(?!)"  # a pattern


class LiteralTokenizer:
    """The `tokenizer_mode` "literal"."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return literal(CachedHfTokenizer.from_pretrained(*args, **kwargs))


class _TextEncoder:
    """Encodes text in which no token that was added is found.

    `split_special_tokens` does so for special ones alone, and DeepSeek's `<｜User｜>` is none.
    """

    def __init__(self, tokenizer: TokenizersBackend) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for token in tokenizer.added_tokens_decoder.values():
            token = copy.copy(token)
            token.special = True
            self._tokenizer.add_special_tokens([token])
        self._tokenizer.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def __deepcopy__(self, memo: object) -> "_TextEncoder":
        return self  # it never changes, and a copy takes 0.3 s


def literal(
    tokenizer: Any, *, add_bos: bool = False, encode_text: _TextEncoder | None = None
) -> Any:
    """Return a copy of a tokenizer that keeps control tokens in messages as text.

    A conversation without control tokens is rendered as before, another one to token ids. With
    `add_bos` all are rendered to token ids, with the tokenizer's bos if it adds one.

    The tags of reasoning in an assistant's turn stay what they are, for templates look for them to
    leave old reasoning out. `encode_text` is the encoder of the tokenizer that is copied; None:
    make one.
    """
    control = control_pattern(tokenizer)
    in_answers = control_pattern(tokenizer, except_for=_REASONING)
    added = tokenizer.added_tokens_decoder.values()
    is_rust = isinstance(tokenizer, TokenizersBackend)
    if encode_text is None and is_rust and not all(token.special for token in added):
        encode_text = _TextEncoder(tokenizer)
    strip_before = {str(token) for token in added if token.lstrip}
    strip_after = {str(token) for token in added if token.rstrip}

    def pattern(turn: Any) -> re.Pattern[str]:
        is_answer = isinstance(turn, Mapping) and turn.get("role") == "assistant"
        return in_answers if is_answer else control

    class Literal(tokenizer.__class__):  # type: ignore[misc]  # as vLLM derives its cached tokenizers
        def apply_chat_template(
            self, conversation: Sequence[Any], *args: Any, **kwargs: Any
        ) -> str | list[int]:
            render = super().apply_chat_template
            if not any(pattern(turn).search("\0".join(_texts(turn))) for turn in conversation):
                rendered: str | list[int] = render(conversation, *args, **kwargs)
                return self.encode(rendered) if add_bos else rendered
            hidden: list[str] = []
            nonce = uuid.uuid4().hex

            def hide(match: re.Match[str]) -> str:
                hidden.append(match[0])
                return f"{nonce}.{len(hidden) - 1}."

            conversation = [
                _mapped(turn, partial(pattern(turn).sub, hide)) for turn in conversation
            ]
            text = render(conversation, *args, **{**kwargs, "tokenize": False})
            ids: list[int] = self.encode("") if add_bos else []
            before = ""
            for piece, after in itertools.pairwise([*control.split(text), ""]):
                # As in one string, where such a token takes the white space beside it.
                stripped = piece.lstrip() if before in strip_after else piece
                stripped = stripped.rstrip() if after in strip_before else stripped
                before, piece = piece, stripped
                shown = re.sub(rf"{nonce}\.(\d+)\.", lambda m: hidden[int(m[1])], piece)
                spelled = shown != piece
                if spelled and encode_text:
                    ids += encode_text(shown)
                else:
                    ids += self.encode(
                        shown, add_special_tokens=False, split_special_tokens=spelled
                    )
            return ids

        def __reduce__(self) -> tuple[Any, ...]:
            return partial(literal, add_bos=add_bos, encode_text=encode_text), (tokenizer,)

    Literal.__name__ = f"Literal{type(tokenizer).__name__}"
    return chat.copy_as(Literal, tokenizer)


def control_pattern(tokenizer: Any, except_for: Collection[str] = ()) -> re.Pattern[str]:
    """Return a pattern that splits a text at control tokens and keeps them."""
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {*except_for}
    return re.compile(f"({longest_of(tokens) or _NEVER})")


def longest_of(words: Collection[str]) -> str:
    """Return a regular expression for the longest of some words that stands at a place.

    Common beginnings are tried once: some models have hundreds of tokens that begin alike, and a
    search holds the GIL.
    """
    by_first: dict[str, list[str]] = {}
    for word in filter(None, words):
        by_first.setdefault(word[0], []).append(word)
    branches = []
    for alike in by_first.values():
        start = os.path.commonprefix(alike)
        branches.append(re.escape(start) + longest_of([word[len(start) :] for word in alike]))
    return f"(?:{'|'.join(branches)}){'?' * ('' in words)}" if branches else ""


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
