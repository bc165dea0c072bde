"""Architectures of the catalogue that vLLM and transformers both have, on tiny random checkpoints.

`verify` compares the two; here they are equal, with the rotary scaling that is published.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine import ask, engine
from tests.test_models import differences

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
# By a model of the catalogue: what is peculiar to its config.json.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b-instruct": (
        "Llama",
        {
            **GROUPED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3-8b": ("Qwen3", GROUPED),
    "gemma-2b-it": ("Gemma", {"num_key_value_heads": 1, "head_dim": 32}),
    "gemma-2-9b-it": (
        "Gemma2",
        {**GROUPED, "sliding_window": 64, "query_pre_attn_scalar": 32},
    ),
    "phi-3-mini-4k-instruct": ("Phi3", {"num_key_value_heads": 4, "sliding_window": 100}),
    "deepseek-coder-v2-lite-instruct": (
        "DeepseekV2",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 128,
            },
        },
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_says_what_transformers_says(tmp_path: Path, name: str) -> None:
    family, peculiar = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **peculiar)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, which are all alike when new
                parameter += torch.randn_like(parameter)
        model.get_input_embeddings().weight.mul_(0.5)  # or a tied head repeats the last token
    model.save_pretrained(tmp_path)
    with engine(tmp_path) as llm:
        answers = ask(llm)
    other, most, _ = differences(tmp_path, answers)
    assert (other, most < 1e-3) == (0, True), most
    assert len(set(answers[2].tokens)) > 3  # or the checkpoint would show nothing
