"""Baichuan2-7B, compatible with baichuan-inc/Baichuan2-7B-Chat and -Base.

Different from Llama (source: baichuan-inc's modeling_baichuan.py):
- q, k and v are one matrix in the checkpoint, `W_pack`: all rows of q, then k, then v.
- NormHead: every row of `lm_head.weight` is divided by its length.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import LlamaConfig
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper


class Baichuan2Config(LlamaConfig):  # type: ignore[misc]  # neither it nor vLLM is typed for us
    """Source: baichuan-inc's configuration_baichuan.py.

    Raises ValueError for other models with the same architecture name.
    """

    model_type = "baichuan"

    vocab_size: int = 125696

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size == 5120:
            raise ValueError(
                "this is a 13B Baichuan (hidden_size 5120), which uses ALiBi position biases; only "
                "Baichuan2-7B is served"
            )
        if self.vocab_size == 64000:
            raise ValueError(
                "this is Baichuan 1 (vocab_size 64000), whose output head is not normalised; only "
                "Baichuan2-7B is served"
            )
        if self.tie_word_embeddings:
            raise ValueError("a Baichuan2 whose output head is its embeddings was never published")
        super().__post_init__(**kwargs)


class Baichuan2Model(LlamaModel):  # type: ignore[misc]
    # vLLM splits a matrix that is fused on disk before it shards it.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".W_pack.": ".qkv_proj."},
        orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)},
    )


class Baichuan2ForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    hf_to_vllm_mapper = Baichuan2Model.hf_to_vllm_mapper
    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    # Without lm_head: NormHead would be of the head and an adapter's part of it together.
    embedding_modules = {"embed_tokens": "input_embeddings"}

    def _init_model(self, **kwargs: object) -> Baichuan2Model:
        return Baichuan2Model(**kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            (name, normalized_head(weight) if name == "lm_head.weight" else weight)
            for name, weight in weights
        )
        return loaded


def normalized_head(head: torch.Tensor) -> torch.Tensor:
    """Apply NormHead once, in float32; the published code does it in the stored dtype."""
    return normalize(head.float()).to(head.dtype)
