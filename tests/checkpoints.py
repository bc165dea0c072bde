"""Tiny random checkpoints in the layouts that were published: key names, config.json, file format.

`auto_map` names remote code that is not there, as for a user who never runs it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, LAYERS, HEADS, FFN, VOCABULARY = 128, 3, 4, 192, 320

LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
QUERY_HEADS, KV_HEADS, FFN_MULTIPLIERS = [8, 12, 12], [2, 3, 3], [0.5, 1.3, 2.0]

Tensors = dict[str, Tensor]


def write(name: str, folder: Path, **changes: Any) -> Path:
    """Write the checkpoint of one of BUILDERS; `changes` go over its config.json."""
    config, tensors = BUILDERS[name](**changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if name in BIN:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape) * scale


def _matrix(rows: int, columns: int) -> Tensor:
    return _random(rows, columns, scale=1.5 / columns**0.5)


def _norm(size: int) -> Tensor:
    return 1 + _random(size, scale=0.3)


def _config(architecture: str, **keys: Any) -> dict[str, Any]:
    remote = architecture.removesuffix("ForCausalLM")
    return {
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": f"configuration_remote.{remote}Config",
            "AutoModelForCausalLM": f"modeling_remote.{architecture}",
        },
        "torch_dtype": "float32",
        **keys,
    }


def _llama_tensors(config: dict[str, Any], kv_heads: int = HEADS) -> Tensors:
    torch.manual_seed(0)
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = kv_heads * hidden // config["num_attention_heads"]
    tensors = {
        "model.embed_tokens.weight": _random(config["vocab_size"], hidden),
        "model.norm.weight": _norm(hidden),
        # Rows of different lengths, or NormHead would not show.
        "lm_head.weight": _matrix(config["vocab_size"], hidden)
        * (0.2 + 3 * torch.rand(config["vocab_size"], 1)),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.input_layernorm.weight": _norm(hidden),
            f"{layer}.post_attention_layernorm.weight": _norm(hidden),
            f"{layer}.self_attn.q_proj.weight": _matrix(hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": _matrix(kv, hidden),
            f"{layer}.self_attn.v_proj.weight": _matrix(kv, hidden),
            f"{layer}.self_attn.o_proj.weight": _matrix(hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": _matrix(ffn, hidden),
            f"{layer}.mlp.up_proj.weight": _matrix(ffn, hidden),
            f"{layer}.mlp.down_proj.weight": _matrix(hidden, ffn),
        }
    return tensors


def baichuan2(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = _config(
        "BaichuanForCausalLM",
        model_type="baichuan",
        **LLAMA,
        model_max_length=1024,
        z_loss_weight=0,
        pad_token_id=0,
    )
    config |= changes
    tensors = _llama_tensors(config)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}.self_attn"
        packed = [tensors.pop(f"{prefix}.{name}_proj.weight") for name in "qkv"]
        tensors[f"{prefix}.W_pack.weight"] = torch.cat(packed)
    return config, tensors


def xverse(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    config = _config("XverseForCausalLM", model_type="xverse", **(LLAMA | ids)) | changes
    tensors = _llama_tensors(config)
    for index in range(config["num_hidden_layers"]):  # a buffer that the files carry
        tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = _random(16)
    return config, tensors


def bluelm(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = _config(
        "BlueLMForCausalLM",
        model_type="BlueLM",
        **LLAMA,
        pad_token_id=3,
        rope_scaling=None,
        rope_theta=10000.0,
        use_stable_embedding=True,
    )
    config |= changes
    tensors = _llama_tensors(config)
    tensors |= {
        "model.embed_layer_norm.weight": _norm(HIDDEN),
        "model.embed_layer_norm.bias": _random(HIDDEN, scale=0.3),
    }
    return config, tensors


def bluelm_32k(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    scaling = {"type": "ntkmixed", "factor": 16.0, "power": 0.3}
    return bluelm(rope_scaling=scaling, max_position_embeddings=64, **changes)


def minicpm(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32}
    config = _config("MiniCPMForCausalLM", **LLAMA, **scales) | changes
    del config["tie_word_embeddings"]  # absent as published, like model_type
    tensors = _llama_tensors(config)
    del tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] *= 0.03  # or the residual stream is all embedding
    return config, tensors


def openelm(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = _config(
        "OpenELMForCausalLM",
        model_type="openelm",
        activation_fn_name="swish",
        bos_token_id=1,
        eos_token_id=2,
        ffn_dim_divisor=64,
        ffn_multipliers=FFN_MULTIPLIERS,
        ffn_with_glu=True,
        head_dim=32,
        initializer_range=0.02,
        max_context_length=1024,
        model_dim=HIDDEN,
        normalization_layer_name="rms_norm",
        normalize_qk_projections=True,
        num_gqa_groups=4,
        num_kv_heads=KV_HEADS,
        num_query_heads=QUERY_HEADS,
        num_transformer_layers=LAYERS,
        qkv_multipliers=[0.5, 1.0],
        rope_freq_constant=10000,
        rope_max_length=2048,
        share_input_output_layers=True,
        vocab_size=VOCABULARY,
    )
    config |= changes
    torch.manual_seed(0)
    tensors = {
        "transformer.token_embeddings.weight": _random(VOCABULARY, HIDDEN, scale=0.5),
        "transformer.norm.weight": _norm(HIDDEN),
    }
    sizes = zip(config["num_query_heads"], config["num_kv_heads"], [64, 192, 256], strict=True)
    for index, (query_heads, kv_heads, ffn) in enumerate(sizes):
        layer = f"transformer.layers.{index}"
        tensors |= {
            f"{layer}.attn_norm.weight": _norm(HIDDEN),
            f"{layer}.ffn_norm.weight": _norm(HIDDEN),
            f"{layer}.attn.qkv_proj.weight": _matrix((query_heads + 2 * kv_heads) * 32, HIDDEN),
            f"{layer}.attn.out_proj.weight": _matrix(HIDDEN, query_heads * 32),
            f"{layer}.attn.q_norm.weight": _norm(32),
            f"{layer}.attn.k_norm.weight": _norm(32),
            f"{layer}.ffn.proj_1.weight": _matrix(2 * ffn, HIDDEN),
            f"{layer}.ffn.proj_2.weight": _matrix(HIDDEN, ffn),
        }
    return config, tensors


def qwen2(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    grouped = {"num_key_value_heads": 2, "rope_theta": 1e6}
    config = _config("Qwen2ForCausalLM", model_type="qwen2", **LLAMA, **grouped) | changes
    del config["auto_map"]
    tensors = _llama_tensors(config, kv_heads=2)
    for index in range(config["num_hidden_layers"]):
        for name, size in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            tensors[f"model.layers.{index}.self_attn.{name}_proj.bias"] = _random(size)
    return config, tensors


BUILDERS: dict[str, Callable[..., tuple[dict[str, Any], Tensors]]] = {
    "baichuan2": baichuan2,
    "xverse": xverse,
    "bluelm": bluelm,
    "bluelm_32k": bluelm_32k,
    "openelm": openelm,
    "minicpm": minicpm,
    "qwen2": qwen2,
}
# As published; the others are safetensors.
BIN = {"baichuan2", "xverse", "bluelm", "bluelm_32k", "minicpm"}
