"""OpenELM, compatible with apple/OpenELM-270M to -3B and their -Instruct variants.

Different from Llama (source: apple's modeling_openelm.py and apple/corenet's general_gpt.py):
- Every layer has its own number of query and KV heads and its own feed-forward width.
- q and k pass an RMSNorm over head_dim, whose weights all heads share, before the rotation.
- q, k and v are one matrix in the checkpoint, as are gate and up (`proj_1`, gate first).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, extract_layer_index


class OpenELMConfig(PreTrainedConfig):  # type: ignore[misc]  # neither it nor vLLM is typed for us
    """Source: apple's configuration_openelm.py.

    Heads and feed-forward widths differ by layer: `query_heads`, `kv_heads` and `ffn_sizes` have
    one entry per layer, and vLLM's attributes for them hold the maximum. Raises ValueError for an
    invalid config.json and for a variant that was never published.
    """

    model_type = "openelm"

    vocab_size: int = 32000
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6  # not in config.json: the default of apple's OpenELMRMSNorm
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.hidden_size = kwargs.pop("model_dim", 1280)
        self.num_hidden_layers = kwargs.pop("num_transformer_layers", 0)
        self.max_position_embeddings = kwargs.pop("max_context_length", 2048)
        self.tie_word_embeddings = kwargs.pop("share_input_output_layers", True)
        self.rope_parameters = {
            "rope_type": "default",
            "rope_theta": float(kwargs.pop("rope_freq_constant", 10000)),
        }
        self.query_heads = kwargs.pop("num_query_heads", [])
        # Not as `num_kv_heads`: vLLM would read the list as the number of KV heads.
        self.kv_heads = kwargs.pop("num_kv_heads", [])
        divisor = kwargs.pop("ffn_dim_divisor", 256)
        multipliers = kwargs.pop("ffn_multipliers", [])
        self.ffn_sizes = [_make_divisible(m * self.hidden_size, divisor) for m in multipliers]
        for key, value in {
            "activation_fn_name": "swish",
            "normalization_layer_name": "rms_norm",
            "ffn_with_glu": True,
            "normalize_qk_projections": True,
        }.items():
            if kwargs.pop(key, value) != value:
                raise ValueError(f"an OpenELM with {key} other than {value} is not known here")
        lists = {
            "num_query_heads": self.query_heads,
            "num_kv_heads": self.kv_heads,
            "ffn_multipliers": self.ffn_sizes,
        }
        for key, values in lists.items():
            if len(values) != self.num_hidden_layers:
                raise ValueError(
                    f"config.json: {key} must have one entry for each of the "
                    f"{self.num_hidden_layers} layers, and has {len(values)}"
                )
        if self.num_hidden_layers and not self.head_dim:
            raise ValueError("config.json: head_dim is missing")
        if any(q % kv for q, kv in zip(self.query_heads, self.kv_heads, strict=True)):
            raise ValueError("config.json: num_query_heads must be multiples of num_kv_heads")
        self.num_attention_heads = max(self.query_heads, default=4)
        self.num_key_value_heads = max(self.kv_heads, default=1)
        self.intermediate_size = max(self.ffn_sizes, default=divisor)
        super().__post_init__(**kwargs)


def _make_divisible(value: float, divisor: int) -> int:
    """Round `value` to a multiple of `divisor`, but not below 0.9 * `value` (apple/corenet)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def kv_repeats(config: OpenELMConfig, layer: int, tp_size: int | None = None) -> int:
    """Return how often to repeat each KV head of a layer, so that all ranks get equally many.

    It is the smallest number that keeps each query head with its KV head. `tp_size` defaults to
    that of the running group. Raises ValueError if there is no such number.
    """
    query_heads, kv_heads = config.query_heads[layer], config.kv_heads[layer]
    tp_size = tp_size or get_tensor_model_parallel_world_size()
    group = query_heads // kv_heads
    for repeats in range(1, group + 1):
        if group % repeats == 0 and kv_heads * repeats % tp_size == 0:
            return repeats
    raise ValueError(
        f"this OpenELM cannot be split over tensor_parallel_size {tp_size}: layer {layer} has "
        f"{query_heads} query and {kv_heads} KV heads; use a smaller power of two"
    )


