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

    PREFIX = ("[gMASK]", "sop")
    APPENDED = (
        *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    )

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
            prefix=self.prefix(),
            token_id=self.marker_id,
            encode=self.encode_text,
        )
