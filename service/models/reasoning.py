"""Reasoning apart from the answer on /v1, where vLLM's parser leaves a tag in it."""

from typing import Any

from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser


class ThinkTagsParser(DeepSeekR1ReasoningParser):  # type: ignore[misc]  # vLLM is not typed for us
    """The `reasoning_parser` "think_tags".

    vLLM 0.32's deepseek_r1 streams the opening tag too, where it comes with other tokens.
    """

    def extract_reasoning_streaming(
        self, previous_text: str, current_text: str, delta_text: str, *token_ids: Any
    ) -> Any:
        message = super().extract_reasoning_streaming(
            previous_text, current_text, delta_text, *token_ids
        )
        delta_token_ids = token_ids[-1]
        if message and message.reasoning and self.start_token_id in delta_token_ids:
            before, tag, after = message.reasoning.partition(self.start_token)
            message.reasoning = after if tag else before
        return message
