"""Checks that a checkpoint is complete, from the names and headers of its files.

vLLM 0.32 serves garbage from one that lacks matrices or its head: its check
(`DefaultModelLoader.track_weights_loading`) skips unquantised linear layers and embeddings.
"""

import re
from collections import defaultdict
from glob import escape
from pathlib import Path
from typing import Any

from service.errors import WeightsError
from service.weights import adapter, tensor_files
from service.weights.tensor_files import REMEDY, read_config, read_json, visible, weight_files

# Architectures with a separate head unless config.json sets tie_word_embeddings.
_UNTIED = frozenset(
    {
        "BaichuanForCausalLM",
        "BlueLMForCausalLM",
        "ChatGLMForConditionalGeneration",
        "ChatGLMModel",
        "DeepseekForCausalLM",
        "IndexForCausalLM",
        "InternLM2ForCausalLM",
        "InternLM3ForCausalLM",
        "InternLMForCausalLM",
        "QWenLMHeadModel",
        "XverseForCausalLM",
    }
)
# Architectures whose layers all have the same tensors, but for dense layers before those with
# experts.
_UNIFORM = _UNTIED | {
    "LlamaForCausalLM",
    "MiniCPMForCausalLM",
    "MistralForCausalLM",
    "OpenELMForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
}
_EMBEDDING = re.compile(r"embed|\.wte\.")
_HEAD = re.compile(r"lm_head|^output\.|\.output_layer\.")
_LAYER = re.compile(r"\.(\d+)\.")
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json", "*.gguf")
# JSON that vLLM or transformers reads, beside the indexes of weights.
_JSON = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
# What a Trainer leaves of its own.
_STATES = {"optimizer.pt", "scheduler.pt", "scaler.pt"}


def check(folder: Path) -> None:
    """Raise WeightsError if a file is damaged, cut short or missing, as far as can be checked."""
    if escape(str(folder)) != str(folder):
        raise WeightsError(
            f"{folder}: vLLM looks for weights by a pattern, in which [, ? and * of a path mean "
            "something else; rename the folder"
        )
    _check_json(folder)
    files = weight_files(folder, "*.safetensors")
    names = {name for file in files for name in tensor_files.read(file)}
    if not files:
        files = weight_files(folder, "*.bin")
        for file in files:
            tensor_files.check_pickled(file)
    if not files and not {file.name for file in visible(folder, "*.pt")} - _STATES:
        raise WeightsError(
            f"{folder} holds no weights (*.safetensors, *.bin, *.pt); {_where_they_are(folder)}"
        )
    if (beside := adapter.weights_in(folder)) in files:
        raise WeightsError(
            f"{folder} holds a model and an adapter ({beside.name}); move the adapter's files to a "
            "folder of their own, and give that with --adapter"
        )
    config = read_config(folder)
    architecture = (config.get("architectures") or [""])[0]
    if not files or architecture not in _UNIFORM or config.get("quantization_config"):
        return
    try:
        names = names or {name for file in files for name in tensor_files.read(file)}
    except WeightsError:  # an old or broken PyTorch file: vLLM reports it
        return
    _check_layers(names, config)
    tied = config.get("tie_word_embeddings", architecture not in _UNTIED)
    if not any(_EMBEDDING.search(name) for name in names):
        raise WeightsError(f"{folder} has no weights of the token embedding; {REMEDY}")
    if not tied and not any(_HEAD.search(name) for name in names):
        raise WeightsError(f"{folder} has no weights of the output head (lm_head); {REMEDY}")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any(file for pattern in _TOKENIZERS for file in visible(folder, pattern))


def check_tokenizer(folder: Path) -> None:
    """Raise WeightsError if a folder has no tokenizer: transformers makes an empty one then."""
    if not has_tokenizer(folder):
        raise WeightsError(
            f"{folder} has no tokenizer; copy the tokenizer's files from the model that it was "
            "trained from"
        )


def _where_they_are(folder: Path) -> str:
    """Say where the weights of a folder without any may be."""
    if (folder / "zero_to_fp32.py").is_file():
        return "DeepSpeed keeps them in parts: join them with the zero_to_fp32.py that lies in it"
    if list(folder.glob("pytorch_model_fsdp*")):
        return "FSDP keeps them in parts: join them with `accelerate merge-weights`"
    return REMEDY


def _check_json(folder: Path) -> None:
    """Raise WeightsError for invalid JSON; the libraries that read it do not name the file."""
    for file in map(folder.joinpath, _JSON):
        if file.exists():
            read_json(file)


def _check_layers(names: set[str], config: dict[str, Any]) -> None:
    layers: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if match := _LAYER.search(name):
            layers[int(match[1])].add(name[: match.start()] + "." + name[match.end() :])
    keys = ("num_hidden_layers", "num_transformer_layers", "num_layers")
    for key in (*keys, "first_k_dense_replace"):
        if not isinstance(config.get(key) or 0, int):
            raise WeightsError(f"config.json: {key} is not an integer; {REMEDY}")
    layer_count = next((config[key] for key in keys if config.get(key)), len(layers))
    if (number := next((n for n in range(layer_count) if n not in layers), None)) is not None:
        raise WeightsError(f"the weights lack the tensors of layer {number}; {REMEDY}")
    dense = config.get("first_k_dense_replace") or 0
    for alike in (range(dense), range(dense, layer_count)):
        all_tensors = set().union(*(layers[number] for number in alike))
        for number in alike:
            if missing := sorted(all_tensors - layers[number]):
                raise WeightsError(
                    f"the weights lack {len(missing)} tensors of layer {number}, among them "
                    f"{missing[0]}; {REMEDY}"
                )
