"""Tiny random checkpoints in the layouts that were published: key names, config.json, file format.

`auto_map` names remote code that is not there, as for a user who never runs it. The tokenizers are
trained on a few sentences.
"""

import base64
import io
import json
import re
import shutil
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from torch import Tensor

from service import model_config
from service.model_config import ModelConfig, Origins

HIDDEN, LAYERS, HEADS, FFN, VOCABULARY = 128, 3, 4, 192, 448

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

OTHER_HEADS = ("output.weight", "output_layer.weight")  # than lm_head

Tensors = dict[str, Tensor]


def write(name: str, folder: Path, **changes: Any) -> Path:
    """Write the checkpoint of one of BUILDERS; `changes` go over its config.json."""
    config, tensors = BUILDERS[name](**changes)
    # OpenELM's tokenizer is another repository's.
    tokenizer = folder / "tokenizer" if name == "openelm" else folder
    TOKENIZERS[name](tokenizer)
    _silence_what_is_no_text(tokenizer / "tokenizer.model", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    if name in BIN:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_TABLES = ("embed_tokens.weight", "token_embeddings.weight", ".wte.weight")


def write_adapter(
    folder: Path,
    base: Path,
    merged: Path | None = None,
    *,
    modules: str = "",
    embeddings: bool = False,
    rank: int = 4,
    seed: int = 1,
    binary: bool = False,
    **keys: Any,
) -> Path:
    """Write a LoRA adapter of a checkpoint's layers as PEFT does; `keys` go over its config.

    `modules` is a pattern for the names of matrices; `embeddings` adds the table of tokens. With
    `merged`, the checkpoint is written there with the adapter's weights added to its own; a table
    that was the head too is then the table alone.
    """
    if (base / "model.safetensors").exists():
        weights = load_file(base / "model.safetensors")
    else:
        weights = torch.load(base / "pytorch_model.bin")
    generator = torch.Generator().manual_seed(seed)
    scale = 2 * rank / (rank**0.5 if keys.get("use_rslora") else rank)
    tensors: Tensors = {}
    untied = False
    for name, weight in list(weights.items()):
        module = name.removesuffix(".weight")
        if embeddings and name.endswith(_TABLES):
            a, b = (torch.randn(rank, n, generator=generator) * 0.1 for n in weight.shape)
            tensors[f"base_model.model.{module}.lora_embedding_A"] = a
            tensors[f"base_model.model.{module}.lora_embedding_B"] = b.T.contiguous()
            untied = "lm_head.weight" not in weights
            weights.setdefault("lm_head.weight", weight)
            weights[name] = weight + scale * (b.T @ a).T
        if weight.ndim != 2 or not re.search(r"\.\d+\.", name) or not re.search(modules, module):
            continue
        rows, columns = weight.shape
        a = torch.randn(rank, columns, generator=generator) * 0.1
        b = torch.randn(rows, rank, generator=generator) * 0.1
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        weights[name] = weight + scale * b @ a
    folder.mkdir(parents=True, exist_ok=True)
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({name.split(".lora_")[0].split(".")[-1] for name in tensors}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    _json(folder, "adapter_config.json", **(config | keys))
    if merged:
        shutil.copytree(base, merged, ignore=shutil.ignore_patterns("*.bin", "*.safetensors"))
        save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
        if untied:
            config = json.loads((base / "config.json").read_text())
            key = "share_input_output_layers"
            key = key if key in config else "tie_word_embeddings"
            _json(merged, "config.json", **{**config, key: False})
    return folder


def _silence_what_is_no_text(tokenizer: Path, tensors: Tensors) -> None:
    """Give single bytes and control tokens no likelihood, or answers would be mostly those."""
    if not tokenizer.exists():
        return
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    except RuntimeError:  # GLM-4's is a tiktoken file
        return
    ids = [
        id
        for id in range(len(model))
        if model.is_byte(id) or model.is_control(id) or model.is_unknown(id)
    ]
    heads = [name for name in tensors if name.endswith(("lm_head.weight", *OTHER_HEADS))]
    if heads:
        tensors[heads[0]][ids] = 0
    else:
        (embeddings,) = (name for name in tensors if "embed" in name)
        tensors[embeddings][ids] *= 0.01


def load(name: str, folder: Path, *assignments: str) -> tuple[ModelConfig, Origins]:
    """The catalogue's entry of a model, on the files that `write` made in `folder`."""
    return model_config.load(CATALOGUE[name], arguments(name, folder, *assignments))


def write_scripted(folder: Path, script: Sequence[str]) -> Path:
    """Write a Qwen2 that goes on with the next token of `script`, in which none may stand twice.

    Its layers change nothing, so that the last token alone decides. It has the tags of reasoning,
    and its template writes the opening one where the question has the word `begun`.
    """
    write("qwen2", folder)
    keys = json.loads((folder / "tokenizer_config.json").read_text())
    tag = "{% if 'begun' in messages[-1]['content'] %}{{ '<think>' }}{% endif %}"
    keys["chat_template"] += tag
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in script]
    assert len(set(ids)) == len(ids)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"vocab_size": VOCABULARY + 2, "max_position_embeddings": 32768})
    )
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    table = _random(VOCABULARY + 2, HIDDEN)
    head = torch.zeros_like(table)
    head[ids[1:]] = table[ids[:-1]]
    weights |= {"model.embed_tokens.weight": table, "lm_head.weight": head}
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def arguments(name: str, folder: Path, *assignments: str) -> list[str]:
    """For --set: the files that `write` made, and a KV cache that is small."""
    files = [f"source={{path: {folder}}}"]
    if name == "openelm":
        files.append(f"tokenizer={{path: {folder / 'tokenizer'}}}")
    return [*files, "engine.kv_cache_memory_bytes=64M", *assignments]


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
    _add_qkv_biases(tensors, config["num_hidden_layers"])
    return config, tensors


