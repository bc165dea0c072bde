"""Is a checkpoint whole? vLLM 0.32 serves garbage from one that lacks matrices or its head.

(`DefaultModelLoader.track_weights_loading` leaves linear layers and embeddings of unquantised
models out of its check.) Read from the files' headers and names alone.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from service.errors import WeightsError
from service.weights import tensor_files
from service.weights.tensor_files import REMEDY, read_json, weight_files

# Whose layers all have the same tensors.
_UNIFORM = frozenset(
    {
        "BaichuanForCausalLM",
        "BlueLMForCausalLM",
        "LlamaForCausalLM",
        "MiniCPMForCausalLM",
        "MistralForCausalLM",
        "OpenELMForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "XverseForCausalLM",
    }
)
# Of these the head is a matrix of its own, whatever config.json leaves out.
_UNTIED = frozenset({"BaichuanForCausalLM", "BlueLMForCausalLM", "XverseForCausalLM"})
_LAYER = re.compile(r"\.(\d+)\.")


def check(folder: Path) -> None:
    """Raises WeightsError naming what is cut short or missing, when that can be told."""
    _check_json(folder)
    files = weight_files(folder, "*.safetensors")
    for file in files:
        tensor_files.check_length(file)
    if not files:
        files = weight_files(folder, "*.bin")
    if not files and not list(folder.glob("*.pt")):
        raise WeightsError(f"{folder} holds no weights (*.safetensors, *.bin, *.pt); {REMEDY}")
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or [""])[0]
    if not files or architecture not in _UNIFORM or config.get("quantization_config"):
        return
    try:
        names = {name for file in files for name in tensor_files.read(file)}
    except WeightsError:  # a PyTorch file of the old form, or a broken one: vLLM tells
        return
    _check_layers(names, config)
    tied = config.get("tie_word_embeddings", architecture not in _UNTIED)
    if not any("embed" in name for name in names):
        raise WeightsError(f"{folder} has no weights of the token embedding; {REMEDY}")
    if not tied and not any("lm_head" in name for name in names):
        raise WeightsError(f"{folder} has no weights of the output head (lm_head); {REMEDY}")


def _check_json(folder: Path) -> None:
    """Whether the files that are JSON are JSON: the libraries that read them do not name them."""
    for file in folder.glob("*.json"):
        read_json(file)


def _check_layers(names: set[str], config: dict[str, Any]) -> None:
    layers: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if found := _LAYER.search(name):
            layers[int(found[1])].add(name[: found.start()] + "." + name[found.end() :])
    every = set().union(*layers.values())
    wanted = config.get("num_hidden_layers") or config.get("num_transformer_layers") or len(layers)
    for number in range(wanted):
        if missing := sorted(every - layers[number]):
            raise WeightsError(
                f"the weights lack {len(missing)} tensors of layer {number}, among them "
                f"{missing[0]}; {REMEDY}"
            )
