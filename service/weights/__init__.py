"""Fetches a model's files. Each source that downloads has a module with a function `fetch`."""

from collections.abc import Callable
from pathlib import Path

from service.errors import ConfigError
from service.model_config import Source
from service.weights import embedded, modelscope


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


def _local_folder(path: str, *, weights: bool) -> Path:
    """Return the folder. A tokenizer's, without `weights`, may have no config.json."""
    try:
        folder = Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"source.path: {path}: no such user") from None
    if not folder.is_dir():
        raise ConfigError(f"source.path: {path}: no such folder")
    if weights and not (folder / "config.json").is_file():
        raise ConfigError(f"source.path: {path}: has no config.json, so it is not a checkpoint")
    return folder
