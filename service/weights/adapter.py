"""Reads a LoRA adapter's files and says what does not fit its base, before anything is loaded.

vLLM finds most of it only when it has loaded the base, and silently ignores matrices of unknown
modules. A module is a tensor of the base's files: PEFT names both alike, whatever the architecture.
"""

import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import WeightsError
from service.model_config.loader import cached_name
from service.weights import tensor_files
from service.weights.tensor_files import Tensor, read_config, read_object, visible, weight_files

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in the order of vLLM
# vLLM's values of max_lora_rank (vllm.config.lora.MaxLoRARanks).
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MERGE = "merge it into its base, and serve the folder which that gives"

_REQUIRED = ("r", "lora_alpha", "target_modules")
# Key of adapter_config.json -> what it means. vLLM takes none of these.
_UNSUPPORTED = {
    "use_dora": "it was trained with DoRA",
    "modules_to_save": "it holds whole matrices beside LoRA's (modules_to_save)",
    "trainable_token_indices": "it has new embeddings of tokens (trainable_token_indices)",
    "lora_bias": "it has biases (lora_bias)",
    "layer_replication": "it repeats layers of its base (layer_replication)",
    "alora_invocation_tokens": "it is an activated LoRA (alora_invocation_tokens)",
    "use_qalora": "it was trained with QALoRA",
    "use_bdlora": "it was trained with BD-LoRA",
}
# Values of init_lora_weights that change the base too.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")
_LAYER = re.compile(r".*?\.(?=\d+\.)")  # what comes before the number of a layer
_HEADS = ("lm_head", "output_layer", "output")
_QUANTISED = re.compile(
    r"[-_.](?:unsloth[-_]|quantized[-_.])?"
    r"(?:bnb[-_]?[48]bit|[48]bit|gptq.*|awq.*|int[48].*|fp8.*|w[48]a(?:8|16).*)$"
)
_FLOATS = re.compile(r"[-_.](?:fp32|fp16|bf16)$")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, as far as its files tell. A problem keeps it from being served."""

    name: str
    folder: Path
    rank: int = 0  # the largest of its matrices
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """What vLLM lets an adapter change here."""

    tables: Collection[str]  # of embed_tokens and lm_head
    absorbed: Collection[str] = ()  # matrices that it folds into others when it loads them
    experts: bool = True  # a model that has some


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model beside it."""
    if not (folder / CONFIG).is_file():
        return False
    others = {
        file.name for pattern in ("*.safetensors", "*.bin") for file in visible(folder, pattern)
    }
    others -= {*_WEIGHTS, "training_args.bin", "optimizer.bin", "scheduler.bin"}
    return not (others and (folder / "config.json").is_file())


def weights_in(folder: Path) -> Path | None:
    """Return the file with an adapter's weights that vLLM would load."""
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def base_of(folder: Path) -> str:
    """Return the base that an adapter was trained on, in the words of its adapter_config.json.

    Raises WeightsError.
    """
    return str(read_object(folder / CONFIG).get("base_model_name_or_path") or "")


def name_in(text: str) -> str:
    """Return the model's own name in a hub's id or a path, in lower case.

    It is without the type of the weights. Caches write Qwen2.5 as Qwen2___5.
    """
    text = text.lower().replace("___", ".").rstrip("/\\")
    name = cached_name(text) or re.split(r"[/\\]", text)[-1]
    return _FLOATS.sub("", _QUANTISED.sub("", name))


