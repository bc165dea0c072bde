"""DeepSeekMoE-16B: vLLM has the model but not its config class.

Compatible with deepseek-ai/deepseek-moe-16b-chat and -base. The keys beside Llama's, and their
defaults, are those of deepseek-ai's configuration_deepseek.py.
"""

from typing import Any

from transformers import LlamaConfig


class DeepseekConfig(LlamaConfig):  # type: ignore[misc]  # transformers is not typed for us
    """Layers from first_k_dense_replace on have routed and shared experts; those before have none.

    Raises ValueError for a variant that was never published.
    """

    model_type = "deepseek"  # by it vLLM knows that the attention is not latent

    vocab_size: int = 102400
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    moe_intermediate_size: int = 1407
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.scoring_func != "softmax":
            raise ValueError(f"a DeepSeekMoE with scoring_func {self.scoring_func} is not known")
        if self.attention_bias:
            raise ValueError("a DeepSeekMoE with attention_bias is not known")
        super().__post_init__(**kwargs)
