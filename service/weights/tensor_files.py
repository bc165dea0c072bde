"""Lists the weight files of a checkpoint and reads their headers; loads no weights.

A safetensors file begins with the length of its header in 8 bytes, little-endian, then the header
in JSON (https://huggingface.co/docs/safetensors).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import WeightsError

_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names of float types
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin")  # vLLM ignores them too
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
REMEDY = "fetch the model again"


class Tensor(NamedTuple):
    """Size of one tensor in bytes and in floats; 0 floats for a tensor of integers."""

    bytes: int
    floats: int


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON file of a checkpoint. Raises WeightsError."""
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        return content
    except (OSError, ValueError) as e:
        raise WeightsError(f"{file} is not readable JSON: {e}") from None


def index(folder: Path, pattern: str) -> dict[str, Any]:
    """Return the index of the weight files of one pattern, or an empty dict."""
    content: dict[str, Any] = {}
    for file in folder.glob(f"{pattern}.index.json"):
        content = read_json(file)
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
        header, _ = _header(file)
        tensors = {}
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            item = _ITEM_SIZES.get(tensor["dtype"], 0)
            tensors[name] = Tensor(end - begin, (end - begin) // item if item else 0)
        return tensors
    try:
        return {
            name: Tensor(
                tensor.numel() * tensor.element_size(),
                tensor.numel() if tensor.is_floating_point() else 0,
            )
            for name, tensor in _pickled(file).items()
        }
    except AttributeError:
        raise WeightsError(f"{file} holds more than tensors, which vLLM does not read") from None


def check_length(file: Path) -> None:
    """Raise WeightsError if the length of a safetensors file differs from its header."""
    header, length = _header(file)
    expected = length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if (found := file.stat().st_size) != expected:
        raise WeightsError(
            f"{file} has {found} bytes, and its header speaks of {expected}; {REMEDY}"
        )


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and the offset of its data."""
    header = None
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length <= _MAX_HEADER_BYTES:
                header = json.loads(f.read(length))
    except (OSError, ValueError):
        pass
    if not isinstance(header, dict):
        raise WeightsError(f"{file} is not a safetensors file; {REMEDY}")
    header.pop("__metadata__", None)
    return header, 8 + length


def _pickled(file: Path) -> dict[str, Any]:
    """Return the tensors of a PyTorch file; their data stays on the disk."""
    import torch

    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return state
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise WeightsError(f"{file} is not a PyTorch weight file: {reason}; {REMEDY}") from None
