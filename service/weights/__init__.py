"""Fetches a model's files. Each kind of source has a module with a function `fetch`."""

from collections.abc import Callable
from pathlib import Path

from service.model_config import Source
from service.weights import embedded, local, modelscope


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
    return local.fetch(source.path or "", weights=weights)


def present(source: Source, cache_dir: Path, *, weights: bool = True) -> Path | None:
    """Return the folder of `fetch` if all files are on this machine, else None."""
    if source.embedded and source.sha256:
        folder = embedded.folder(source.embedded, source.sha256, cache_dir)
        return folder if folder.is_dir() else None
    if source.modelscope:
        return modelscope.present(source.modelscope, source.revision, weights=weights)
    return local.fetch(source.path or "", weights=weights)
