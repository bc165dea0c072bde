"""InternLM2's and InternLM3's chat format: ChatML behind `<s>`.

    <s><|im_start|>system\\ntext<|im_end|>\\n<|im_start|>user\\ntext<|im_end|>\\n<|im_start|>assistant\\n

Sources: chat() and chat_template of internlm2-chat; InternLM3Tokenizer, which encodes each text
between control tokens alone. This class reads tokenizer.model even if tokenizer.json exists. The
pieces of `<|im_start|>` and its like have other names in tokenizer.model (`[UNUSED_TOKEN_146]` is
92543 in InternLM2's), so the ids come from tokenizer_config.json. InternLM2's model adds no space
in front of a text (settled by its tokenizer.json); InternLM3's file says it for itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.tokenizers import chat
from service.tokenizers.sentencepiece import Part, SentencePieceTokenizer


class InternLM2Tokenizer(SentencePieceTokenizer):
    """`<|im_end|>` ends an answer and must be a stop of the YAML; eos is `</s>`."""

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        truncate_to: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
        turns = chat.turns(conversation, truncate_to, options)
        for marker in ("<|im_start|>", "<|im_end|>"):  # raises if there is none
            self.marker_id(marker)
        system = _parts(turns.pop(0)) if turns[0][0] == "system" else []
        rounds = [[p for turn in group for p in _parts(turn)] for group in chat.rounds_of(turns)]
        answer = [("<|im_start|>", True), ("assistant\n", False)]
        return self.joined(system, rounds, answer, truncate_to)


def _parts(turn: chat.Turn) -> list[Part]:
    role, text = turn
    return [("<|im_start|>", True), (f"{role}\n{text}", False), ("<|im_end|>", True), ("\n", False)]
