"""BlueLM's chat format (source: vivo-ai-lab/BlueLM's cli_demo.py and openai_api_demo).

    <s>[|Human|]:question[|AI|]:answer</s>[|Human|]:question[|AI|]:

The published code encodes this as one string. `[|SYSTEM|]:` exists in the 32K variants.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.tokenizers import chat
from service.tokenizers.sentencepiece import Part, SentencePieceTokenizer

_MARKER = {"system": "[|SYSTEM|]:", "user": "[|Human|]:", "assistant": "[|AI|]:"}


class BlueLMTokenizer(SentencePieceTokenizer):
    """`[|Human|]:`, `[|AI|]:`, `[|SYSTEM|]:` and `[|Function|]:` stay text in a user's text."""

    MARKERS = (*_MARKER.values(), "[|Function|]:")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        truncate_to: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
        turns = chat.turns(conversation, truncate_to, options)
        for role, _ in turns:
            if _MARKER[role] not in self.marker_ids:
                raise ValueError(f"this model has no {role} messages")
        bos = [self.bos_token_id] if self.add_bos_token else []
        ids = bos + self._encode(turns)
        if truncate_to is None or len(ids) <= truncate_to:
            return ids
        if turns[0][0] == "system":
            bos += self._encode([turns.pop(0)])
        rounds = [self._encode(group) for group in chat.rounds_of(turns)]
        return chat.join(bos, rounds, truncate_to)

    def _encode(self, turns: list[chat.Turn]) -> list[int]:
        """Return the token ids of turns. If the last is a user's, begin an answer."""
        ids: list[int] = []
        string: list[Part] = []
        for role, text in turns:
            string += [(_MARKER[role], True), (text, False)]
            if role == "assistant":
                ids += [*self.encode_string(string), self.eos_token_id]
                string = []
        if turns[-1][0] == "user":
            string.append((_MARKER["assistant"], True))
        return ids + (self.encode_string(string) if string else [])
