"""Reads the text files that people write, with any editor: YAML and keys."""

from pathlib import Path

from service.errors import ConfigError


def read(file: Path, place: str) -> str:
    """Return the text of a UTF-8 file without a byte order mark; each line ends with a newline.

    Raises ConfigError with `place`, the file's name in messages.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise ConfigError(f"{place}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as e:
        raise ConfigError(f"{place}: {e.strerror}") from None
