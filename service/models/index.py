"""Index-1.9B, compatible with IndexTeam/Index-1.9B, -Chat and -Character.

Different from Llama (source: PaddlePaddle/PaddleFormers' modeling of `index`; bilibili/Index-1.9B
issues 29 and 35 show what comes out without it):
- NormHead, as in Baichuan2, if `norm_head` is set.
"""

from collections.abc import Iterable

import torch
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader

from service.models.baichuan2 import normalized_head


class IndexConfig(LlamaConfig):  # type: ignore[misc]  # neither it nor vLLM is typed for us
    """Defaults: PaddleFormers' configuration of `index`."""

    model_type = "index"

    vocab_size: int = 65029
    norm_head: bool | int | None = None


class IndexForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    # Without lm_head: NormHead would be of the head and an adapter's part of it together.
    embedding_modules = {"embed_tokens": "input_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.config.norm_head is None:
            raise ValueError("config.json of an Index must say whether it has a norm_head")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        is_normalized = self.config.norm_head
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            (
                name,
                normalized_head(weight) if is_normalized and name == "lm_head.weight" else weight,
            )
            for name, weight in weights
        )
        return loaded
