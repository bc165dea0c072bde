"""Baichuan2's chat format (source: baichuan-inc's generation_utils.py, tokenization_baichuan.py).

    system 195 user 196 answer 195 user 196

Each message is encoded separately. 195 and 196 are user_token_id and assistant_token_id of
generation_config.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.tokenizers import chat
from service.tokenizers.sentencepiece import SentencePieceTokenizer


class BaichuanTokenizer(SentencePieceTokenizer):
    """`<reserved_106>` begins a user's turn, `<reserved_107>` the model's. Text yields neither."""

    MARKERS = ("<reserved_106>", "<reserved_107>")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = chat.generation_config(Path(self.vocab_file).parent)
        self.turn_ids: dict[str, int] = {}
        for role, marker in zip(("user", "assistant"), self.MARKERS, strict=True):
            id = config.get(f"{role}_token_id", self.marker_ids.get(marker))
            if id is None:
                continue
            if not isinstance(id, int) or not 0 <= id < self.vocab_size:
                raise ValueError(
                    f"generation_config.json: {role}_token_id is not a token of tokenizer.model"
                )
            self.turn_ids[role] = id

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        truncate_to: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
        if len(self.turn_ids) != 2:
            raise ValueError("these files are not of a Baichuan2-Chat: its turn tokens are missing")
        turns = chat.turns(conversation, truncate_to, options)
        system = self._encode(turns.pop(0)[1]) if turns[0][0] == "system" else []
        rounds = [
            [id for role, text in group for id in (self.turn_ids[role], *self._encode(text))]
            for group in chat.rounds_of(turns)
        ]
        return chat.join(system, rounds, truncate_to, end=[self.turn_ids["assistant"]])

    def _encode(self, text: str) -> list[int]:
        return self.build_inputs_with_special_tokens(self.encode_text(text))
