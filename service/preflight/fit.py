"""Computes whether a model fits, from config.json and the headers of the weight files.

Blocks, tokens and concurrency are computed as in vLLM (vllm/v1/core/kv_cache_utils.py). Values that
only a run can measure are estimated, for a GPU from public logs. No weights are loaded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service import vllm_arguments
from service.errors import WeightsError
from service.weights import tensor_files
from service.weights.adapter import base_tensors

GIB = 2**30

# Bytes for each pair of request and vocabulary entry while vLLM's profiling run samples: float32
# logits, their sort with int64 indices, probabilities and their sum. Public logs of older vLLM
# (0.6 and 0.7) at its 256 requests say "activation peak memory takes 1.19GiB" for a vocabulary of
# 128,256 and 1.42 for one of 152,064: 39 bytes in both.
_SAMPLER_BYTES = 40
# The largest values in public logs for models up to 8B. CUDA graphs: Qwen2.5-7B on vLLM 0.8 says
# "Graph capturing ... took 1.44 GiB", others 0.1 to 0.7. CUDA libraries on one GPU: most say
# "non_torch_memory takes 0.05GiB" to 0.12; one older log, measured in another way, says 1.79.
_CUDA_GRAPHS = int(1.44 * GIB)
_CUDA_LIBRARIES = int(0.12 * GIB)
# On a CPU vLLM counts its whole process, and samples without a sort. Measured with vLLM 0.32: 0.55
# GiB for a model of 0.3 MB; 1.02 GiB (compiled 1.15) for a model with 0.25 GiB of weights, 256
# requests and a vocabulary of 49,152.
_CPU_PROCESS = int(0.62 * GIB)
_CPU_SAMPLER_BYTES = 16


@dataclass(frozen=True)
class Demand:
    """Memory that a model needs on each GPU, in bytes, and its limits."""

    weights: int
    overhead: int
    block: int  # one KV cache block over all layers
    block_tokens: int
    max_model_len: int  # max tokens of one request, prompt and answer
    max_num_seqs: int  # max requests at once
    gpus: int
    on_gpu: bool = True
    adapters: int = 0  # vLLM's slots for LoRA adapters
    max_loras: int = 0  # their number

    @property
    def beside_the_cache(self) -> int:
        return self.weights + self.adapters + self.overhead


@dataclass(frozen=True)
class Fit:
    """A model in the memory of its GPUs. Sizes are bytes per GPU."""

    demand: Demand
    memory: int
    utilization: float  # the share of `memory` that vLLM uses
    fixed_kv_cache: int | None  # engine.kv_cache_memory_bytes, which replaces the share

    @property
    def kv_cache(self) -> int:
        if self.fixed_kv_cache is not None:
            return self.fixed_kv_cache
        demand = self.demand
        return int(self.memory * self.utilization) - demand.beside_the_cache

    @property
    def blocks(self) -> int:
        return max(0, self.kv_cache) // self.demand.block

    @property
    def tokens(self) -> int:
        """vLLM's "KV cache size"."""
        return int(self.concurrency(self.demand.max_model_len) * self.demand.max_model_len)

    def concurrency(self, context: int) -> float:
        """Return how many requests of `context` tokens fit: vLLM's "Maximum concurrency"."""
        return self.blocks / self._blocks_of(context)

    @property
    def largest_context(self) -> int:
        """Tokens of the largest single request that fits."""
        return min(self.demand.max_model_len, self.blocks * self.demand.block_tokens)

    def lines(self) -> list[str]:
        """Describe the fit to the user."""
        demand = self.demand
        memory = f"{self.memory / GIB:.1f} GiB"
        if demand.gpus > 1:
            memory = f"each of {demand.gpus} with {memory}"
        if self.fixed_kv_cache is None:
            memory += f" x {self.utilization:g} = {self.memory * self.utilization / GIB:.1f} GiB"
        key = "" if self.fixed_kv_cache is None else " (engine.kv_cache_memory_bytes)"
        adapters = f"adapters {demand.adapters / GIB:.1f}, " if demand.adapters else ""
        head = (
            f"memory: {memory}: weights {demand.weights / GIB:.1f}, {adapters}overhead about "
            f"{demand.overhead / GIB:.1f}, "
        )
        if not self.blocks:
            return [f"{head}nothing left for KV cache"]
        full, largest = demand.max_model_len, self.largest_context
        requests = [f"{self.concurrency(full):.2f} requests at the full context of {full:,} tokens"]
        requests += [f"{int(self.concurrency(1024))} at 1,024"] if full > 1024 else []
        limit = "engine.max_model_len, or the model" if largest == full else "the memory"
        return [
            f"{head}KV cache {self.kv_cache / GIB:.1f} GiB{key} = {self.tokens:,} tokens "
            f"({demand.block / demand.block_tokens / 1024:.4g} KiB a token)",
            f"fits: {'; '.join(requests)}; largest context for one request {largest:,} (limited by "
            f"{limit})",
        ]

    def problems(self, concurrent: int = 1, context: int | None = None) -> list[str]:
        """Return why `concurrent` requests of `context` tokens do not fit, with remedies.

        One request of engine.max_model_len tokens must always fit, or vLLM does not start.
        """
        demand = self.demand
        smaller = "a larger engine.tensor_parallel_size"
        if demand.on_gpu:
            smaller = f"engine.quantization=fp8_per_tensor, or {smaller}"
        if demand.max_loras > 1:
            smaller = f"engine.max_loras=1, {smaller}"
        used = demand.beside_the_cache + (self.fixed_kv_cache or 0)
        limit = (
            self.memory if self.fixed_kv_cache is not None else int(self.memory * self.utilization)
        )
        if used > limit or not self.blocks:
            lower = (
                "a lower engine.kv_cache_memory_bytes, " if self.fixed_kv_cache is not None else ""
            )
            return [
                f"does not fit: {max(used - limit, demand.block) / GIB:.2f} GiB more than there "
                f"is; set {lower}{smaller}"
            ]
        found = []
        full = demand.max_model_len
        context = context or full
        if context > full:
            found.append(
                f"a request of {context:,} tokens is longer than {full:,}; raise "
                "engine.max_model_len if the model was made for it"
            )
        if concurrent > demand.max_num_seqs:
            found.append(
                f"of {concurrent:,} requests {demand.max_num_seqs:,} are answered at once and the "
                f"others wait; raise engine.max_num_seqs to {concurrent}"
            )
        # The user's demand, then vLLM's.
        for requests, tokens in (concurrent, min(context, full)), (1, full):
            if self.concurrency(tokens) < requests:
                missing = (requests * self._blocks_of(tokens) - self.blocks) * demand.block
                shorter = self.blocks // requests * demand.block_tokens
                remedy = f"engine.max_model_len={shorter}, " if shorter else ""
                remedy += "engine.kv_cache_dtype=fp8, " if demand.on_gpu else ""
                if self.fixed_kv_cache is not None:
                    remedy += "a larger engine.kv_cache_memory_bytes, "
                found.append(
                    f"does not fit: {requests} x {tokens:,} tokens need {missing / GIB:.2f} GiB "
                    f"more KV cache than there is; set {remedy}{smaller}"
                )
                break
        return found

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.demand.block_tokens)


