"""Lists the weight files of a checkpoint and reads their headers; loads no weights."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import WeightsError

_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin")  # vLLM ignores them too
REMEDY = "fetch the model again"


class Tensor(NamedTuple):
    """Size of one tensor in bytes and in floats; 0 floats for a tensor of integers."""

    bytes: int
    floats: int
    shape: tuple[int, ...] = ()


def read_json(file: Path) -> Any:
    """Return the value in a JSON file of a checkpoint. Raises WeightsError."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise WeightsError(f"{file} is not readable JSON: {e}") from None


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint. Raises WeightsError."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise WeightsError(f"{file} is not a JSON object; {REMEDY}")
    return content


def index(folder: Path, pattern: str) -> dict[str, Any]:
    """Return the index of the weight files of one pattern, or an empty dict."""
    content: dict[str, Any] = {}
    for file in folder.glob(f"{pattern}.index.json"):
        content = read_object(file)
    return content


def weight_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern, such as "*.bin", that vLLM would load."""
    names = set(index(folder, pattern).get("weight_map", {}).values())
    return [
        file
        for file in sorted(folder.glob(pattern))
        if file.name in names or not names and file.name not in _NOT_WEIGHTS
    ]


def read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or PyTorch file by name. Raises WeightsError."""
    if file.suffix == ".safetensors":
        return _safetensors(file)
    try:
        return {
            name: Tensor(
                tensor.numel() * tensor.element_size(),
                tensor.numel() if tensor.is_floating_point() else 0,
                tuple(tensor.shape),
            )
            for name, tensor in _pickled(file).items()
        }
    except AttributeError:
        raise WeightsError(f"{file} holds more than tensors, which vLLM does not read") from None


def _safetensors(file: Path) -> dict[str, Tensor]:
    """The library checks the header, and the length of the file, when it opens it."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(file, "numpy") as f:
            for name in f.keys():  # it is no dict
                part = f.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()  # such as BF16, BOOL
                count = math.prod(shape)
                bits = int(m[0]) if (m := re.search(r"\d+", dtype)) else 8
                is_float = "F" in dtype
                tensors[name] = Tensor(
                    count * bits // 8, count if is_float and bits > 8 else 0, shape
                )
    except (OSError, SafetensorError) as e:
        raise WeightsError(f"{file} is damaged or cut short: {e}; {REMEDY}") from None
    return tensors


def _pickled(file: Path) -> dict[str, Any]:
    """Return the tensors of a PyTorch file; their data stays on the disk."""
    import torch

    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return state
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise WeightsError(f"{file} is not a PyTorch weight file: {reason}; {REMEDY}") from None
