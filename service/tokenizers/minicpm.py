"""MiniCPM-2B's chat format (source: OpenBMB/MiniCPM's modeling_minicpm.py).

    <s><用户>question<AI>answer<用户>question<AI>

The published code encodes the template's text as any text, so that bos comes from the tokenizer: a
template that writes it would lose the space that some tokenizers put before a text.
"""

from typing import Any

from vllm.tokenizers.hf import CachedHfTokenizer

from service.tokenizers.literal import literal


class MiniCPMTokenizer:
    """The `tokenizer_mode` "minicpm": control tokens in a message stay text here too."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return literal(CachedHfTokenizer.from_pretrained(*args, **kwargs), begun=True)
