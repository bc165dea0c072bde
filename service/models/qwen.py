"""Qwen (v1), compatible with qwen/Qwen-7B-Chat v1.1.4 and its siblings of 1.8B to 72B.

The arithmetic is Qwen2's: Llama with biases on q, k and v. Different from it (source: Alibaba's
modeling_qwen.py and configuration_qwen.py):
- q, k and v are one matrix in the checkpoint, `c_attn`: all rows of q, then k, then v.
- `w1` is up and `w2` is gate; `intermediate_size` counts both.
- Beyond `seq_length` tokens the published code scales q by the position (`use_logn_attn`) and
  chooses the frequencies by the length of the prompt (`use_dynamic_ntk`). Neither is done here, so
  the model's length is `seq_length` if one of them is set.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import LlamaConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper


class QwenConfig(LlamaConfig):  # type: ignore[misc]  # neither it nor vLLM is typed for us
    """Source: Alibaba's configuration_qwen.py.

    Raises ValueError for other models with the same architecture name.
    """

    model_type = "qwen"

    vocab_size: int = 151936
    intermediate_size: int = 22016
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    # In generation_config.json; Llama's would be two letters.
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    qkv_bias: bool = True  # vLLM's Llama reads it

    def __post_init__(self, **kwargs: Any) -> None:
        for key, model in {"visual": "Qwen-VL", "audio": "Qwen-Audio"}.items():
            if key in kwargs:
                raise ValueError(f"this is a {model}, which reads more than text; it is not served")
        if "n_embd" in kwargs:
            raise ValueError(
                "config.json has the keys of the first Qwen of August 2023 (n_embd); fetch a later "
                "revision, such as v1.1.4"
            )
        for key, value in {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}.items():
            if kwargs.pop(key, value) != value:
                raise ValueError(f"a Qwen with {key} other than {value} is not known here")
        self.intermediate_size //= 2
        self.rms_norm_eps = kwargs.pop("layer_norm_epsilon", self.rms_norm_eps)
        if "rotary_emb_base" in kwargs:
            kwargs["rope_theta"] = float(kwargs.pop("rotary_emb_base"))
        if kwargs.get("use_dynamic_ntk", True) or kwargs.get("use_logn_attn", True):
            exact = kwargs.get("seq_length", self.max_position_embeddings)
            self.max_position_embeddings = min(self.max_position_embeddings, exact)
        super().__post_init__(**kwargs)


class QwenForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    # vLLM splits a matrix that is fused on disk before it shards it.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"transformer.h.": "model.layers.", "transformer.": "model."},
        orig_to_new_substr={
            ".wte.": ".embed_tokens.",
            ".ln_1.": ".input_layernorm.",
            ".ln_2.": ".post_attention_layernorm.",
            ".ln_f.": ".norm.",
            ".attn.c_attn.": ".self_attn.qkv_proj.",
            ".attn.c_proj.": ".self_attn.o_proj.",
            ".mlp.w2.": ".mlp.gate_proj.",
            ".mlp.w1.": ".mlp.up_proj.",
            ".mlp.c_proj.": ".mlp.down_proj.",
        },
    )
    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            weights, mapper=self.hf_to_vllm_mapper
        )
        return loaded
