"""MiniCPM-2B's chat format (source: OpenBMB/MiniCPM's modeling_minicpm.py).

    <s><用户>question<AI>answer<用户>question<AI>

As in the published code, the tokenizer adds bos. If the template wrote it, the prompt would lose
the space that some tokenizers put before a text.
"""

from typing import Any

from vllm.tokenizers.hf import CachedHfTokenizer

from service.tokenizers.literal import literal


class MiniCPMTokenizer:
    """The `tokenizer_mode` "minicpm". Control tokens in a message stay text."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return literal(CachedHfTokenizer.from_pretrained(*args, **kwargs), add_bos=True)
