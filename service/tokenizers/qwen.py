"""The first Qwen's chat format (source: Qwen's qwen_generation_utils.py, tokenization_qwen.py).

    <|im_start|> system\\n text <|im_end|> \\n
    <|im_start|> user\\n text <|im_end|> \\n <|im_start|> assistant\\n text <|im_end|> \\n
    <|im_start|> user\\n text <|im_end|> \\n <|im_start|> assistant\\n

Role, newline and text are encoded apart, so a text with a newline in front has other ids than in
Qwen1.5. There is always a system turn. `qwen.tiktoken` has 151,643 tokens, and 208 control tokens
follow: the vocabulary is that of Qwen1.5 (compared in tests), and texts are brought to NFC.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.tokenizers import byte_level, chat

_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_SYSTEM = "You are a helpful assistant."


class QwenTokenizer(byte_level.ByteLevelTokenizer):
    """The `tokenizer_mode` "qwen". `<|im_end|>` is eos; `<|im_start|>` ends an answer too."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        folder = Path(path)
        tokenizer = byte_level.load(
            folder / "qwen.tiktoken", byte_level.words(digits=1), _CONTROL, nfc=True
        )
        byte_level.check_added(folder, tokenizer)
        return cls.of(tokenizer, _CONTROL, "<|im_end|>")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        truncate_to: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
        turns = chat.turns(conversation, truncate_to, options)
        start, end = self.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        newline = self.encode_text("\n")

        def ids(role: str, text: str) -> list[int]:
            return [
                start,
                *self.encode_text(role),
                *newline,
                *self.encode_text(text),
                end,
                *newline,
            ]

        system = ids("system", turns.pop(0)[1] if turns[0][0] == "system" else _SYSTEM)
        rounds = [[id for turn in group for id in ids(*turn)] for group in chat.rounds_of(turns)]
        answer = [start, *self.encode_text("assistant"), *newline]
        return chat.join(system, rounds, truncate_to, end=answer)
