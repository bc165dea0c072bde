"""A folder that the user names."""

from pathlib import Path

from service.errors import ConfigError


def fetch(path: str, *, weights: bool = True) -> Path:
    """The folder, when it looks like a checkpoint. Raises ConfigError when it does not.

    `weights=False` is for a tokenizer's folder, which may have no config.json.
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