def base_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a base by name; none if it has no weights that can be listed."""
    try:
        files = weight_files(folder, "*.safetensors") or weight_files(folder, "*.bin")
        return {name: tensor for file in files for name, tensor in tensor_files.read(file).items()}
    except WeightsError:  # `checkpoint.check` or vLLM reports it
        return {}


def inspect(
    name: str,
    folder: Path,
    *,
    base: Path | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    known_as: Collection[str] = (),
    limits: Limits | None = None,
    max_rank: int | None = None,
) -> Adapter:
    """Say what is wrong with the adapter in `folder`.

    `base` is the folder of the model that it shall change, `tensors` its `base_tensors`, `known_as`
    its names, `limits` vLLM's for it, and `max_rank` the limit that the user has set. Without them
    less is checked.
    """
    try:
        config = _read_config(folder)
        weights = _read_weights(folder)
    except WeightsError as e:
        return Adapter(name, folder, problems=[f"adapter {name}: {e}"])
    matrices = {tensor: m for tensor in weights if (m := _LORA.fullmatch(tensor))}
    rank = max((_rank(weights[t], m) for t, m in matrices.items()), default=0)
    if matrices:  # vLLM compares both with its limit
        rank = max(rank, *_declared_ranks(config))
    found = [*_of_config(config), *_of_names(weights, matrices)]
    if not found:
        found += _of_rank(rank, max_rank)
    warnings: list[str] = []
    if base is not None:
        if problem := _of_base(base):
            found.append(problem)
        elif tensors and not found:
            problems, unsure = _of_modules(weights, matrices, tensors)
            if limits:
                problems = problems or _of_limits(matrices, tensors, limits)
            found += problems
            warnings += unsure
        found = found or _of_values(folder)
    warnings += _of_name(str(config.get("base_model_name_or_path") or ""), known_as)
    return Adapter(
        name,
        folder,
        rank,
        [f"adapter {name}: {text}" for text in found],
        [f"adapter {name}: {text}" for text in warnings],
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; correct its path")
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder} has no {CONFIG}; {_advice(folder)}")
    return read_object(folder / CONFIG)


def _advice(folder: Path) -> str:
    """Say what to do with a folder that is no adapter."""
    if (folder / "config.json").is_file():
        path = shlex.quote(str(folder))
        return f"it is a whole model: serve it itself, with `chat-service serve {path}`"
    if weights_in(folder):
        return "copy it too from where the adapter was trained"
    if inner := sorted(folder.glob(f"*/{CONFIG}"), key=lambda file: file.stat().st_mtime):
        return f"give the folder inside it, such as {inner[-1].parent.name}"
    return "give the folder that save_pretrained, or your training, wrote"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if file := weights_in(folder):
        return tensor_files.read(file)
    raise WeightsError(
        f"{folder} has no {' or '.join(_WEIGHTS)}; copy it from where the adapter was trained"
    )


def _of_config(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        kind = str(kind)[:40]
        return [f"it is of the kind {kind}, and vLLM takes LoRA alone; train it as LoRA"]
    if config.get("target_modules") is None and config.get("target_parameters"):
        return [f"it changes experts as parameters (target_parameters); {_MERGE}"]
    if missing := [key for key in _REQUIRED if config.get(key) is None]:
        return [f"its {CONFIG} has no {' and no '.join(missing)}; copy it again"]
    for key in ("r", "lora_alpha"):
        value = config[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            return [f"its {CONFIG} has no valid {key}; copy it again"]
    found = [f"{text}; {_MERGE}" for key, text in _UNSUPPORTED.items() if config.get(key)]
    if (bias := config.get("bias", "none")) != "none":
        found.append(f"it has biases (bias: {str(bias)[:40]}); {_MERGE}")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        found.append(
            f"it began by changing its base (init_lora_weights: {start[:40]}); convert it to plain "
            "LoRA with peft's path_initial_model_for_weight_conversion"
        )
    return found


def _of_names(weights: Mapping[str, Tensor], matrices: Collection[str]) -> list[str]:
    """vLLM refuses non-LoRA tensors, except embedding copies, which it ignores."""
    others = sorted(name for name in set(weights) - set(matrices) if not _is_copy(name))
    if others:
        what = others[0].removeprefix(_PREFIX)
        return [f"it holds whole tensors beside LoRA's, such as {what}; {_MERGE}"]
    if not matrices:
        return ["its weights are empty; save it again where it was trained"]
    if empty := [name for name in sorted(matrices) if 0 in weights[name].shape]:
        return [
            f"{empty[0].removeprefix(_PREFIX)} is empty, as DeepSpeed ZeRO-3 leaves it; gather the "
            "weights when you save it (zero_to_fp32.py)"
        ]
    return []


def _is_copy(name: str) -> bool:
    """Whether a tensor is the base's embedding, which PEFT saves beside the LoRA of one."""
    return name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))


def _of_rank(rank: int, max_rank: int | None) -> list[str]:
    if rank > RANKS[-1]:
        return [f"its rank is {rank}, and vLLM takes {RANKS[-1]} at most; {_MERGE}"]
    if max_rank is not None and rank > max_rank:
        return [f"its rank is {rank}, above engine.max_lora_rank {max_rank}; leave that out"]
    return []


def _rank(tensor: Tensor, match: re.Match[str]) -> int:
    """A is [rank, in] and B is [out, rank]."""
    if len(tensor.shape) != 2:
        return 0
    return tensor.shape[0] if "A" in match.groups() else tensor.shape[1]


def _declared_ranks(config: Mapping[str, Any]) -> list[int]:
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return [0, *(rank for rank in ranks if isinstance(rank, int))]


def _of_values(folder: Path) -> list[str]:
    """A value that is no number makes others of it: of all sequences that use its cache later."""
    import torch
    from safetensors.torch import load_file

    file = weights_in(folder)
    assert file is not None
    if file.suffix == ".safetensors":
        values = load_file(file)
    else:
        values = torch.load(file, map_location="cpu", weights_only=True)
    for name, tensor in values.items():
        if not tensor.float().isfinite().all():
            return [
                f"{name.removeprefix(_PREFIX)} has values that are no numbers (NaN or infinite), "
                "so its training has diverged; take an earlier checkpoint"
            ]
    return []