def _add_qkv_biases(tensors: Tensors, layers: int) -> None:
    for index in range(layers):
        for name, size in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            tensors[f"model.layers.{index}.self_attn.{name}_proj.bias"] = _random(size)


def internlm(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = _config(
        "InternLMForCausalLM",
        model_type="internlm",
        **LLAMA,
        bias=True,
        pad_token_id=2,
        rotary={"base": 20000, "type": "dynamic"},
    )
    config |= changes
    tensors = _llama_tensors(config)
    for index in range(config["num_hidden_layers"]):
        for name in "qkvo":
            tensors[f"model.layers.{index}.self_attn.{name}_proj.bias"] = _random(HIDDEN)
    return config, tensors


def internlm2(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = _config(
        "InternLM2ForCausalLM",
        model_type="internlm2",
        **LLAMA,
        attn_implementation="eager",
        bias=False,
        num_key_value_heads=2,
        pad_token_id=2,
        rope_scaling={"type": "dynamic", "factor": 2.0},
        rope_theta=1000000,
    )
    config |= changes
    llama = _llama_tensors(config, kv_heads=2)
    tensors = {
        "model.tok_embeddings.weight": llama["model.embed_tokens.weight"],
        "model.norm.weight": llama["model.norm.weight"],
        "output.weight": llama["lm_head.weight"],
    }
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, published in names.items():
            tensors[f"{layer}.{published}.weight"] = llama[f"{layer}.{name}.weight"]
        q, k, v = (
            llama[f"{layer}.self_attn.{name}_proj.weight"].view(2, -1, HIDDEN // HEADS, HIDDEN)
            for name in "qkv"
        )
        # For each KV head: its heads of q, then k, then v.
        tensors[f"{layer}.attention.wqkv.weight"] = torch.cat([q, k, v], 1).flatten(0, 2)
    return config, tensors


def internlm3(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = _config(
        "InternLM3ForCausalLM",
        model_type="internlm3",
        **LLAMA,
        bias=False,
        head_dim=32,
        num_key_value_heads=2,
        pad_token_id=2,
        qkv_bias=True,
        rope_scaling={"factor": 6.0, "rope_type": "dynamic"},
        rope_theta=50000000,
    )
    config |= changes
    tensors = _llama_tensors(config, kv_heads=2)
    _add_qkv_biases(tensors, config["num_hidden_layers"])
    return config, tensors


def qwen(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = _config(
        "QWenLMHeadModel",
        model_type="qwen",
        attn_dropout_prob=0.0,
        bf16=False,
        emb_dropout_prob=0.0,
        fp16=False,
        fp32=False,
        hidden_size=HIDDEN,
        intermediate_size=2 * FFN,
        initializer_range=0.02,
        kv_channels=HIDDEN // HEADS,
        layer_norm_epsilon=0.05,  # or reading it from another key would not show
        max_position_embeddings=1024,
        no_bias=True,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        onnx_safe=None,
        rotary_emb_base=20000,
        rotary_pct=1.0,
        scale_attn_weights=True,
        seq_length=1024,
        tie_word_embeddings=False,
        tokenizer_class="QWenTokenizer",
        use_cache=True,
        use_dynamic_ntk=True,
        use_flash_attn="auto",
        use_logn_attn=True,
        vocab_size=608,  # 400 tokens and 208 control tokens
    )
    config |= changes
    llama = _llama_tensors(
        {
            **LLAMA,
            "num_hidden_layers": config["num_hidden_layers"],
            "vocab_size": config["vocab_size"],
        }
    )
    tensors = {
        "transformer.wte.weight": llama["model.embed_tokens.weight"],
        "transformer.ln_f.weight": llama["model.norm.weight"],
        "lm_head.weight": llama["lm_head.weight"],
    }
    names = {
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    for index in range(config["num_hidden_layers"]):
        layer, published = f"model.layers.{index}", f"transformer.h.{index}"
        for name, ours in names.items():
            tensors[f"{published}.{name}.weight"] = llama[f"{layer}.{ours}.weight"]
        packed = [llama[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv"]
        tensors[f"{published}.attn.c_attn.weight"] = torch.cat(packed)
        tensors[f"{published}.attn.c_attn.bias"] = _random(3 * HIDDEN)
    return config, tensors


def index(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    published = {"norm_head": True, "max_length": 1024, "pad_token_id": 0}
    config = _config("IndexForCausalLM", model_type="index", **LLAMA, **published) | changes
    return config, _llama_tensors(config)


def deepseek_moe(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    experts, width = 8, 64
    config = _config(
        "DeepseekForCausalLM",
        model_type="deepseek",
        **LLAMA,
        attention_bias=False,
        attention_dropout=0.0,
        first_k_dense_replace=1,
        moe_intermediate_size=width,
        moe_layer_freq=1,
        n_routed_experts=experts,
        n_shared_experts=2,
        norm_topk_prob=False,
        num_experts_per_tok=3,
        num_key_value_heads=HEADS,
        rope_scaling=None,
        rope_theta=10000,
        scoring_func="softmax",
    )
    config |= changes
    tensors = _llama_tensors(config)
    for index in range(config["first_k_dense_replace"], config["num_hidden_layers"]):
        mlp = f"model.layers.{index}.mlp"
        for name in ("gate", "up", "down"):
            del tensors[f"{mlp}.{name}_proj.weight"]
        tensors[f"{mlp}.gate.weight"] = _matrix(experts, HIDDEN)
        sizes = {f"experts.{expert}": width for expert in range(experts)}
        for part, size in {**sizes, "shared_experts": 2 * width}.items():
            tensors |= {
                f"{mlp}.{part}.gate_proj.weight": _matrix(size, HIDDEN),
                f"{mlp}.{part}.up_proj.weight": _matrix(size, HIDDEN),
                f"{mlp}.{part}.down_proj.weight": _matrix(HIDDEN, size),
            }
    return config, tensors


def chatglm3(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    config = _config(
        "ChatGLMModel",
        model_type="chatglm",
        add_bias_linear=False,
        add_qkv_bias=True,
        apply_query_key_layer_scaling=True,
        apply_residual_connection_post_layernorm=False,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        bias_dropout_fusion=True,
        eos_token_id=2,
        ffn_hidden_size=FFN,
        fp32_residual_connection=False,
        hidden_dropout=0.0,
        hidden_size=HIDDEN,
        kv_channels=HIDDEN // HEADS,
        layernorm_epsilon=1e-5,
        multi_query_attention=True,
        multi_query_group_num=2,
        num_attention_heads=HEADS,
        num_layers=LAYERS,
        original_rope=True,
        pad_token_id=0,
        padded_vocab_size=VOCABULARY + 9,
        post_layer_norm=True,
        rmsnorm=True,
        seq_length=1024,
        tie_word_embeddings=False,
        use_cache=True,
    )
    config |= changes
    llama = _llama_tensors(
        {
            **LLAMA,
            "num_hidden_layers": config["num_layers"],
            "vocab_size": config["padded_vocab_size"],
        },
        kv_heads=2,
    )
    tensors = {
        "transformer.embedding.word_embeddings.weight": llama["model.embed_tokens.weight"],
        "transformer.rotary_pos_emb.inv_freq": _random(8),  # a buffer that the files carry
        "transformer.encoder.final_layernorm.weight": llama["model.norm.weight"],
        "transformer.output_layer.weight": llama["lm_head.weight"],
    }
    names = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    }
    packed = {
        "self_attention.query_key_value": [f"self_attn.{name}_proj" for name in "qkv"],
        "mlp.dense_h_to_4h": ["mlp.gate_proj", "mlp.up_proj"],
    }
    for index in range(config["num_layers"]):
        layer, published = f"model.layers.{index}", f"transformer.encoder.layers.{index}"
        for name, ours in names.items():
            tensors[f"{published}.{name}.weight"] = llama[f"{layer}.{ours}.weight"]
        for name, parts in packed.items():
            joined = torch.cat([llama[f"{layer}.{part}.weight"] for part in parts])
            tensors[f"{published}.{name}.weight"] = joined
        tensors[f"{published}.self_attention.query_key_value.bias"] = _random(2 * HIDDEN)
    return config, tensors


def glm4(**changes: Any) -> tuple[dict[str, Any], Tensors]:
    return chatglm3(
        architectures=["ChatGLMForConditionalGeneration"],
        layernorm_epsilon=1.5625e-07,
        num_hidden_layers=LAYERS,
        padded_vocab_size=VOCABULARY,  # as published, more than there are tokens
        rope_ratio=500,
        **changes,
    )


BUILDERS: dict[str, Callable[..., tuple[dict[str, Any], Tensors]]] = {
    "baichuan2": baichuan2,
    "xverse": xverse,
    "bluelm": bluelm,
    "bluelm_32k": bluelm_32k,
    "openelm": openelm,
    "minicpm": minicpm,
    "qwen2": qwen2,
    "internlm": internlm,
    "internlm2": internlm2,
    "internlm3": internlm3,
    "qwen": qwen,
    "index": index,
    "deepseek_moe": deepseek_moe,
    "chatglm3": chatglm3,
    "characterglm": chatglm3,  # not confirmed by its files: ChatGLM3's layout
    "glm4": glm4,
}
# As published; the others are safetensors.
BIN = {
    "baichuan2",
    "bluelm",
    "bluelm_32k",
    "characterglm",
    "chatglm3",
    "index",
    "internlm",
    "internlm2",
    "minicpm",
    "xverse",
}


CATALOGUE = {
    "baichuan2": "baichuan2-7b-chat",
    "xverse": "xverse-7b-chat",
    "bluelm": "bluelm-7b-chat",
    "bluelm_32k": "bluelm-7b-chat",
    "openelm": "openelm-3b-instruct",
    "minicpm": "minicpm-2b-sft",
    "qwen2": "qwen2-7b-instruct",
    "internlm": "internlm-chat-7b",
    "internlm2": "internlm2-chat-7b",
    "internlm3": "internlm3-8b-instruct",
    "qwen": "qwen-7b-chat",
    "index": "index-1.9b-chat",
    "deepseek_moe": "deepseek-moe-16b-chat",
    "chatglm3": "chatglm3-6b",
    "characterglm": "characterglm-6b",
    "glm4": "glm-4-9b-chat",
}

TEXTS = (
    "你好，世界！今天天气怎么样？",
    "山东省最高的山是泰山，它比黄山低。",
    "The quick brown fox jumps over the lazy dog.",
    "Who are you? I am a small model, and I am 12 days old.",
    "Once upon a time there was a little girl in the mountains.",
)


def sentencepiece_model(
    folder: Path, markers: tuple[str, ...] = (), **options: Any
) -> sentencepiece.SentencePieceProcessor:
    """Train and write `tokenizer.model`: byte-pair encoding with byte fallback."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=list(markers),
        minloglevel=2,
        **{
            "add_dummy_prefix": False,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            **options,
        },
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _json(folder: Path, name: str, **keys: Any) -> None:
    (folder / name).write_text(json.dumps(keys, ensure_ascii=False))


def baichuan2_tokenizer(folder: Path, **options: Any) -> None:
    model = sentencepiece_model(
        folder, tuple(f"<reserved_{i}>" for i in range(100, 110)), **options
    )
    _json(
        folder,
        "tokenizer_config.json",
        add_bos_token=False,
        add_eos_token=False,
        auto_map={"AutoTokenizer": ["tokenization_remote.BaichuanTokenizer", None]},
        tokenizer_class="BaichuanTokenizer",
    )
    _json(
        folder,
        "generation_config.json",
        user_token_id=model.piece_to_id("<reserved_106>"),
        assistant_token_id=model.piece_to_id("<reserved_107>"),
        eos_token_id=2,
        do_sample=True,
        temperature=0.3,
        top_k=5,
        top_p=0.85,
        repetition_penalty=1.05,
        max_new_tokens=2048,
    )


def bluelm_tokenizer(folder: Path, **options: Any) -> None:
    markers = ("[|Human|]:", "[|AI|]:", "[|SYSTEM|]:", "[|Function|]:")
    sentencepiece_model(folder, markers, **options)
    _json(folder, "tokenizer_config.json", add_bos_token=True, tokenizer_class="BlueLMTokenizer")
    _json(folder, "generation_config.json", eos_token_id=2, repetition_penalty=1.1)


def llama_tokenizer(folder: Path, markers: tuple[str, ...] = ()) -> None:
    sentencepiece_model(folder, markers, add_dummy_prefix=True)
    _json(
        folder,
        "tokenizer_config.json",
        add_bos_token=True,
        add_eos_token=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        tokenizer_class="LlamaTokenizer",
    )


def minicpm_tokenizer(folder: Path) -> None:
    llama_tokenizer(folder, ("<用户>", "<AI>"))


def _tokenizers_model(
    folder: Path, tokenizer: Tokenizer, special: list[str], alphabet: list[str], **keys: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **keys)


def xverse_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>"]
    roles = {"unk_token": "<unk>", "pad_token": "<pad>"}
    roles |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    _tokenizers_model(folder, tokenizer, special, [*string.printable], **roles)
    _json(folder, "generation_config.json", eos_token_id=3, do_sample=True, temperature=0.5)


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen2_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    # As published, or transformers' class would not give the ids of this tokenizer.json.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _tokenizers_model(
        folder,
        tokenizer,
        special,
        pre_tokenizers.ByteLevel.alphabet(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    _json(folder, "generation_config.json", eos_token_id=[2, 0], do_sample=True, temperature=0.7)


def chatglm3_tokenizer(folder: Path, **options: Any) -> None:
    sentencepiece_model(folder, **{"add_dummy_prefix": True, **options})
    _json(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        tokenizer_class="ChatGLMTokenizer",
        eos_token="</s>",
        pad_token="<unk>",
        unk_token="<unk>",
    )


def internlm_tokenizer(folder: Path, **options: Any) -> None:
    sentencepiece_model(folder, ("<eoh>", "<eoa>"), **options)
    remote = {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]}
    _json(folder, "tokenizer_config.json", auto_map=remote, tokenizer_class="InternLMTokenizer")


def internlm2_tokenizer(folder: Path, version: int = 2, **options: Any) -> None:
    """Only tokenizer.model, whose pieces of the control tokens have other names."""
    control = {"[UNUSED_TOKEN_145]": "<|im_end|>", "[UNUSED_TOKEN_146]": "<|im_start|>"}
    model = sentencepiece_model(folder, tuple(control), **options)
    added = {
        str(model.piece_to_id(piece)): {
            "content": token,
            "special": True,
            **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False),
        }
        for piece, token in control.items()
    }
    name = f"InternLM{version}Tokenizer"
    _json(
        folder,
        "tokenizer_config.json",
        added_tokens_decoder=added,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        auto_map={"AutoTokenizer": [f"tokenization_internlm{version}.{name}", None]},
        tokenizer_class=name,
    )


def internlm3_tokenizer(folder: Path, **options: Any) -> None:
    """Its file asks for a dummy prefix."""
    internlm2_tokenizer(folder, 3, **{"add_dummy_prefix": True, **options})


def index_tokenizer(folder: Path, **options: Any) -> None:
    sentencepiece_model(folder, ("reserved_0", "reserved_1"), **options)
    remote = {"AutoTokenizer": ["tokenization_index.IndexTokenizer", None]}
    _json(folder, "tokenizer_config.json", auto_map=remote, tokenizer_class="IndexTokenizer")


def write_ranks(file: Path, tokens: Sequence[str]) -> None:
    """Write a tiktoken file from tokens in the letters that `tokenizers` has for bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown}
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(others)}
    lines = (
        base64.b64encode(bytes(byte_of[letter] for letter in token)).decode() + f" {rank}\n"
        for rank, token in enumerate(tokens)
    )
    file.write_text("".join(lines))


def _tiktoken(folder: Path, name: str, size: int, words: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    vocabulary = tokenizer.get_vocab()
    write_ranks(folder / name, sorted(vocabulary, key=vocabulary.__getitem__))


def glm4_tokenizer(folder: Path) -> None:
    """400 tokens and 14 control tokens."""
    _tiktoken(folder, "tokenizer.model", 400, QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
    remote = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
    _json(folder, "tokenizer_config.json", auto_map=remote, tokenizer_class="ChatGLM4Tokenizer")
    _json(folder, "generation_config.json", eos_token_id=[400, 407, 409], do_sample=True)


def qwen_tokenizer(folder: Path) -> None:
    """400 tokens and 208 control tokens."""
    _tiktoken(folder, "qwen.tiktoken", 400, QWEN_WORDS)
    remote = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    _json(folder, "tokenizer_config.json", auto_map=remote, tokenizer_class="QWenTokenizer")
    _json(folder, "generation_config.json", eos_token_id=400, pad_token_id=400, do_sample=True)


TOKENIZERS: dict[str, Callable[..., None]] = {
    "baichuan2": baichuan2_tokenizer,
    "xverse": xverse_tokenizer,
    "bluelm": bluelm_tokenizer,
    "bluelm_32k": bluelm_tokenizer,
    "openelm": llama_tokenizer,
    "minicpm": minicpm_tokenizer,
    "qwen2": qwen2_tokenizer,
    "chatglm3": chatglm3_tokenizer,
    "characterglm": chatglm3_tokenizer,
    "glm4": glm4_tokenizer,
    "index": index_tokenizer,
    "internlm": internlm_tokenizer,
    "internlm2": internlm2_tokenizer,
    "qwen": qwen_tokenizer,
    "internlm3": internlm3_tokenizer,
    "deepseek_moe": qwen2_tokenizer,
}
