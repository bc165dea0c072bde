"""XVERSE's chat format (source: xverse's modeling_xverse.py).

    Human: question\n\nAssistant: answer<eos>Human: question\n\nAssistant:

Each turn is encoded separately, and an answer ends with one token id.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.tokenizers.hf import CachedHfTokenizer

from service.tokenizers import chat


class XverseTokenizer:
    """The `tokenizer_mode` "xverse". Control tokens in a message stay text."""

    @staticmethod
    def from_pretrained(path: str | Path, *args: Any, **kwargs: Any) -> Any:
        tokenizer = CachedHfTokenizer.from_pretrained(path, *args, **kwargs)
        # Like the published code, use the model's eos instead of the tokenizer's.
        eos = chat.generation_config(Path(path)).get("eos_token_id", tokenizer.eos_token_id)
        return xverse(tokenizer, eos[0] if isinstance(eos, list) else eos)


def xverse(tokenizer: Any, eos: int) -> Any:
    """Return a copy of a tokenizer that builds XVERSE's chat prompts; `eos` ends each answer."""

    class Xverse(tokenizer.__class__):  # type: ignore[misc]  # as vLLM derives its cached tokenizers
        def apply_chat_template(
            self,
            conversation: Sequence[Mapping[str, Any]],
            truncate_to: int | None = None,
            **options: Any,
        ) -> list[int]:
            """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
            turns = chat.turns(conversation, truncate_to, options, system=False)
            rounds: list[list[int]] = []
            for group in chat.rounds_of(turns):
                ids: list[int] = []
                for turn in group:
                    role, text = turn
                    if role == "assistant":
                        ids += [*self._encode(f"Assistant: {text}"), eos]
                    else:
                        end = "Assistant: " if turn is turns[-1] else ""
                        ids += self._encode(f"Human: {text}\n\n{end}")
                rounds.append(ids)
            return chat.join([], rounds, truncate_to)

        def _encode(self, text: str) -> list[int]:
            ids: list[int] = self.encode(text, split_special_tokens=True)
            return ids

        def __reduce__(self) -> tuple[Any, ...]:
            return xverse, (tokenizer, eos)

    Xverse.__name__ = f"Xverse{type(tokenizer).__name__}"
    return chat.copy_as(Xverse, tokenizer)