def _of_base(base: Path) -> str | None:
    quantization = read_config(base).get("quantization_config") or {}
    if quantization.get("quant_method") == "bitsandbytes" or quantization.get("load_in_4bit"):
        return (
            "its base is stored in 4 bits by bitsandbytes, which takes no adapter here; serve it "
            "on the 16-bit model that those were made from"
        )
    return None


def _of_modules(
    weights: Mapping[str, Tensor], matrices: Mapping[str, re.Match[str]], base: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """Compare the adapter's modules with the base's: problems and warnings."""
    modules = {name.rpartition(".")[0]: tensor for name, tensor in base.items()}
    kinds = {_last(module) for module in modules}
    tails = {_LAYER.sub("", module) for module in modules}
    has_experts = any(".experts." in module for module in modules)
    unknown: set[str] = set()
    elsewhere: list[str] = []
    for name, match in matrices.items():
        module = match[1].removeprefix(_PREFIX)
        if has_experts and ".experts" in module:  # fused in memory by some versions of transformers
            continue
        if _last(module) not in kinds:
            unknown.add(_last(module))
        elif module in modules:
            if problem := _of_shape(module, weights[name], match, base):
                return [problem], []
        elif _LAYER.sub("", module) not in tails:
            return [f"its base has no {module}; it was trained on another model"], []
        else:
            elsewhere.append(module)
    if unknown:
        has = ", ".join(_linear(base))
        told = ", ".join(sorted(unknown))
        return [
            f"this architecture has no {told}, which it changes (target_modules); choose the base "
            f"that it was trained on, or train again with some of: {has}"
        ], []
    if elsewhere:
        other = next(m for m in modules if _LAYER.sub("", m) == _LAYER.sub("", elsewhere[0]))
        return [], [
            f"it names a matrix {elsewhere[0]}, and the base's is {other}: vLLM may leave it out; "
            "compare an answer with the base's"
        ]
    return [], []


def _of_limits(
    matrices: Mapping[str, re.Match[str]], base: Collection[str], limits: Limits
) -> list[str]:
    if not limits.experts and any(".experts." in name for name in base):
        return [f"on a CPU vLLM takes no adapter for a model with experts; {_MERGE}"]
    for match in matrices.values():
        module = match[1].removeprefix(_PREFIX)
        if _last(module) in limits.absorbed:
            return [
                f"it changes {_last(module)}, which vLLM folds into other matrices, without the "
                f"change; {_MERGE}, or set VLLM_MLA_DISABLE=1 in the environment"
            ]
        table = "embed_tokens" if match[3] else "lm_head" if _last(module) in _HEADS else None
        if table and not _LAYER.match(module) and table not in limits.tables:
            return [
                f"it changes {_last(module)}, which no adapter can change in this architecture "
                f"here; {_MERGE}"
            ]
    return []


def _of_shape(
    module: str, tensor: Tensor, match: re.Match[str], base: Mapping[str, Tensor]
) -> str | None:
    """A LoRA matrix has one side of the base's; a quantised base has other shapes."""
    matrix = base.get(f"{module}.weight")
    if matrix is None or len(matrix.shape) != 2 or len(tensor.shape) != 2 or not matrix.floats:
        return None
    if match[3]:  # of an embedding, [vocabulary, size]: A is [rank, vocabulary], B [size, rank]
        out, into = matrix.shape[1], matrix.shape[0]
    else:
        out, into = matrix.shape
    side, wanted = (tensor.shape[1], into) if "A" in match.groups() else (tensor.shape[0], out)
    if side == wanted:
        return None
    return (
        f"its {module} was trained for a side of {side}, and the base's has {wanted}: the base is "
        "another model; choose the one that it was trained on"
    )


def _of_name(trained_on: str, known_as: Collection[str]) -> list[str]:
    if not trained_on or not known_as:
        return []
    shown = " ".join(trained_on.split())[:200]
    if name_in(trained_on) not in map(name_in, known_as):
        return [f"it was trained on {shown}; see that this is the model it is served on"]
    last = re.split(r"[/\\]", trained_on.rstrip("/\\"))[-1].lower()
    if _QUANTISED.search(last) and not any(_QUANTISED.search(name.lower()) for name in known_as):
        return [
            f"it was trained on a quantised base ({shown}); on the 16-bit one its answers differ a "
            "little from those in training"
        ]
    return []


def _linear(base: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the base's matrices inside of layers."""
    matrices = (name for name, tensor in base.items() if len(tensor.shape) == 2)
    return sorted({_last(n.rpartition(".")[0]) for n in matrices if re.search(r"\.\d+\.", n)})


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def largest_rank(adapters: Iterable[Adapter]) -> int:
    """Return vLLM's smallest max_lora_rank that takes these adapters."""
    rank = max(adapter.rank for adapter in adapters)
    return next(allowed for allowed in RANKS if allowed >= rank)
