"""Will a model fit? Weights and KV cache in bytes, from config.json and the weight files' headers.

Blocks, tokens and concurrency are counted as vLLM counts them (vllm/v1/core/kv_cache_utils.py);
what only a run can measure is estimated, on a GPU from public logs. Nothing is loaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import WeightsError
from service.weights import tensor_files

GIB = 2**30

# Bytes for each pair of request and vocabulary entry while vLLM's profiling run samples: float32
# logits, their sort with int64 indices, probabilities and their sum. Public logs of older vLLM
# (0.6 and 0.7) at its 256 requests say "activation peak memory takes 1.19GiB" for a vocabulary of
# 128,256 and 1.42 for one of 152,064: 39 bytes in both.
_SAMPLER_BYTES = 40
# The largest of the public logs for models up to 8B (Qwen2.5-7B on vLLM 0.8: "Graph capturing ...
# took 1.44 GiB"; others 0.1 to 0.7), and what the CUDA libraries take on one GPU in most of them
# ("non_torch_memory takes 0.05GiB" to 0.12; one, from before that was measured so, says 1.79).
_CUDA_GRAPHS = int(1.44 * GIB)
_CUDA_LIBRARIES = int(0.12 * GIB)
# On the CPU vLLM counts its whole process, and samples without a sort. Measured with vLLM 0.32, in
# GiB: 0.55 for a model of 0.3 MB; 1.02, and 1.15 compiled, for one with 0.25 of weights and 256
# requests over a vocabulary of 49,152.
_CPU_PROCESS = int(0.62 * GIB)
_CPU_SAMPLER_BYTES = 16


@dataclass(frozen=True)
class Demand:
    """What a model asks of each GPU, in bytes, and its limits."""

    weights: int
    overhead: int
    block: int  # of KV cache, over all layers
    block_tokens: int
    max_model_len: int  # tokens of one request at most, prompt and answer
    max_num_seqs: int  # requests at once at most
    gpus: int
    on_gpu: bool = True


@dataclass(frozen=True)
class Fit:
    """A model in the memory of its GPUs, in bytes of each."""

    demand: Demand
    memory: int
    utilization: float  # the share of it that vLLM takes
    given: int | None  # engine.kv_cache_memory_bytes, which replaces that share

    @property
    def kv_cache(self) -> int:
        if self.given is not None:
            return self.given
        demand = self.demand
        return int(self.memory * self.utilization) - demand.weights - demand.overhead

    @property
    def blocks(self) -> int:
        return max(0, self.kv_cache) // self.demand.block

    @property
    def tokens(self) -> int:
        """vLLM's "KV cache size"."""
        return int(self.concurrency(self.demand.max_model_len) * self.demand.max_model_len)

    def concurrency(self, context: int) -> float:
        """Requests of `context` tokens at once: vLLM's "Maximum concurrency"."""
        return self.blocks / self._blocks_of(context)

    @property
    def largest_context(self) -> int:
        """Tokens that one request may have, alone."""
        return min(self.demand.max_model_len, self.blocks * self.demand.block_tokens)

    def lines(self) -> list[str]:
        """For a person."""
        demand = self.demand
        memory = f"{self.memory / GIB:.1f} GiB"
        if demand.gpus > 1:
            memory = f"each of {demand.gpus} with {memory}"
        if self.given is None:
            memory += f" x {self.utilization:g} = {self.memory * self.utilization / GIB:.1f} GiB"
        key = "" if self.given is None else " (engine.kv_cache_memory_bytes)"
        head = (
            f"memory: {memory}: weights {demand.weights / GIB:.1f}, overhead about "
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
        """Why so many requests of so many tokens do not fit, and what to do; none when they do.

        vLLM does not start unless one request of engine.max_model_len tokens fits.
        """
        demand = self.demand
        smaller = "a larger engine.tensor_parallel_size"
        if demand.on_gpu:
            smaller = f"engine.quantization=fp8, or {smaller}"
        used = demand.weights + demand.overhead + (self.given or 0)
        limit = self.memory if self.given is not None else int(self.memory * self.utilization)
        if used > limit or not self.blocks:
            lower = "a lower engine.kv_cache_memory_bytes, " if self.given is not None else ""
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
        # What was asked for, and what vLLM asks for.
        for requests, tokens in (concurrent, min(context, full)), (1, full):
            if self.concurrency(tokens) < requests:
                missing = (requests * self._blocks_of(tokens) - self.blocks) * demand.block
                shorter = self.blocks // requests * demand.block_tokens
                remedy = f"engine.max_model_len={shorter}, " if shorter else ""
                remedy += "engine.kv_cache_dtype=fp8, " if demand.on_gpu else ""
                if self.given is not None:
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
    """The model in `folder`, served with vLLM's whole configuration, in `memory` bytes a GPU.

    The overhead is an estimate, see `_overhead`. A sliding window is counted as full attention,
    and of a model that also reads images only what answers. Raises WeightsError when there is
    nothing to count.
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
    # The CPU's blocks are larger than a GPU's, whose size is known only there.
    chosen = cache.user_specified_block_size or not on_gpu
    block_tokens = cache.block_size if chosen else cache.DEFAULT_BLOCK_SIZE
    # vLLM keeps a latent vector for each token instead of keys and values where there is MLA.
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
    )


def _kv_heads(vllm_config: Any) -> list[int]:
    """KV heads of each layer on one GPU."""
    from service.models.openelm import OpenELMConfig, kv_repeats

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = range(*model.get_layers_start_end_indices(parallel))
    config = model.hf_text_config
    if not isinstance(config, OpenELMConfig):
        return [model.get_num_kv_heads(parallel) for _ in layers]
    tp_size = parallel.tensor_parallel_size
    return [config.kv_heads[i] * kv_repeats(config, i, tp_size) // tp_size for i in layers]


def _overhead(vllm_config: Any, *, on_gpu: bool) -> int:
    """Bytes beside weights and KV cache: vLLM measures them at start, here they are estimated.

    The largest tensors of a step, which are those of a feed-forward layer over
    max_num_batched_tokens or those of sampling for max_num_seqs requests, whichever are larger;
    and what `_CUDA_GRAPHS`, `_CUDA_LIBRARIES` and `_CPU_PROCESS` stand for. No GPU was at hand.
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
    """Bytes of all weights in the type they are served in.

    A tied model whose files have an output head too keeps both when they differ, so both count.
    """
    stored, elements = _stored(folder, model.hf_config)
    if getattr(model.hf_config, "quantization_config", None):
        return stored
    size: int = elements * model.dtype.itemsize
    if model.quantization and "8" in model.quantization:  # while loading; embeddings stay as is
        tables = 1 if getattr(model.hf_text_config, "tie_word_embeddings", False) else 2
        unchanged = tables * model.get_vocab_size() * model.get_hidden_size()
        size = unchanged * model.dtype.itemsize + (elements - unchanged)
    return size


def _stored(folder: Path, hf_config: Any) -> tuple[int, int]:
    """Bytes of a checkpoint's tensors, and how many numbers the float ones have.

    From the headers of the weight files, or without them from the index and config.json. Raises
    WeightsError when there is neither.
    """
    for pattern in ("*.safetensors", "*.bin"):
        index = tensor_files.index(folder, pattern)
        files = tensor_files.weight_files(folder, pattern)
        if files and len(files) >= len(set(index.get("weight_map", {}).values())):
            tensors = [tensor for file in files for tensor in tensor_files.read(file).values()]
            return sum(t.bytes for t in tensors), sum(t.floats for t in tensors)
        if index:
            total = int(index["metadata"]["total_size"])
            return total, total // getattr(hf_config.dtype, "itemsize", 2)
    raise WeightsError(f"{folder} has neither weights nor their index, so no fit can be computed")
