"""The clients of a deployment: each has an API key, a name and a weight.

Only the SHA-256 hash of a key is kept.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from service.errors import ConfigError

_COMMENT = re.compile(r"(?:^|\s)#")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Client:
    """The owner of a request: the name and the weight of its API key."""

    name: str = "anonymous"
    weight: float = 1.0


ANYONE = Client()


def digest(key: bytes) -> str:
    """Return the SHA-256 of a key, in hex."""
    return hashlib.sha256(key).hexdigest()


def parse(text: str, place: str) -> dict[str, Client]:
    """Parse lines `NAME KEY [WEIGHT]` into hash -> client; `#` begins a comment.

    KEY may be `sha256:` and the hash. A text of a single word is a key with the name default.
    Raises ConfigError with `place` and line, but never a key.
    """
    lines = [(n, _COMMENT.split(line)[0].split()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(n, words) for n, words in lines if words]
    if len(lines) == 1 and len(lines[0][1]) == 1:
        lines = [(lines[0][0], ["default", *lines[0][1]])]
    clients: dict[str, Client] = {}
    for number, words in lines:
        if len(words) not in (2, 3):
            raise ConfigError(f"{place}:{number}: a line is NAME KEY [WEIGHT]")
        name, key, *rest = words
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{place}:{number}: a name has 1 to 64 of A-Z a-z 0-9 . _ -")
        try:
            weight = float(rest[0]) if rest else 1.0
        except ValueError:
            weight = 0.0
        if not 0.001 <= weight <= 1000:
            raise ConfigError(f"{place}:{number}: a weight is a number from 0.001 to 1000")
        match = _HASH.fullmatch(key)
        hashed = match[1] if match else digest(key.encode())
        if hashed in clients:
            raise ConfigError(f"{place}:{number}: this key stands in an earlier line already")
        clients[hashed] = Client(name, weight)
    return clients


def read_file(file: Path, place: str) -> dict[str, Client]:
    """Return the keys in a file as hash -> client. Raises ConfigError."""
    try:
        return parse(file.read_text(encoding="utf-8"), place)
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{place}: {reason}") from None
