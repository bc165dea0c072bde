"""Turns vLLM's errors at start into one sentence that names the setting to change.

vLLM 0.32 logs the cause in the process that failed, where `log_config.ToSupervisor` finds it. Its
texts often advise flags of its command line, which our users do not have.
"""

import re

_LESS_MEMORY = (
    "lower engine.max_model_len or engine.max_num_seqs, choose a smaller or quantised model, or "
    "stop what else uses the memory"
)
_OTHER_FILES = (
    "config.json and the weights are not of one model, or a file is damaged; fetch both again"
)
# (pattern of vLLM's text, our text).
_ADVICE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), advice)
    for pattern, advice in (
        (
            r"To serve at least one request with the model's max seq len \((\d+)\), \(?([\d.]+) GiB"
            r".*?available KV cache memory \(([\d.]+) GiB\).*?maximum model length is (\d+)",
            r"a context of \1 tokens needs \2 GiB of KV cache and there are \3 GiB: lower "
            r"engine.max_model_len to \4 or less, or raise engine.kv_cache_memory_bytes (on a GPU: "
            r"engine.gpu_memory_utilization)",
        ),
        (
            r"To serve at least one request with the model's max seq len \((\d+)\)",
            r"the KV cache has no room for one request of \1 tokens: lower engine.max_model_len, "
            r"or raise engine.kv_cache_memory_bytes (on a GPU: engine.gpu_memory_utilization)",
        ),
        (
            r"No available memory for the cache blocks",
            r"the weights leave no memory for the KV cache: raise engine.kv_cache_memory_bytes (on "
            r"a GPU: engine.gpu_memory_utilization), or choose a smaller or quantised model",
        ),
        (
            r"on kv cache allocation is less than requested memory for kv \(([\d.]+) GiB\)",
            r"\1 GiB for the KV cache are not free: lower engine.kv_cache_memory_bytes, or stop "
            r"what else uses the memory",
        ),
        (
            r"on kv cache allocation is less than requested memory",
            r"engine.gpu_memory_utilization leaves nothing for the KV cache: raise it, or set "
            r"engine.kv_cache_memory_bytes",
        ),
        (
            r"\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired .*?"
            r"\(([\d.]+), ([\d.]+) GiB",
            r"\4 GiB of \2 are wanted and \1 are free: set engine.kv_cache_memory_bytes, such as "
            r"2G, lower engine.gpu_memory_utilization (now \3), or stop what else uses the memory",
        ),
        (r"OutOfMemoryError|CUDA out of memory", rf"the GPU is out of memory: {_LESS_MEMORY}"),
        (
            r"can't allocate memory: you tried to allocate (\d+) bytes",
            rf"the machine is out of memory, at an allocation of \1 bytes: {_LESS_MEMORY}",
        ),
        (
            r"max_model_len \((\d+)\) is greater than the derived max_model_len \(\S+?=(\d+)",
            r"engine.max_model_len is \1 and the model was made for \2: lower it to \2 or less",
        ),
        (
            r"Model architectures (\[.*?\]) are not supported",
            r"vLLM has no model for the architecture \1 of config.json: choose another model, or "
            r"add one in service/models/",
        ),
        (
            r"has model type `(.+?)` but Transformers does not recognize",
            r"neither vLLM nor transformers knows the model type '\1' of config.json: choose "
            r"another model, or add one in service/models/",
        ),
        (
            r"Should have a `model_type` key",
            r"config.json names no model_type: fetch it again from the model's publisher",
        ),
        (
            r"Cannot find any model weights",
            r"the model's folder holds no weights (*.safetensors, *.bin): fetch them, or correct "
            r"source.path",
        ),
        (
            r"Weight files referenced in index but missing: \{(.+?)\}",
            r"the index of the weights names files that are not there: \1; fetch them",
        ),
        (
            r"Error while deserializing header|PytorchStreamReader|UnpicklingError",
            r"a file of weights is damaged or cut short: fetch the model again",
        ),
        (
            r"weights were not initialized from checkpoint: \{(.+?)\}",
            r"the checkpoint lacks weights that config.json asks for (\1): fetch the model again",
        ),
        (
            r"exceeds dimension size|Attempted to load weight|must match the size of tensor"
            r"|^AssertionError: ?$|There is no module or parameter named",
            _OTHER_FILES,
        ),
        (
            r"data did not match any variant of untagged enum",
            "tokenizer.json is damaged, or newer than this version of tokenizers reads: copy the "
            "tokenizer's files from the model that it was trained from",
        ),
        (
            r"custom code which must be executed|Failed to load the tokenizer",
            "the model's tokenizer is code of its publisher, which is never run here: serve the "
            "folder as its entry of `chat-service models`, with `chat-service serve NAME --set "
            "'source={path: FOLDER}'`",
        ),
        (
            r"Unknown quantization method: (\w+)",
            r"config.json says that \1 has quantised the weights, which vLLM cannot read here: "
            r"take the 16-bit model (an adapter is merged into that one too)",
        ),
        (
            r"^JSONDecodeError",
            "a JSON file of the model or its tokenizer is damaged: fetch it again",
        ),
        (
            r"must be divisible by tensor parallel size \((\d+)\)",
            r"the model's heads cannot be shared out over \1 GPUs: change "
            r"engine.tensor_parallel_size",
        ),
        (
            r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
            r"\1 GPUs are wanted and there are \2: lower engine.tensor_parallel_size or "
            r"engine.pipeline_parallel_size",
        ),
        (
            r"Not enough allowed NUMA nodes to bind threads",
            "this processor has fewer memory nodes than engine.tensor_parallel_size: lower it, or "
            "set VLLM_CPU_OMP_THREADS_BIND=nobind in the environment",
        ),
        (
            r"No common block size for (\d+) \((.*?)\)",
            r"engine.block_size \1 does not suit this machine (\2): leave it out",
        ),
        (
            r"Bfloat16 is only supported on GPUs",
            r"this GPU has no bfloat16: set engine.dtype to float16",
        ),
        (
            r"EngineCore died|initialization failed|EOFError",
            r"the engine's process ended without a word; when the system killed it for lack of "
            rf"memory, {_LESS_MEMORY}",
        ),
    )
)
# One process's report of the failure of another, whose own error is the cause.
_SECOND_HAND = re.compile(r"WorkerProc initialization failed due to|Worker failed with error")


def is_root(error: BaseException) -> bool:
    """Whether an exception is a cause, not a report of another process's failure."""
    return not _SECOND_HAND.search(str(error))


def sentence(error: BaseException) -> str:
    """Return an exception as one line: class and text, or for pydantic's the key and text."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        first = errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        text = (f"{key}: " if key else "") + str(first["msg"]).removeprefix("Value error, ")
        return " ".join(text.split())
    return " ".join(f"{type(error).__name__}: {error}".split())


def explain(cause: str) -> str:
    """Return our text for a cause, or the cause itself if no pattern matches."""
    for pattern, advice in _ADVICE:
        if match := pattern.search(cause):
            return match.expand(advice)
    return cause if len(cause) <= 500 else cause[:500] + " ..."
