"""Where a model's files come from: one module for each kind of source, each with one `fetch`."""

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
    """The folder with the model's files, fetched on the first call.

    `weights=False` is for the source of a tokenizer: what only the weights need is not downloaded.
    `report` is told the per cent of a long download.
    Raises WeightsError or ConfigError with the remedy.
    """
    if source.embedded and source.sha256:
        return embedded.fetch(source.embedded, source.sha256, cache_dir)
    if source.modelscope:
        return modelscope.fetch(source.modelscope, source.revision, weights=weights, report=report)
    return local.fetch(source.path or "", weights=weights)


def present(source: Source, cache_dir: Path, *, weights: bool = True) -> Path | None:
    """The folder that `fetch` would return when all is on this machine already, else None."""
    if source.embedded and source.sha256:
        folder = embedded.folder(source.embedded, source.sha256, cache_dir)
        return folder if folder.is_dir() else None
    if source.modelscope:
        return modelscope.present(source.modelscope, source.revision, weights=weights)
    return local.fetch(source.path or "", weights=weights)
