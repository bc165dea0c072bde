"""BlueLM-7B, compatible with vivo-ai/BlueLM-7B-Chat, -Base and their 32K variants.

Different from Llama (source: vivo-ai's modeling_bluelm.py and vivo-ai-lab/BlueLM):
- A LayerNorm on the embeddings, `model.embed_layer_norm`, when `use_stable_embedding` is set.
- The 32K variants scale the rotary frequencies ("ntkmixed"); max_position_embeddings is the length
  before that.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from vllm.model_executor.models.utils import PPMissingLayer


class BlueLMConfig(LlamaConfig):  # type: ignore[misc]  # neither it nor vLLM is typed for us
    """Source: vivo-ai's configuration_bluelm.py."""

    model_type = "BlueLM"

    vocab_size: int = 100096
    use_stable_embedding: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_attention_heads  # the published attention has no GQA
        scaling = kwargs.get("rope_scaling") or {}
        if scaling:
            kind = scaling.get("type") or scaling.get("rope_type")
            if kind != "ntkmixed" or not {"factor", "power"} <= scaling.keys():
                raise ValueError(
                    "config.json: rope_scaling of a BlueLM has type ntkmixed, a factor and a power"
                )
            # vLLM has the same formula under another name.
            kwargs["rope_scaling"] = {
                "rope_type": "ntk",
                "factor": int(scaling["factor"]),
                "mixed_b": scaling["power"],
            }
        super().__post_init__(**kwargs)

    def _validate_ntk_rope_parameters(self, *_: object, **__: object) -> None:
        """transformers looks this up by name, and warns at each start if it is missing."""


class BlueLMAttention(LlamaAttention):  # type: ignore[misc]
    def _init_rotary_emb(self, config: BlueLMConfig, quant_config: object) -> None:
        factor = config.rope_parameters.get("factor", 1)
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=self.max_position_embeddings * factor,
            rope_parameters=config.rope_parameters,
        )


class BlueLMModel(LlamaModel):  # type: ignore[misc]
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(
            vllm_config=vllm_config,
            prefix=prefix,
            layer_type=partial(LlamaDecoderLayer, attn_layer_type=BlueLMAttention),
        )
        # On other ranks, or without the norm: returns its input; its weights are skipped.
        self.embed_layer_norm: nn.Module = PPMissingLayer()
        if self.config.use_stable_embedding and get_pp_group().is_first_rank:
            self.embed_layer_norm = nn.LayerNorm(
                self.config.hidden_size, eps=self.config.rms_norm_eps
            )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.embed_layer_norm(self.embed_tokens(input_ids))
        return embeddings


class BlueLMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    def _init_model(
        self, vllm_config: VllmConfig, prefix: str, layer_type: type[nn.Module]
    ) -> BlueLMModel:
        return BlueLMModel(vllm_config=vllm_config, prefix=prefix)
