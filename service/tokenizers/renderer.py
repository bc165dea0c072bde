"""vLLM's renderer for tokenizers that turn messages into token ids themselves."""

import copy
from typing import Any

from vllm.renderers.deepseek_v32 import DeepseekV32Renderer
from vllm.tokenizers.hf import maybe_make_thread_pool


class TokenIdsRenderer(DeepseekV32Renderer):  # type: ignore[misc]  # vLLM is not typed for us
    """DeepSeek's renderer with the tokenizer pool of HfRenderer.

    `encode` changes `split_special_tokens` and truncation of the Rust tokenizer, so the event loop
    and each of vLLM's threads need their own copy.
    """

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, copy.copy(tokenizer))
        if self.tokenizer is not None:
            maybe_make_thread_pool(self.tokenizer, config.model_config.renderer_num_workers + 1)

    def _apply_chat_template(
        self, conversation: list[Any], messages: list[Any], **options: Any
    ) -> list[int]:
        # vLLM makes one turn of each message, without the keys that OpenAI's messages lack.
        for turn, message in zip(conversation, messages, strict=True):
            if "metadata" in message:
                turn["metadata"] = message["metadata"]
        return list(self.get_tokenizer().apply_chat_template(conversation, **options))
