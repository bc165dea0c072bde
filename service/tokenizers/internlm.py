"""The first InternLM's chat format (source: InternLM's modeling_internlm.py).

    <s><|User|>:question<eoh>\\n<|Bot|>:answer<eoa>\\n<|User|>:question<eoh>\\n<|Bot|>:

One string; the tokenizer adds `<s>`, once. (The first published revision wrote it before each past
round as well.) `<eoh>` and `<eoa>` are pieces, `<|User|>` and `<|Bot|>` plain text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.tokenizers import chat
from service.tokenizers.sentencepiece import Part, SentencePieceTokenizer


class InternLMTokenizer(SentencePieceTokenizer):
    """There is no system role. `<eoa>` ends an answer and must be a stop of the YAML."""

    MARKERS = ("<eoh>", "<eoa>")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        truncate_to: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
        turns = chat.turns(conversation, truncate_to, options, system=False)
        for marker in self.MARKERS:  # raises if there is none
            self.marker_id(marker)
        rounds = [_parts(group) for group in chat.rounds_of(turns)]
        return self.joined([], rounds, [("<|Bot|>:", False)], truncate_to)


def _parts(turns: Sequence[chat.Turn]) -> list[Part]:
    parts: list[Part] = []
    for role, text in turns:
        name, end = ("<|User|>", "<eoh>") if role == "user" else ("<|Bot|>", "<eoa>")
        parts += [(f"{name}:{text}", False), (end, True), ("\n", False)]
    return parts
