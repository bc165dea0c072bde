"""ChatGLM3's chat format, see glm.py (source: ssbuild/deep_training's tokenization_chatglm.py).

tokenizer.model holds 64,789 pieces; the class numbers the control tokens after them, from [MASK] =
64789 to <|observation|> = 64797. (Those that the published tokenizer_config.json names agree.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.tokenizers import glm
from service.tokenizers.sentencepiece import SentencePieceTokenizer


class ChatGLM3Tokenizer(SentencePieceTokenizer):
    """An answer ends at eos; `<|user|>` and `<|observation|>` must be stops of the YAML."""

    APPENDED = (
        *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [*self._prefix(), *token_ids_0, *(token_ids_1 or [])]

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        truncate_to: int | None = None,
        **options: Any,
    ) -> list[int]:
        """Return the prompt's token ids. `truncate_to` is in tokens, see `chat.join`."""
        return glm.prompt(
            conversation,
            truncate_to,
            options,
            prefix=self._prefix(),
            token_id=self.marker_id,
            encode=self.encode_text,
        )

    def _prefix(self) -> list[int]:
        return [self.marker_id("[gMASK]"), self.marker_id("sop")]
