"""A model in a local folder."""

from pathlib import Path

from service.errors import ConfigError


def fetch(path: str, *, weights: bool = True) -> Path:
    """Return the folder. Raises ConfigError if it does not look like a checkpoint.

    Use `weights=False` for a tokenizer's folder, which may have no config.json.
    """
    try:
        folder = Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"source.path: {path}: no such user") from None
    if not folder.is_dir():
        raise ConfigError(f"source.path: {path}: no such folder")
    if weights and not (folder / "config.json").is_file():
        raise ConfigError(f"source.path: {path}: has no config.json, so it is not a checkpoint")
    return folder
