"""Fetches a model's files. Each source that downloads has a module with a function `fetch`."""

from collections.abc import Callable
from pathlib import Path

from service.errors import ConfigError, WeightsError
from service.model_config import Source
from service.model_config.loader import advice_on
from service.model_config.schema import AdapterSource
from service.weights import adapter, embedded, modelscope


def fetch(
    source: Source,
    cache_dir: Path,
    *,
    weights: bool = True,
    report: Callable[[int], None] | None = None,
) -> Path:
    """Return the folder with the model's files; fetch missing ones.

    Use `weights=False` for the source of a tokenizer, to download no weights. `report` is called
    with the percentage of a long download. Raises WeightsError or ConfigError with the remedy.
    """
    if source.embedded and source.sha256:
        return embedded.fetch(source.embedded, source.sha256, cache_dir)
    if source.modelscope:
        return modelscope.fetch(source.modelscope, source.revision, weights=weights, report=report)
    return _local_folder(source.path or "", weights=weights)


def present(source: Source, cache_dir: Path, *, weights: bool = True) -> Path | None:
    """Return the folder of `fetch` if all files are on this machine, else None."""
    if source.embedded and source.sha256:
        folder = embedded.folder(source.embedded, source.sha256, cache_dir)
        return folder if folder.is_dir() else None
    if source.modelscope:
        return modelscope.present(source.modelscope, source.revision, weights=weights)
    return _local_folder(source.path or "", weights=weights)


def fetch_adapter(name: str, source: AdapterSource) -> Path:
    """Return the folder of an adapter; fetch it from ModelScope if it is not here.

    A local folder may not exist: `adapter.inspect` says so. Raises WeightsError or ConfigError with
    the remedy.
    """
    if source.modelscope:
        try:
            return modelscope.fetch(source.modelscope, source.revision)
        except WeightsError as e:
            raise WeightsError(f"adapter {name}: {e}") from e
    return expanded(source.path or "", f"adapter {name}: ")


def present_adapter(name: str, source: AdapterSource) -> Path | None:
    """Return the folder of `fetch_adapter` if the files are on this machine, else None."""
    if source.modelscope:
        return modelscope.present(source.modelscope, source.revision)
    return expanded(source.path or "", f"adapter {name}: ")


def expanded(path: str, place: str = "") -> Path:
    """Return a path with the home folder for `~`. Raises ConfigError, which begins with `place`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{place}{path}: no such user; write the whole path") from None


def _local_folder(path: str, *, weights: bool) -> Path:
    """Return the folder. A tokenizer's, without `weights`, may have no config.json."""
    folder = expanded(path, "source.path: ")
    if not folder.is_dir():
        what = "is a file; give the folder" if folder.exists() else "no such folder"
        gguf = "; GGUF is not served: fetch the model's safetensors" * (folder.suffix == ".gguf")
        raise ConfigError(f"source.path: {path}: {what}{gguf}")
    if weights and not (folder / "config.json").is_file():
        raise ConfigError(
            f"source.path: {path}: has no config.json, so it is not a checkpoint{_hint(folder)}"
        )
    return folder


def _hint(folder: Path) -> str:
    """Say what a folder without a model may be."""
    if adapter.is_adapter(folder):
        return "; it is an adapter: give it under adapters, and its base here"
    return advice_on(folder)
