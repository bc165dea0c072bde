"""GLM-4's chat format, see glm.py (source: THUDM's tokenization_chatglm.py of glm-4-9b-chat).

`tokenizer.model` is a tiktoken file of 151,329 tokens, whatever its name says. The control tokens
follow it. We have not seen the published tokenizer_config.json. Files with other ids are refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import processors

from service.tokenizers import byte_level, glm

_CONTROL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
_PREFIX = ("[gMASK]", "<sop>")


class Glm4Tokenizer(byte_level.ByteLevelTokenizer):
    """The `tokenizer_mode` "glm4". `<|user|>` and `<|observation|>` end an answer as eos does."""

    @classmethod
    def from_pretrained(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        folder = Path(path)
        tokenizer = byte_level.load(
            folder / "tokenizer.model", byte_level.words(digits=3), _CONTROL
        )
        byte_level.check_added(folder, tokenizer)
        prefix = [(token, tokenizer.token_to_id(token)) for token in _PREFIX]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{' '.join(_PREFIX)} $A", special_tokens=prefix
        )
        return cls.of(tokenizer, _CONTROL, "<|endoftext|>")

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
            prefix=[self.convert_tokens_to_ids(token) for token in _PREFIX],
            token_id=self.convert_tokens_to_ids,
            encode=self.encode_text,
        )
