"""Lists the weight files of a checkpoint and reads their headers; loads no weights."""

import json
import math
import re
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import WeightsError

_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin")  # vLLM ignores them too
# Pattern of weight files -> the index that vLLM reads.
_INDEX = {"*.safetensors": "model.safetensors.index.json", "*.bin": "pytorch_model.bin.index.json"}
REMEDY = "fetch the model again"
# Key of config.json -> its type, and that type in words.
_CONFIG: dict[str, tuple[type, str]] = {
    "architectures": (list, "a JSON array"),
    "text_config": (dict, "a JSON object"),
    "quantization_config": (dict, "a JSON object"),
}
_LFS_POINTER = b"version https://git-lfs"  # the file's beginning


class Tensor(NamedTuple):
    """Size of one tensor in bytes and in floats; 0 floats for a tensor of integers."""

    bytes: int
    floats: int
    shape: tuple[int, ...] = ()


def visible(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern, without hidden ones, such as `._config.json` of macOS.

    vLLM skips those too.
    """
    return [folder / name for name in sorted(glob(pattern, root_dir=folder))]


def remedy(file: Path) -> str:
    """Say what to do about a file whose content is not what its name says."""
    with suppress(OSError), file.open("rb") as f:
        if f.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return "it is the pointer of git-lfs to the file: run `git lfs pull` in its folder"
    return REMEDY


def read_json(file: Path) -> Any:
    """Return the value in a JSON file of a checkpoint. Raises WeightsError.

    It must be UTF-8 without a byte order mark, as the libraries that read it want it.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise WeightsError(f"{file} is not readable JSON: {e}; {remedy(file)}") from None


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint. Raises WeightsError."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise WeightsError(f"{file} is not a JSON object; {REMEDY}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json, or an empty dict. Raises WeightsError.

    The keys that this package reads are null or have the right type.
    """
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    for key, (kind, name) in _CONFIG.items():
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise WeightsError(f"{file}: {key} is not {name}; {REMEDY}")
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise WeightsError(f"{file}: architectures has what is no string; {REMEDY}")
    return config


def index(folder: Path, pattern: str) -> dict[str, Any]:
    """Return the index of the weight files of one pattern, or an empty dict."""
    file = folder / _INDEX[pattern]
    return read_object(file) if file.is_file() else {}


def weight_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern, such as "*.bin", that vLLM would load."""
    names = set(index(folder, pattern).get("weight_map", {}).values())
    return [
        file
        for file in visible(folder, pattern)
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
        what = "damaged or cut short" if _has_header(file) else "not a safetensors file"
        raise WeightsError(f"{file} is {what}: {e}; {remedy(file)}") from None
    return tensors


def check_pickled(file: Path) -> None:
    """Raise WeightsError if a file does not begin as PyTorch's do: a zip file, or a pickle."""
    with file.open("rb") as f:
        if not f.read(2).startswith((b"PK", b"\x80")):
            raise WeightsError(f"{file} is not a PyTorch weight file; {remedy(file)}")


def _has_header(file: Path) -> bool:
    """Whether JSON follows a length, as in a safetensors file."""
    with suppress(OSError), file.open("rb") as f:
        return f.read(9)[8:] == b"{"
    return False


def _pickled(file: Path) -> dict[str, Any]:
    """Return the tensors of a PyTorch file; their data stays on the disk."""
    import torch

    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return state
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        raise WeightsError(
            f"{file} is not a PyTorch weight file: {reason}; {remedy(file)}"
        ) from None
