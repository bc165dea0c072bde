"""The tutorials' architectures in plain PyTorch, as a reference for the engine.

Written from the published descriptions, config.json and the names of the weights. It shares nothing
with `service.models`, so that a mistake there shows. Slow: float32 on the CPU, with one layer in
memory at a time. transformers runs the other architectures, with all of their weights in memory.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear, normalize, silu, softmax

from service.weights.tensor_files import weight_files


class Weights:
    """Tensors of a checkpoint by name, in float32. Each access reads the file."""

    def __init__(self, folder: Path, adapter: "Lora | None" = None) -> None:
        from safetensors import safe_open

        self._adapter = adapter
        self._read: dict[str, Any] = {}
        for file in weight_files(folder, "*.safetensors"):
            tensors: Any = safe_open(file, "pt")
            self._read |= dict.fromkeys(tensors.keys(), tensors.get_tensor)
        if not self._read:
            for file in weight_files(folder, "*.bin"):
                state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                self._read |= dict.fromkeys(state, state.__getitem__)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            raise ValueError(f"the weights have no {name}")
        tensor: Tensor = self._read[name](name)
        delta = self._adapter.delta(name) if self._adapter else None
        return tensor.float() if delta is None else tensor.float() + delta

    def embed(self, name: str, ids: Tensor) -> Tensor:
        """Look up tokens. An adapter of the table leaves a head alone that is the same tensor."""
        delta = self._adapter.table_delta(name) if self._adapter else None
        return embedding(ids, self[name] if delta is None else self[name] + delta)


class Lora:
    """What a LoRA adapter adds to the matrices of its base (arXiv:2106.09685, and PEFT's keys)."""

    def __init__(self, folder: Path) -> None:
        self._config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if (file := folder / "adapter_model.safetensors").is_file():
            from safetensors.torch import load_file

            self._tensors: dict[str, Tensor] = load_file(file)
        else:
            self._tensors = torch.load(folder / "adapter_model.bin", weights_only=True)

    def delta(self, name: str) -> Tensor | None:
        """Return what is added to the tensor `name`, or None."""
        module = name.removesuffix(".weight")
        a, b = (self._tensors.get(f"base_model.model.{module}.lora_{m}.weight") for m in "AB")
        if a is None or b is None:
            return None
        return self._scale(module) * b.float() @ a.float()

    def table_delta(self, name: str) -> Tensor | None:
        """Return what is added to the embeddings of tokens `name`, or None."""
        module = name.removesuffix(".weight")
        a, b = (self._tensors.get(f"base_model.model.{module}.lora_embedding_{m}") for m in "AB")
        if a is None or b is None:
            return None
        return self._scale(module) * (b.float() @ a.float()).T

    def _scale(self, module: str) -> float:
        alpha = self._of(module, "alpha_pattern", self._config["lora_alpha"])
        rank = self._of(module, "rank_pattern", self._config["r"])
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _of(self, module: str, key: str, default: float) -> float:
        patterns: dict[str, float] = self._config.get(key) or {}
        found = (v for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", module))
        return next(found, default)


@dataclass
class Experts:
    """Feed-forwards of which each token passes some, weighted, beside the layer's own."""

    router: Tensor  # [experts, hidden]
    per_token: int
    is_normalized: bool  # whether a token's weights sum to one
    matrices: Callable[[int], Sequence[Tensor]]  # gate, up and down of one


@dataclass
class Layer:
    """One decoder layer: head counts and float32 weights; q_norm and k_norm are over head_dim."""

    query_heads: int
    kv_heads: int
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    experts: Experts | None = None


class Llama:
    """Llama; XVERSE is the same. The other classes override their differences."""

    residual_scale = 1.0
    is_interleaved = False  # whether a rotated pair is two neighbours
    tied_by_default = False
    keys: dict[str, str] = {}  # Llama's name of a key of config.json -> the architecture's
    # Names of tensors, without ".weight". Those of a layer follow its number.
    table, norm, output = "model.embed_tokens", "model.norm", "lm_head"
    stack, mlp = "model.layers", "mlp"
    matrices = ("gate_proj", "up_proj", "down_proj")
    others = ("self_attn.o_proj", "input_layernorm", "post_attention_layernorm")

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        config = {**config, **{ours: config[theirs] for ours, theirs in self.keys.items()}}
        self.config = config
        self.weights = weights
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self.rms_norm_eps: float = config.get("rms_norm_eps", 1e-6)
        rope = config.get("rope_parameters") or {}  # transformers 5 saves both keys as this one
        self.rope_theta: float = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
        self.scaling: dict[str, Any] = rope or config.get("rope_scaling") or {}
        self.scaling_kind = self.scaling.get("rope_type", self.scaling.get("type", "default"))

    def inverse_frequencies(self) -> Tensor:
        """Return the radians per position of each rotated pair, [at most head_dim / 2]."""
        # "dynamic" changes nothing up to max_position_embeddings, and the engine stops there.
        if self.scaling_kind not in ("default", "dynamic"):
            raise ValueError(
                f"rope_scaling of type {self.scaling_kind} is not known to the reference"
            )
        return _inverse_frequencies(self.rope_theta, self.head_dim)

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights.embed(f"{self.table}.weight", ids)

    def tensor(self, index: int, name: str, kind: str = "weight") -> Tensor:
        """Return a tensor of a layer."""
        return self.weights[f"{self.stack}.{index}.{name}.{kind}"]

    def heads_of(self, index: int) -> tuple[int, int]:
        """Return the number of query and KV heads of a layer."""
        return self.heads, self.kv_heads

    def qkv(self, index: int) -> Sequence[Tensor]:
        return [self.tensor(index, f"self_attn.{name}_proj") for name in "qkv"]

    def split_qkv(self, index: int, rows: Tensor) -> Sequence[Tensor]:
        """Split what is one tensor: the rows of q, then k, then v."""
        heads, kv_heads = self.heads_of(index)
        return torch.split(rows, [n * self.head_dim for n in (heads, kv_heads, kv_heads)])

    def gate_up_down(self, index: int) -> Sequence[Tensor]:
        return self.matrices_of(index, self.mlp)

    def matrices_of(self, index: int, mlp: str) -> Sequence[Tensor]:
        return [self.tensor(index, f"{mlp}.{name}") for name in self.matrices]

    def layer(self, index: int) -> Layer:
        q, k, v = self.qkv(index)
        gate, up, down = self.gate_up_down(index)
        o, attention_norm, mlp_norm = (self.tensor(index, name) for name in self.others)
        heads = self.heads_of(index)
        return Layer(*heads, q, k, v, o, gate, up, down, attention_norm, mlp_norm)

    def final_norm(self) -> Tensor:
        return self.weights[f"{self.norm}.weight"]

    def head(self) -> Tensor:
        """Return the output weights, [vocabulary, hidden]."""
        tied = self.config.get("tie_word_embeddings", self.tied_by_default)
        return self.weights[f"{self.table if tied else self.output}.weight"]


class Baichuan2(Llama):
    """Source: baichuan-inc's modeling_baichuan.py."""

    def qkv(self, index: int) -> Sequence[Tensor]:
        return self.split_qkv(index, self.tensor(index, "self_attn.W_pack"))

    def head(self) -> Tensor:
        return normalize(super().head(), dim=1)


class BlueLM(Llama):
    """Source: vivo-ai's modeling_bluelm.py, and vivo-ai-lab/BlueLM for the 32K variants."""

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        super().__init__(config, weights)
        self.kv_heads = self.heads

    def inverse_frequencies(self) -> Tensor:
        frequencies = _inverse_frequencies(self.rope_theta, self.head_dim)
        if self.scaling_kind == "default":
            return frequencies
        if self.scaling_kind != "ntkmixed":
            raise ValueError(f"rope_scaling of type {self.scaling_kind} is not BlueLM's")
        pairs, power = self.head_dim // 2, self.scaling["power"]
        a = math.log(int(self.scaling["factor"])) / pairs**power
        return frequencies / torch.exp(a * torch.arange(1, pairs + 1).float() ** power)

    def embed(self, ids: Tensor) -> Tensor:
        embedded = super().embed(ids)
        if not self.config.get("use_stable_embedding", True):
            return embedded
        weight = self.weights["model.embed_layer_norm.weight"]
        bias = self.weights["model.embed_layer_norm.bias"]
        return layer_norm(embedded, weight.shape, weight, bias, self.rms_norm_eps)


class MiniCPM(Llama):
    """Source: OpenBMB/MiniCPM's modeling_minicpm.py."""

    tied_by_default = True

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        super().__init__(config, weights)
        self.residual_scale = config["scale_depth"] / math.sqrt(self.layers)

    def embed(self, ids: Tensor) -> Tensor:
        return super().embed(ids) * float(self.config["scale_emb"])

    def head(self) -> Tensor:
        scale: float = self.config["dim_model_base"] / self.config["hidden_size"]
        return super().head() * scale


class OpenELM(Llama):
    """Source: apple's modeling_openelm.py and apple/corenet's general_gpt.py."""

    rms_norm_eps, scaling_kind = 1e-6, "default"
    table, norm = "transformer.token_embeddings", "transformer.norm"
    stack = "transformer.layers"
    others = ("attn.out_proj", "attn_norm", "ffn_norm")

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        self.config = {"tie_word_embeddings": config.get("share_input_output_layers", True)}
        self.weights = weights
        self.layers = config["num_transformer_layers"]
        self.all_heads = list(zip(config["num_query_heads"], config["num_kv_heads"], strict=True))
        self.head_dim = config["head_dim"]
        self.rope_theta = config["rope_freq_constant"]

    def heads_of(self, index: int) -> tuple[int, int]:
        return self.all_heads[index]

    def qkv(self, index: int) -> Sequence[Tensor]:
        return self.split_qkv(index, self.tensor(index, "attn.qkv_proj"))

    def gate_up_down(self, index: int) -> Sequence[Tensor]:
        return [*self.tensor(index, "ffn.proj_1").chunk(2), self.tensor(index, "ffn.proj_2")]

    def layer(self, index: int) -> Layer:
        q_norm, k_norm = (self.tensor(index, f"attn.{name}_norm") for name in "qk")
        return replace(super().layer(index), q_norm=q_norm, k_norm=k_norm)


class InternLM(Llama):
    """Source: modeling_internlm.py in InternLM/lmdeploy."""

    biased = "qkvo"

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        super().__init__(config, weights)
        rotary = config.get("rotary") or {}
        self.rope_theta = rotary.get("base", self.rope_theta)
        self.is_biased: bool = config.get("bias", True)

    def layer(self, index: int) -> Layer:
        layer = super().layer(index)
        if not self.is_biased:
            return layer
        biases: dict[str, Any] = {
            f"{name}_bias": self.tensor(index, f"self_attn.{name}_proj", "bias")
            for name in self.biased
        }
        return replace(layer, **biases)


class InternLM2(Llama):
    """Source: InternLM's technical report, arXiv:2403.17297, and its modeling_internlm2.py."""

    table, output = "model.tok_embeddings", "output"
    mlp, matrices = "feed_forward", ("w1", "w3", "w2")
    others = ("attention.wo", "attention_norm", "ffn_norm")

    def qkv(self, index: int) -> Sequence[Tensor]:
        # For each KV head: the heads of q that share it, then k, then v.
        rows = self.tensor(index, "attention.wqkv")
        grouped = rows.view(self.kv_heads, -1, self.head_dim, rows.shape[1])
        q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
        return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)


class InternLM3(InternLM):
    """Source: modeling_internlm3.py; Llama but for its optional biases."""

    biased = "qkv"

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        super().__init__(config, weights)
        self.is_biased = config.get("qkv_bias", False)


class Qwen(Llama):
    """Source: Alibaba's modeling_qwen.py, for texts of at most seq_length tokens."""

    keys = {
        "head_dim": "kv_channels",
        "rms_norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
    }
    table, norm = "transformer.wte", "transformer.ln_f"
    stack = "transformer.h"
    matrices = ("w2", "w1", "c_proj")
    others = ("attn.c_proj", "ln_1", "ln_2")

    def qkv(self, index: int) -> Sequence[Tensor]:
        return self.split_qkv(index, self.tensor(index, "attn.c_attn"))

    def layer(self, index: int) -> Layer:
        q, k, v = self.split_qkv(index, self.tensor(index, "attn.c_attn", "bias"))
        return replace(super().layer(index), q_bias=q, k_bias=k, v_bias=v)


class Index(Llama):
    """Source: PaddlePaddle/PaddleFormers' modeling of `index`."""

    def head(self) -> Tensor:
        head = super().head()
        return normalize(head, dim=1) if self.config["norm_head"] else head


class DeepSeekMoE(Llama):
    """Source: arXiv:2401.06066 and deepseek-ai's modeling_deepseek.py."""

    def is_dense(self, index: int) -> bool:
        first: int = self.config["first_k_dense_replace"]
        return index < first

    def gate_up_down(self, index: int) -> Sequence[Tensor]:
        return self.matrices_of(index, "mlp" if self.is_dense(index) else "mlp.shared_experts")

    def layer(self, index: int) -> Layer:
        if self.is_dense(index):
            return super().layer(index)
        experts = Experts(
            self.tensor(index, "mlp.gate"),
            self.config["num_experts_per_tok"],
            self.config["norm_topk_prob"],
            lambda expert: self.matrices_of(index, f"mlp.experts.{expert}"),
        )
        return replace(super().layer(index), experts=experts)


class ChatGLM(Llama):
    """ChatGLM2, ChatGLM3 and GLM-4. Source: THUDM's modeling_chatglm.py.

    Half of each head is rotated, and neighbours are a pair.
    """

    is_interleaved = True
    keys = {
        "num_hidden_layers": "num_layers",
        "head_dim": "kv_channels",
        "rms_norm_eps": "layernorm_epsilon",
    }
    table = "transformer.embedding.word_embeddings"
    norm, output = "transformer.encoder.final_layernorm", "transformer.output_layer"
    stack = "transformer.encoder.layers"
    others = ("self_attention.dense", "input_layernorm", "post_attention_layernorm")

    def __init__(self, config: dict[str, Any], weights: Weights) -> None:
        for key, value in {
            "rmsnorm": True,
            "post_layer_norm": True,
            "original_rope": True,
            "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
        }.items():
            if config[key] != value:
                raise ValueError(f"a ChatGLM with {key} other than {value} is not known here")
        super().__init__(config, weights)
        if config["multi_query_attention"]:
            self.kv_heads = config["multi_query_group_num"]

    def inverse_frequencies(self) -> Tensor:
        theta = 10000.0 * (self.config.get("rope_ratio") or 1)
        return _inverse_frequencies(theta, self.head_dim // 2)

    def qkv(self, index: int) -> Sequence[Tensor]:
        return self.split_qkv(index, self.tensor(index, "self_attention.query_key_value"))

    def gate_up_down(self, index: int) -> Sequence[Tensor]:
        gate_up = self.tensor(index, "mlp.dense_h_to_4h")
        return [*gate_up.chunk(2), self.tensor(index, "mlp.dense_4h_to_h")]

    def layer(self, index: int) -> Layer:
        layer = super().layer(index)
        if not self.config["add_qkv_bias"]:
            return layer
        bias = self.tensor(index, "self_attention.query_key_value", "bias")
        q, k, v = self.split_qkv(index, bias)
        return replace(layer, q_bias=q, k_bias=k, v_bias=v)


# Architecture in config.json -> class.
ARCHITECTURES: dict[str, type[Llama]] = {
    "BaichuanForCausalLM": Baichuan2,
    "BlueLMForCausalLM": BlueLM,
    "ChatGLMForConditionalGeneration": ChatGLM,
    "ChatGLMModel": ChatGLM,
    "DeepseekForCausalLM": DeepSeekMoE,
    "IndexForCausalLM": Index,
    "InternLM2ForCausalLM": InternLM2,
    "InternLM3ForCausalLM": InternLM3,
    "InternLMForCausalLM": InternLM,
    "MiniCPMForCausalLM": MiniCPM,
    "OpenELMForCausalLM": OpenELM,
    "QWenLMHeadModel": Qwen,
    "XverseForCausalLM": Llama,
}


def logits(
    folder: Path, sequences: Sequence[Sequence[int]], adapter: Path | None = None
) -> list[Tensor]:
    """Return the float32 logits after each token, [tokens, vocabulary] for each sequence.

    `folder` is a checkpoint as published, and `adapter` a LoRA adapter that is merged into it.
    transformers runs architectures that are not in ARCHITECTURES. Raises ValueError for a missing
    weight, KeyError for a missing config.json key.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (architecture,) = config["architectures"]
    lora = Lora(adapter) if adapter else None
    if architecture not in ARCHITECTURES:
        return list(_transformers_logits(folder, sequences, lora))
    return forward(ARCHITECTURES[architecture](config, Weights(folder, lora)), sequences)


@torch.inference_mode()
def forward(model: Llama, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Run all sequences layer by layer."""
    frequencies = model.inverse_frequencies()
    hidden = [model.embed(torch.tensor(ids)) for ids in sequences]
    for index in range(model.layers):
        layer = model.layer(index)
        for x in hidden:  # in place
            attended = _attention(
                model, layer, _rms_norm(model, x, layer.attention_norm), frequencies
            )
            x += attended * model.residual_scale
            x += _mlp(layer, _rms_norm(model, x, layer.mlp_norm)) * model.residual_scale
    norm, head = model.final_norm(), model.head()
    return [linear(_rms_norm(model, x, norm), head) for x in hidden]


def _inverse_frequencies(theta: float, head_dim: int) -> Tensor:
    """RoFormer, arXiv:2104.09864."""
    return torch.tensor(float(theta)) ** -(torch.arange(0, head_dim, 2).float() / head_dim)


def _rms_norm(model: Llama, x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.rms_norm_eps) * weight


def _attention(model: Llama, layer: Layer, x: Tensor, frequencies: Tensor) -> Tensor:
    tokens = len(x)
    q = linear(x, layer.q, layer.q_bias).view(tokens, layer.query_heads, -1)
    k = linear(x, layer.k, layer.k_bias).view(tokens, layer.kv_heads, -1)
    v = linear(x, layer.v, layer.v_bias).view(tokens, layer.kv_heads, -1)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = _rms_norm(model, q, layer.q_norm), _rms_norm(model, k, layer.k_norm)
    angles = torch.outer(torch.arange(tokens).float(), frequencies)[:, None]
    rotate = _rotate_neighbours if model.is_interleaved else _rotate
    q, k = rotate(q, angles), rotate(k, angles)
    group = layer.query_heads // layer.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(model.head_dim)
    scores += torch.full((tokens, tokens), -torch.inf).triu(1)
    mixed = torch.einsum("hqk,khd->qhd", softmax(scores, -1), v)
    return linear(mixed.flatten(1), layer.o, layer.o_bias)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of [tokens, heads, head_dim] by [tokens, 1, pairs]."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _rotate_neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) at the start of each head; the rest stays as it is."""
    rotated = 2 * angles.shape[-1]
    first, second = x[..., :rotated:2], x[..., 1:rotated:2]
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([pairs.flatten(-2), x[..., rotated:]], -1)


def _mlp(layer: Layer, x: Tensor) -> Tensor:
    y = _feed_forward(x, layer.gate, layer.up, layer.down)
    return y + _routed(layer.experts, x) if layer.experts else y


def _routed(experts: Experts, x: Tensor) -> Tensor:
    weights, chosen = softmax(linear(x, experts.router), -1).topk(experts.per_token)
    if experts.is_normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in set(chosen.flatten().tolist()):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        y[token] += weights[token, place, None] * _feed_forward(x[token], *experts.matrices(expert))
    return y


def _feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def _transformers_logits(
    folder: Path, sequences: Sequence[Sequence[int]], adapter: Lora | None
) -> Iterator[Tensor]:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        # Others leave out what a model has beside the softmax, as the soft cap of Gemma 2.
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    with torch.inference_mode():
        if adapter:
            _merge(model, adapter)
        for ids in sequences:
            yield model(torch.tensor([list(ids)])).logits[0]


def _merge(model: Any, adapter: Lora) -> None:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        head.weight = torch.nn.Parameter(head.weight.clone())
    for name, parameter in model.named_parameters():
        delta = adapter.delta(name)
        if delta is None:
            delta = adapter.table_delta(name)
        if delta is not None:
            parameter += delta
