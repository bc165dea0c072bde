"""What the general plugin adds to vLLM, also to bare vLLM."""

import json
from pathlib import Path

from vllm.plugins import load_general_plugins
from vllm.transformers_utils.config import get_config

# MiniCPM-2B's published config.json in small: neither model_type nor tie_word_embeddings.
MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
}


def test_minicpms_config_loads_without_remote_code(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MINICPM))
    load_general_plugins()
    config = get_config(tmp_path, trust_remote_code=False)
    assert config.model_type == "minicpm"
    assert config.tie_word_embeddings is True
    assert (config.scale_emb, config.dim_model_base, config.scale_depth) == (12, 16, 1.4)