def estimate(vllm_config: Any, folder: Path, memory: int, *, on_gpu: bool) -> Fit:
    """Estimate the fit of the model in `folder` in `memory` bytes per GPU.

    The overhead is an estimate, see `_overhead`. A sliding window counts as full attention. Of a
    model that also reads images, only the KV cache of the text model counts. Raises WeightsError
    if there are neither weights nor an index, or the model keeps more than a KV cache.
    """
    cache = vllm_config.cache_config
    demand = _demand(vllm_config, folder, on_gpu=on_gpu)
    return Fit(demand, memory, cache.gpu_memory_utilization, cache.kv_cache_memory_bytes)


def _demand(vllm_config: Any, folder: Path, *, on_gpu: bool) -> Demand:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.is_hybrid or model.is_attention_free:
        raise WeightsError(
            f"the memory of {model.architecture} is not estimated: it keeps more than a KV cache"
        )
    cache = vllm_config.cache_config
    # The CPU's block size differs from a GPU's, which is known only on a GPU.
    chosen = cache.user_specified_block_size or not on_gpu
    block_tokens = cache.block_size if chosen else cache.DEFAULT_BLOCK_SIZE
    # With MLA vLLM caches one latent vector per token instead of a key and a value.
    vectors = (1 if model.use_mla else 2) * sum(_kv_heads(vllm_config))
    item = model.dtype.itemsize
    if cache.cache_dtype != "auto":
        item = 2 if cache.cache_dtype in ("float16", "bfloat16") else 1
    return Demand(
        weights=-(-_weights(model, folder) // parallel.world_size),
        overhead=_overhead(vllm_config, on_gpu=on_gpu),
        block=block_tokens * vectors * model.get_head_size() * item,
        block_tokens=block_tokens,
        max_model_len=model.max_model_len,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        gpus=parallel.world_size,
        on_gpu=on_gpu,
        adapters=_adapters(vllm_config, folder),
        max_loras=vllm_config.lora_config.max_loras if vllm_config.lora_config else 0,
    )


def _adapters(vllm_config: Any, folder: Path) -> int:
    """Return the bytes of vLLM's slots for adapters on one GPU.

    There are max_loras of them, each of max_lora_rank for every matrix that an adapter may change,
    whatever the adapters change. Where a matrix has the model's hidden size on one side, tensor
    parallelism divides the other. Raises WeightsError without the weights.
    """
    lora, model = vllm_config.lora_config, vllm_config.model_config
    if lora is None:
        return 0
    parallel, hidden = vllm_config.parallel_config, model.get_hidden_size()
    sides = 0
    for rows, columns in _matrices(folder, model.hf_config):
        other = rows + columns - hidden
        parts = parallel.tensor_parallel_size if hidden in (rows, columns) else 1
        sides += hidden + other // parts
    if not sides:
        raise WeightsError(f"the memory of adapters is read from the weights; {folder} has none")
    limits = vllm_arguments.adapter_limits(folder)
    tables = len(limits.tables) if limits else 0
    sides = sides // parallel.pipeline_parallel_size + tables * (model.get_vocab_size() + hidden)
    size: int = lora.max_loras * lora.max_lora_rank * lora.lora_dtype.itemsize * sides
    return size


def _matrices(folder: Path, hf_config: Any) -> Iterator[tuple[int, ...]]:
    """Yield the sizes of all matrices inside of layers."""
    quantization = getattr(hf_config, "quantization_config", None) or {}
    for name, tensor in base_tensors(folder).items():
        module, _, kind = name.rpartition(".")
        if len(tensor.shape) != 2 or not re.search(r"\.\d+\.", module):
            continue
        if kind == "weight":
            yield tensor.shape
        elif kind == "qweight":  # its integers hold several values: in GPTQ of a column
            bits = quantization.get("bits", 4)
            values = 32 // (bits if bits in (2, 3, 4, 8) else 4)
            rows, columns = tensor.shape
            by_column = quantization.get("quant_method") != "awq"
            yield (rows * values, columns) if by_column else (rows, columns * values)


def _kv_heads(vllm_config: Any) -> list[int]:
    """Return the KV heads of each layer on one GPU."""
    from service.models.openelm import OpenELMConfig, kv_repeats

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = range(*model.get_layers_start_end_indices(parallel))
    config = model.hf_text_config
    if not isinstance(config, OpenELMConfig):
        return [model.get_num_kv_heads(parallel) for _ in layers]
    tp_size = parallel.tensor_parallel_size
    return [config.kv_heads[i] * kv_repeats(config, i, tp_size) // tp_size for i in layers]


def _overhead(vllm_config: Any, *, on_gpu: bool) -> int:
    """Estimate the bytes beside weights and KV cache, which vLLM measures at start.

    The sum of the largest tensors of a step and the constants above. The largest tensors are those
    of a feed-forward layer over max_num_batched_tokens, or those of sampling for max_num_seqs
    requests. Not measured on a GPU.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    hidden = model.get_hidden_size()
    ffn = getattr(model.hf_text_config, "intermediate_size", None) or 4 * hidden
    ffn //= vllm_config.parallel_config.tensor_parallel_size
    # The residual and its norm; gate, up and their product.
    layer = scheduler.max_num_batched_tokens * (2 * hidden + 3 * ffn) * model.dtype.itemsize
    logits = scheduler.max_num_seqs * model.get_vocab_size()
    if not on_gpu:
        return _CPU_PROCESS + int(max(layer, logits * _CPU_SAMPLER_BYTES))
    graphs = 0 if model.enforce_eager else _CUDA_GRAPHS
    return _CUDA_LIBRARIES + graphs + int(max(layer, logits * _SAMPLER_BYTES))


def _weights(model: Any, folder: Path) -> int:
    """Return the bytes of all weights in the type they are served in; in 8 bits without scales.

    A tied model whose files also have an output head keeps both if they differ, so both count.
    """
    from service.models import cpu_int8

    stored, elements = _stored(folder, model.hf_config)
    if getattr(model.hf_config, "quantization_config", None):
        return stored
    unchanged, quantised = elements, 0
    table = model.get_vocab_size() * model.get_hidden_size()
    tied = getattr(model.hf_text_config, "tie_word_embeddings", False)
    if model.quantization == cpu_int8.NAME:  # a tied output layer is a copy, but for Gemma 2's
        unchanged = table + sum(
            tensor.floats
            for name, tensor in base_tensors(folder).items()
            if ".experts." in name or name.endswith(".kv_b_proj.weight")
        )
        quantised = elements - unchanged + (table if tied else 0)
    elif model.quantization and "8" in model.quantization:  # except embeddings and output layer
        unchanged = table if tied else 2 * table
        quantised = elements - unchanged
    size: int = unchanged * model.dtype.itemsize + quantised
    return size


def _stored(folder: Path, hf_config: Any) -> tuple[int, int]:
    """Return the bytes of a checkpoint's tensors and the number of their float elements.

    Reads the headers of the weight files; without the files, the index and config.json. Raises
    WeightsError if there is neither.
    """
    for pattern in ("*.safetensors", "*.bin"):
        index = tensor_files.index(folder, pattern)
        files = tensor_files.weight_files(folder, pattern)
        if files and len(files) >= len(set(index.get("weight_map", {}).values())):
            tensors = [tensor for file in files for tensor in tensor_files.read(file).values()]
            return sum(t.bytes for t in tensors), sum(t.floats for t in tensors)
        if total := int(index.get("metadata", {}).get("total_size", 0)):
            return total, total // getattr(hf_config.dtype, "itemsize", 2)
    raise WeightsError(f"{folder} has neither weights nor their index, so no fit can be computed")