def check_backend(name: str) -> None:
    """Raise ValueError for an attention backend that requires equal heads in all layers.

    In vLLM 0.32 these are flex_attention.py and rocm_aiter_fa.py of vllm/v1/attention/backends.
    """
    if name in ("AiterFlashAttentionBackend", "FlexAttentionBackend"):
        raise ValueError(
            f"OpenELM's layers differ in their heads, which vLLM's {name} does not serve; set "
            "engine.attention_backend to another, such as FLASH_ATTN or TRITON_ATTN"
        )


class OpenELMAttention(LlamaAttention):  # type: ignore[misc]
    def __init__(
        self,
        config: OpenELMConfig,
        layer: int,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__(
            config,
            config.hidden_size,
            config.query_heads[layer],
            config.kv_heads[layer] * kv_repeats(config, layer),
            config.max_position_embeddings,
            quant_config,
            cache_config=cache_config,
            prefix=prefix,
        )
        check_backend(self.attn.attn_backend.__name__)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.reshape(-1, self.num_heads, self.head_dim)).view(q.shape)
        k = self.k_norm(k.reshape(-1, self.num_kv_heads, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        output: torch.Tensor = self.o_proj(self.attn(q, k, v))[0]
        return output


class OpenELMDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # skip Llama's: it builds layers of one size
        config: OpenELMConfig = vllm_config.model_config.hf_config
        quant_config = self.get_quant_config(vllm_config)
        layer = extract_layer_index(prefix)
        self.hidden_size = config.hidden_size
        self.self_attn = OpenELMAttention(
            config, layer, vllm_config.cache_config, quant_config, f"{prefix}.self_attn"
        )
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.ffn_sizes[layer],
            config.hidden_act,
            quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class OpenELMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    # vLLM splits a matrix that is fused on disk before it shards it.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"transformer.": "model."},
        orig_to_new_substr={
            ".token_embeddings.": ".embed_tokens.",
            ".attn_norm.": ".input_layernorm.",
            ".attn.out_proj.": ".self_attn.o_proj.",
            ".attn.": ".self_attn.",
            ".ffn_norm.": ".post_attention_layernorm.",
            ".ffn.proj_1.": ".mlp.gate_up_proj.",
            ".ffn.proj_2.": ".mlp.down_proj.",
        },
    )
    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=OpenELMDecoderLayer)
        layers = range(self.config.num_hidden_layers)
        if vllm_config.lora_config and any(kv_repeats(self.config, i) > 1 for i in layers):
            raise ValueError(
                "an OpenELM whose KV heads are repeated for tensor parallelism cannot take LoRA "
                "adapters; use tensor_parallel_size 1"
            )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            (
                (name, self._repeat_kv_heads(name, weight) if ".qkv_proj." in name else weight)
                for name, weight in weights
            ),
            mapper=self.hf_to_vllm_mapper,
        )
        return loaded

    def _repeat_kv_heads(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Repeat the heads of k and v in qkv_proj, [(q + k + v heads) * head_dim, hidden]."""
        layer = extract_layer_index(name)
        repeats = kv_repeats(self.config, layer)
        if repeats == 1:
            return weight
        if not name.endswith(".weight"):
            raise ValueError(
                "a quantised OpenELM checkpoint cannot be split over this tensor_parallel_size"
            )
        heads = weight.view(-1, self.config.head_dim, weight.shape[1])
        kv_heads = self.config.kv_heads[layer]
        q, k, v = torch.split(heads, [len(heads) - 2 * kv_heads, kv_heads, kv_heads])
        return torch.cat(
            [q, k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)]
        ).flatten(0, 1)
